"""Post-training methods: a float model in, one that rounding hurts less out, before any training.

==============  ==================================================================================
method          what it changes
==============  ==================================================================================
smoothquant     channels scaled down where activations are large, and weights up
rotate          the residual stream and the heads of V turned, so that outliers spread
gptq            weights to codes one column after the other, each error made up for by the next
==============  ==================================================================================

Each changes the weights of a transformers causal LM in place, and nothing else: the first two leave
what it computes as it is, the third leaves weights that :func:`qatc.numerics.minmax.quantize` takes
to the chosen codes. Fake-quant, training, lowering and export follow as without them.
"""

from qatc.ptq.gptq import gptq
from qatc.ptq.method import Method, apply, parse_method
from qatc.ptq.rotation import rotate, untie_head
from qatc.ptq.smoothquant import smoothquant

__all__ = [
    "Method",
    "apply",
    "gptq",
    "parse_method",
    "rotate",
    "smoothquant",
    "untie_head",
]

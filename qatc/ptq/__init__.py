"""Post-training methods: a float model in, one that rounding hurts less out, before any training.

==============  ==================================================================================
method          what it changes
==============  ==================================================================================
smoothquant     channels scaled down where activations are large, and weights up
rotate          the residual stream and the heads of V turned, so that outliers spread
rotate_inputs   weights turned as the graph, by the recipe, will turn what they read
gptq            weights to codes one column after the other, each error made up for by the next
==============  ==================================================================================

Each changes the weights of a transformers causal LM in place, and nothing else: the first three
leave what it computes as it is, ``rotate_inputs`` in the graph of its recipe; the fourth leaves
weights that :func:`qatc.numerics.minmax.quantize` takes to the chosen codes. Fake-quant, training,
lowering and export follow as without them.
"""

from qatc.ptq.gptq import gptq
from qatc.ptq.method import Method, apply, parse_method, with_rotations
from qatc.ptq.rotation import rotate, rotate_inputs, untie_head
from qatc.ptq.smoothquant import smoothquant

__all__ = [
    "Method",
    "apply",
    "gptq",
    "parse_method",
    "rotate",
    "rotate_inputs",
    "smoothquant",
    "untie_head",
    "with_rotations",
]

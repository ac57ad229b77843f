"""Passes: each takes a ``torch.fx.GraphModule``, edits it, and says what it did.

======================  ===========================================================================
pass                    what it does
======================  ===========================================================================
Canonicalize            one spelling for the matchers: asserts dropped, repeated heads folded
RotateLinearInputs      Hadamard transforms before linears, which spread outliers over all channels
QuantizeLinearInputs    fake-quant nodes on the inputs of linears, one scale per token
QuantizeWeights         fake-quant nodes on weights, one scale per output channel or group
QuantizeEmbeddings      fake-quant nodes behind lookups in a table, one scale per row
RotateKeys              Hadamard transforms of the heads of queries and keys
CenterKeys              a constant vector per head taken off the keys
QuantizeKV              fake-quant nodes on keys and values, one scale per token and head
UseIntegerForward       quantized linears on int8 codes with an exact product, differentiable
LowerLinear             linears on packed codes, by the fastest exact kernel
JoinLinears             lowered linears of one input in one launch, on a GPU
LowerToTorchao          the same by torchao's products, where one is exact
LowerEmbedding          lookups of packed codes
InsertKVCache           attention that writes to, and reads from, a preallocated KV cache
======================  ===========================================================================

``training_pipeline(recipe...)`` puts them in order. All of them work on any graph that holds
``aten.linear`` and ``aten.scaled_dot_product_attention`` nodes, such as the ``graph_module`` of a
``torch.export.ExportedProgram``, and know nothing of Hugging Face.
"""

from qatc.passes.base import Edits, GraphPass, PassRecord, Pipeline, pass_records
from qatc.passes.canonicalize import Canonicalize
from qatc.passes.insert_kv_cache import InsertKVCache
from qatc.passes.join_linears import JoinLinears
from qatc.passes.lower_embedding import LowerEmbedding
from qatc.passes.lower_linear import LowerLinear
from qatc.passes.lower_to_torchao import LowerToTorchao
from qatc.passes.quantize_embeddings import QuantizeEmbeddings
from qatc.passes.quantize_kv import CenterKeys, QuantizeKV, RotateKeys
from qatc.passes.quantize_linear_inputs import QuantizeLinearInputs, RotateLinearInputs
from qatc.passes.quantize_weights import QuantizeWeights
from qatc.passes.use_integer_forward import UseIntegerForward

__all__ = [
    "Canonicalize",
    "CenterKeys",
    "Edits",
    "GraphPass",
    "InsertKVCache",
    "JoinLinears",
    "LowerEmbedding",
    "LowerLinear",
    "LowerToTorchao",
    "PassRecord",
    "Pipeline",
    "QuantizeEmbeddings",
    "QuantizeKV",
    "QuantizeLinearInputs",
    "QuantizeWeights",
    "RotateKeys",
    "RotateLinearInputs",
    "UseIntegerForward",
    "pass_records",
]

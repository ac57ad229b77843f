"""What ``quantize`` writes and ``load`` reads, and its export to other runtimes.

======================  ==========================  ===============================================
format                  loads in                    file
======================  ==========================  ===============================================
``compressed-tensors``  transformers, vLLM          ``compressed_tensors.py``
======================  ==========================  ===============================================

Every format stores the codes and scales of training as they are (``codes.py``); none is quantized
again. ``directory.py`` writes and reads the model directory around them.
"""

from qatc.output.codes import QuantizedWeight
from qatc.output.directory import (
    FORMATS,
    export,
    load_codes,
    load_float_state,
    load_reference,
    loads_elsewhere,
    read_metadata,
    read_recipe,
    write_model,
)

__all__ = [
    "FORMATS",
    "QuantizedWeight",
    "export",
    "load_codes",
    "load_float_state",
    "load_reference",
    "loads_elsewhere",
    "read_metadata",
    "read_recipe",
    "write_model",
]

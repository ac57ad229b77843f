"""What ``quantize`` writes and ``load`` reads.

Codes and scales are stored as they were trained (``codes.py``), in the layout of compressed-tensors
(``compressed_tensors.py``), in an ordinary Hugging Face directory (``directory.py``).
"""

from qatc.output.codes import QuantizedWeight
from qatc.output.directory import write_model
from qatc.output.reading import (
    load_codes,
    load_float_state,
    load_reference,
    loads_elsewhere,
    read_metadata,
    read_recipe,
)

__all__ = [
    "QuantizedWeight",
    "load_codes",
    "load_float_state",
    "load_reference",
    "loads_elsewhere",
    "read_metadata",
    "read_recipe",
    "write_model",
]

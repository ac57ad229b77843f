"""What ``quantize`` writes and ``load`` reads.

An output is one value (``contents.py``): codes and scales as they were trained (``codes.py``), and
all that stays float. Its directory is an ordinary Hugging Face model (``directory.py``,
``reading.py``), whose codes lie in the layouts of compressed-tensors (``layouts.py``).
"""

from qatc.output.codes import QuantizedWeight
from qatc.output.contents import Output
from qatc.output.directory import write_output
from qatc.output.reading import (
    load_codes,
    load_reference,
    loads_elsewhere,
    open_output,
    read_metadata,
)

__all__ = [
    "Output",
    "QuantizedWeight",
    "load_codes",
    "load_reference",
    "loads_elsewhere",
    "open_output",
    "read_metadata",
    "write_output",
]

"""compressed-tensors, which transformers and vLLM load.

An output has that layout by itself, but for the codes of a quantized head or embedding, which it
stores once where the two are one weight; here each of them has a copy that those runtimes find.

It cannot hold how K and V are quantized, which is a setting of the runtime and stays in
``qatc.json``, nor weights of other modules than linears and embeddings, which are refused.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from qatc.export.base import Format
from qatc.output import Output, load_codes, loads_elsewhere, write_output
from qatc.output.directory import copy_companions


def write(output: Output, directory: Path) -> None:
    """Write an opened output into an empty directory."""
    copy_companions(output.place, directory)  # the generation config among them, byte for byte
    write_output(directory, replace(output, generation_config=None), portable=True)


def notes(output: Output) -> list[str]:
    """That the codes of head and embedding take more space, if they do."""
    if loads_elsewhere(output.place):
        return []
    return [
        "the codes of head and embedding are stored apart and a byte each, as transformers reads"
        " them: larger than the source, the same values"
    ]


COMPRESSED_TENSORS = Format("compressed-tensors", "transformers, vLLM", write, load_codes, notes)

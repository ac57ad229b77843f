"""compressed-tensors, which transformers and vLLM load.

An output has that layout by itself, but for the codes of a quantized head or embedding, which it
stores once where the two are one weight; here each of them has a copy that those runtimes find.

It cannot hold how K and V are quantized, which is a setting of the runtime and stays in
``qatc.json``, nor weights of other modules than linears and embeddings, nor inputs that are rotated
while the model runs, which are refused.
"""

from __future__ import annotations

from pathlib import Path

from qatc.export.base import Format, write_with_companions
from qatc.output import Output, load_codes
from qatc.output.compressed_tensors import loads_as_it_is, refuse_rotated
from qatc.progress import Observer


def write(output: Output, directory: Path, observer: Observer) -> None:
    """Write an opened output into an empty directory."""
    write_with_companions(output, directory, "transformers")


def notes(output: Output) -> list[str]:
    """That the codes of head and embedding take more space, if they do."""
    refuse_rotated(output.recipe, "transformers")
    if loads_as_it_is(vars(output.config)):
        return []
    return [
        "the codes of head and embedding are stored apart and a byte each, as transformers reads"
        " them: larger than the source, the same values"
    ]


COMPRESSED_TENSORS = Format("compressed-tensors", "transformers, vLLM", write, load_codes, notes)

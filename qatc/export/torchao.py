"""torchao, by which transformers loads weights that PyTorch's own library multiplies.

Every quantized weight becomes an ``Int8Tensor``, a byte a code; see :mod:`qatc.output.torchao`. It
cannot hold quantized inputs of other than 8 bits or in groups, nor weights in groups behind
quantized inputs, which are refused, nor how K and V are quantized, which :func:`notes` says.
"""

from __future__ import annotations

from pathlib import Path

from qatc.export.base import Format, write_with_companions
from qatc.output import Output, load_codes, torchao
from qatc.progress import Observer
from qatc.recipe.recipe import Recipe


def write(output: Output, directory: Path, observer: Observer) -> None:
    """Write an opened output into an empty directory."""
    write_with_companions(output, directory, "torchao")


def notes(output: Output) -> list[str]:
    """What torchao computes in another way than the model was trained for: a line, or none."""
    torchao.refuse_unheld(output.recipe)
    return differences(output.recipe)


def differences(recipe: Recipe) -> list[str]:
    """:func:`notes` of a recipe."""
    found = torchao.differences(recipe)
    if not found:
        return []
    inputs = recipe.activations
    trains = inputs.quantizes and not torchao.rounds_like_torchao(inputs)
    way_out = "; --target torchao trains with torchao's activation rule" if trains else ""
    return [f"transformers runs it with other numerics: {' and '.join(found)}{way_out}"]


TORCHAO = Format("torchao", "transformers", write, load_codes, notes)

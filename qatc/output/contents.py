"""What an output holds, as one value.

:func:`qatc.output.directory.write_output` writes it, :func:`qatc.output.reading.open_output` reads
it, and whoever loads, verifies, evaluates or exports an output is given it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from qatc.output.codes import QuantizedWeight
from qatc.recipe.recipe import Recipe

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedConfig


@dataclass(frozen=True, eq=False)
class Output:
    """A quantized model: what it is, its tensors, and where it comes from.

    Attributes:
        config: the model's config; a ``quantization_config`` in it is that of the files.
        recipe: what the model was trained with.
        weights: the quantized weights by parameter name. Where a tied weight is quantized for all
            of its users, one of their names is enough.
        state: the tensors that are not quantized by name; tied ones may be there once or more.
        metadata: what ``qatc.json`` says besides: all of it, for an output that was opened.
        generation_config: of the model, if it has one.
        trust_remote_code: run the code that comes with the model.
        directory: where it was opened; None if it is still to be written.
    """

    config: PreTrainedConfig
    recipe: Recipe
    weights: Mapping[str, QuantizedWeight]
    state: Mapping[str, Tensor]
    metadata: Mapping[str, Any] = field(default_factory=dict)
    generation_config: GenerationConfig | None = None
    trust_remote_code: bool = False
    directory: Path | None = None

    @property
    def place(self) -> Path:
        """The directory that it was opened from."""
        assert self.directory is not None, "this output was not opened"
        return self.directory

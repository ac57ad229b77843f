"""What a training loop of one's own has trained, written as ``qatc quantize`` writes it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from qatc.errors import ConfigError
from qatc.models import is_transformers_model
from qatc.models.preparation import prepared_state, quantized_specs, restore
from qatc.models.scales import of_weight
from qatc.models.support import has_adapters
from qatc.output import Output, QuantizedWeight, write_output
from qatc.recipe.spec import QuantSpec
from qatc.storage.directories import complete_directory, refuse_existing
from qatc.storage.locks import locked

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer


def save(
    model: nn.Module,
    directory: str | Path,
    *,
    tokenizer: Tokenizer | None = None,
    overwrite: bool = False,
) -> Path:
    """Write what a prepared, trained model computes as an output: codes, scales, recipe and card.

    The layers get their own forward back, as by :func:`qatc.restore`. ``qatc.load`` and all
    commands take what is written.

    Args:
        model: a transformers model, prepared by :func:`qatc.prepare`.
        directory: to be made; complete or, when anything is raised, as it was.
        tokenizer: saved beside the model.
        overwrite: replace an output that is there.

    Returns:
        ``directory``.

    Raises:
        ConfigError: the model is not prepared, is no transformers model or was not run yet as it is
            now, or ``directory`` exists.
        CheckpointError: it cannot be written.
    """
    directory = Path(directory)
    if has_adapters(model):
        raise ConfigError(
            "the model has adapters (LoRA, say), which an output has no place for; merge them into"
            " its weights first, by peft's merge_and_unload()"
        )
    if not is_transformers_model(model):
        raise ConfigError(
            "an output is a transformers model, and this module is none; take its codes by"
            " qatc.output.QuantizedWeight.from_state"
        )
    specs = trained_specs(model)
    with locked(directory):
        refuse_existing(directory, overwrite)
        output = _take_output(model, specs)
        with complete_directory(directory, overwrite=overwrite) as staging:
            write_output(staging, output, tokenizer=tokenizer)
        restore(model)  # now that nothing can be lost any more
    return directory


def trained_specs(model: nn.Module) -> dict[str, QuantSpec]:
    """The weights that a prepared model quantizes by name, and how.

    Raises:
        ConfigError: it is not prepared, or was not run yet as it is now.
    """
    prepared = prepared_state(model)
    unknown = next((own.name for own in prepared.forwards if not prepared.store.of(own)), None)
    if unknown is not None:
        raise ConfigError(
            f"the layer {unknown or 'as a whole'} was not captured as it is now (in"
            f" {'training' if model.training else 'evaluation'} mode, say), so that its quantized"
            " weights are not known; run the model once"
        )
    return quantized_specs(model)


def _take_output(model: Any, specs: dict[str, QuantSpec]) -> Output:
    """The output of a model, which stays as it is."""
    recipe, state = prepared_state(model).recipe, model.state_dict()
    weights = {
        name: QuantizedWeight.from_state(state, name, spec).cpu() for name, spec in specs.items()
    }
    floats = {
        name: value.detach().cpu()
        for name, value in state.items()
        if name not in weights and not of_weight(name)
    }
    source = str(model.config.name_or_path)
    metadata = {"model": source, "model_is_directory": Path(source).is_dir()} if source else {}
    config = _plain_config(model)
    return Output(config, recipe, weights, floats, metadata, model.generation_config)


def _plain_config(model: Any) -> Any:
    """The model's configuration as it was before it was prepared."""
    copies: dict[int, Any] = {}
    config = copy.deepcopy(model.config, copies)
    for own, value in prepared_state(model).use_cache:
        if id(own) in copies:
            copies[id(own)].use_cache = value
    return config

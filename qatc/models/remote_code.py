"""Models that bring their own code: Python files beside the weights, run only if they are trusted.

A model's ``config.json`` names them in ``auto_map``. What is made from such a model needs them as
well, so that they travel with it; see :func:`copy_code`.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qatc.errors import CheckpointError, ConfigError, DataError
from qatc.storage.files import read_json

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

_NEEDED = ("AutoConfig", "AutoModelForCausalLM")


def build_model(
    config: PreTrainedConfig, dtype: torch.dtype, *, trust_remote_code: bool, **options: Any
) -> PreTrainedModel:
    """A causal LM of a config, unquantized and with new weights.

    Args:
        config: left as it is; a ``quantization_config`` is ignored.
        dtype: of the parameters.
        trust_remote_code: run the model's own code, if it has any.
        options: what else ``from_config`` takes.

    Raises:
        CheckpointError: the model's own code cannot be run.
    """
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=dtype, trust_remote_code=trust_remote_code, **options
        )
    except (OSError, ImportError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"cannot build the model of {config._name_or_path}: {reason}; copy it again with its"
            " Python files, and install what they import"
        ) from error
    return model


def copy_code(model: PreTrainedModel, directory: Path) -> dict[str, str]:
    """Copy the Python files of a model with code of its own into a directory.

    Args:
        model: any transformers model; where transformers has its class, there is nothing to copy.
        directory: what will hold the model's ``config.json``.

    Returns:
        The ``auto_map`` for that config: what to load from which of the files; empty without.
    """
    from transformers.dynamic_module_utils import custom_object_save

    if not type(model).is_remote_code():
        return {}
    found: dict[str, Any] = {"auto_map": {}}
    custom_object_save(model, directory, config=found)
    if type(model.config)._auto_class is not None:
        custom_object_save(model.config, directory, config=found)
    for name, reference in (getattr(model.config, "auto_map", None) or {}).items():
        own = str(reference).rpartition("--")[2]  # without the hub name that it came from
        if (directory / f"{own.partition('.')[0]}.py").exists():
            found["auto_map"].setdefault(name, own)
    return dict(found["auto_map"])


def require_trust(directory: Path, trust_remote_code: bool) -> None:
    """Refuse a directory whose model runs its own code, unless that is trusted.

    Transformers would ask on the terminal, or take a class of its own of the same name, which need
    not compute the same.

    Raises:
        ConfigError: it has code of its own, and ``trust_remote_code`` is false.
    """
    if trust_remote_code:
        return
    try:
        plain = read_json(directory / "config.json")
    except DataError:
        return  # for whoever reads the config to report
    named = plain.get("auto_map") if isinstance(plain, dict) else None
    files = [named[key] for key in _NEEDED if key in named] if isinstance(named, dict) else []
    if files:
        modules = dict.fromkeys(f"{str(file).partition('.')[0]}.py" for file in files)
        raise ConfigError(
            f"{directory} runs code that comes with the model ({', '.join(modules)}); read it, and"
            " if you trust its authors pass --trust-remote-code, from Python"
            " trust_remote_code=True"
        )

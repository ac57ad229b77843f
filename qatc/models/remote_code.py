"""Models that bring their own code: Python files beside the weights, run only if they are trusted.

A model's ``config.json`` names them in ``auto_map``. What is made from such a model needs them as
well, so that they travel with it; see :func:`copy_code`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qatc.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_NEEDED = ("AutoConfig", "AutoModelForCausalLM")


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


def require_trust(directory: Path, plain: Mapping[str, Any], trust_remote_code: bool) -> None:
    """Refuse a directory whose model runs its own code, unless that is trusted.

    Transformers would ask on the terminal, or take a class of its own of the same name, which need
    not compute the same.

    Args:
        directory: of the model, for the message.
        plain: its ``config.json``.
        trust_remote_code: whether it is trusted.

    Raises:
        ConfigError: it has code of its own, and ``trust_remote_code`` is false.
    """
    if trust_remote_code:
        return
    named = plain.get("auto_map")
    files = [named[key] for key in _NEEDED if key in named] if isinstance(named, dict) else []
    if files:
        modules = dict.fromkeys(f"{str(file).partition('.')[0]}.py" for file in files)
        raise ConfigError(
            f"{directory} runs code that comes with the model ({', '.join(modules)}); read it, and"
            " if you trust its authors pass --trust-remote-code, from Python"
            " trust_remote_code=True"
        )

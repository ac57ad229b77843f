"""The directory where an unfinished run is kept, and what makes a run another one.

A run goes on only with the settings, inputs and versions that it began with.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from qatc.errors import ConfigError
from qatc.quantize.settings import QuantizeConfig
from qatc.storage import markers
from qatc.storage.directories import refuse_foreign
from qatc.storage.files import read_json, sync, write_json, writing_to
from qatc.storage.markers import Mark

VERSION_OF = "the version of "
"""How the name of an input begins that is no fingerprint."""


def check_run(config: QuantizeConfig, inputs: Mapping[str, str] | None = None) -> list[str]:
    """Raise if ``config`` cannot be begun or gone on with; nothing is written.

    Args:
        config: the run.
        inputs: fingerprints and versions of what goes into it, as far as they are known yet, by
            what they are called in a message.

    Returns:
        What differs from the unfinished run that is there, which ``overwrite`` starts over.

    Raises:
        ConfigError: there is an unfinished run with other settings or of other inputs, and no
            ``overwrite``; or there is something that is no unfinished run.
    """
    refuse_foreign(config.partial)
    settings, changed = _changes(config, inputs or {})
    if config.overwrite or not settings + changed:
        return settings + changed
    if settings:
        raise ConfigError(
            f"{config.partial} holds an unfinished run with other settings ({', '.join(settings)});"
            " repeat its command to finish it, or pass --overwrite to start over"
        )
    raise ConfigError(
        f"{config.partial} holds an unfinished run, and since it began {'; '.join(changed)}: one"
        " result of both would be of neither; bring back what was to finish it, or pass --overwrite"
        " to start over"
    )


def begin_run(config: QuantizeConfig, inputs: Mapping[str, str] | None = None) -> None:
    """Create the directory of the unfinished run, or record further inputs of the one there.

    An unfinished run with other settings or of other inputs is deleted.
    """
    inputs = dict(inputs or {})
    with writing_to(config.partial):
        if _is_begun(config) and not any(_changes(config, inputs)):
            known = recorded_inputs(config)
            if inputs.keys() <= known.keys():
                return
            inputs = {**inputs, **known}
        else:
            markers.remove(config.partial)
            config.partial.mkdir(parents=True)
            markers.put(config.partial, Mark.UNFINISHED)
            sync(config.partial)
            sync(config.partial.parent)
        write_json(_run_file(config), {**config.to_dict(), "inputs": inputs})


def end_run(config: QuantizeConfig) -> None:
    """Delete the directory of the unfinished run."""
    with writing_to(config.partial):
        markers.remove(config.partial)


def recorded_inputs(config: QuantizeConfig) -> dict[str, str]:
    """The fingerprints and versions that the unfinished run began with; none if there is none."""
    file = _run_file(config)
    return dict(read_json(file).get("inputs", {})) if file.exists() else {}


def trained_file(config: QuantizeConfig) -> Path:
    """Where the trained model's figures are kept: it is there once nothing is left to compute."""
    return config.partial / "trained.json"


def _run_file(config: QuantizeConfig) -> Path:
    return config.partial / "run.json"


def _is_begun(config: QuantizeConfig) -> bool:
    """Whether there is an unfinished run that has not begun to be deleted."""
    return markers.mark_of(config.partial) is Mark.UNFINISHED and _run_file(config).exists()


def _changes(config: QuantizeConfig, inputs: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """Settings and inputs that differ from the unfinished run, if there is one."""
    if not _is_begun(config):
        return [], []
    run = read_json(_run_file(config))
    known = run.pop("inputs", {})
    # A setting that the version which began the run did not have yet is what it is by default.
    usual = dict(_flat(QuantizeConfig(config.model, config.output).to_dict()))
    begun, wanted = dict(_flat(run)), dict(_flat(config.to_dict()))
    found = {key: begun.get(key, usual.get(key)) for key in {**wanted, **begun}}
    settings = [
        f"{key} was {value!r} and is {wanted.get(key)!r} now"
        for key, value in found.items()
        if value != wanted.get(key)
    ]
    changed = [
        _change(name, known[name], value)
        for name, value in inputs.items()
        if known.get(name, value) != value
        # Once all is computed, another version only writes it, and may be the one that can.
        and not (name.startswith(VERSION_OF) and trained_file(config).exists())
    ]
    return settings, changed


def _change(name: str, found: str, wanted: str) -> str:
    if name.startswith(VERSION_OF):
        return f"{name} changed from {found} to {wanted}"
    return f"{name} changed (fingerprint {found[:8]}, now {wanted[:8]})"


def _flat(plain: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in plain.items():
        if key == "weight_bits":  # whose order counts
            yield prefix + key, [*value.items()]
        elif isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value

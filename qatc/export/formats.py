"""Export: an output in a format that another runtime loads.

======================  ==========================  ===============================================
format                  loads in                    written by
======================  ==========================  ===============================================
``compressed-tensors``  transformers, vLLM          :mod:`qatc.output.compressed_tensors`
======================  ==========================  ===============================================

Every format stores the codes and scales of training as they are; none is quantized again.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from qatc.errors import ConfigError
from qatc.output.directory import copy_companions, own_metadata, write_model
from qatc.output.reading import (
    load_codes,
    load_float_state,
    read_config,
    read_metadata,
    read_recipe,
)
from qatc.storage.directories import complete_directory, refuse_existing, refuse_overlap
from qatc.storage.locks import locked

FORMATS: dict[str, Callable[..., None]] = {
    "compressed-tensors": partial(write_model, portable=True)
}
"""Writers of an empty directory by the name of the format, called as :func:`write_model` is."""


def export(
    source: Path,
    output: Path,
    *,
    format: str = "compressed-tensors",
    overwrite: bool = False,
    verify: Callable[[Path], None] | None = None,
    trust_remote_code: bool = False,
) -> Path:
    """Write the qatc output ``source`` in a format (a key of :data:`FORMATS`); return ``output``.

    The output is complete or, when anything is raised, as it was. ``verify`` is called with the
    source before anything is written, and raises if it is not to be exported.

    Raises:
        ConfigError: the format is unknown, ``output`` exists or would replace ``source``, or the
            model has code of its own, and ``trust_remote_code`` is false.
        CheckpointError: ``source`` cannot be read or ``output`` cannot be written.
    """
    if format not in FORMATS:
        raise ConfigError(f"unknown format {format!r}; valid formats: {', '.join(FORMATS)}")
    refuse_overlap({"the output": output}, {"the source": source})
    with locked(output):
        refuse_existing(output, overwrite)
        _export(source, output, format, overwrite, verify, trust_remote_code)
    return output


def _export(
    source: Path,
    output: Path,
    format: str,
    overwrite: bool,
    verify: Callable[[Path], None] | None,
    trust_remote_code: bool,
) -> None:
    metadata, recipe = read_metadata(source), read_recipe(source)
    config = read_config(source, trust_remote_code=trust_remote_code)
    if verify is not None:
        verify(source)
    weights, state = load_codes(source), load_float_state(source)
    with complete_directory(output, overwrite=overwrite) as staging:
        copy_companions(source, staging)
        FORMATS[format](
            staging,
            config=config,
            state=state,
            weights=weights,
            recipe=recipe,
            metadata=own_metadata(metadata),
            trust_remote_code=trust_remote_code,
        )

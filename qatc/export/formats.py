"""The formats that an output can be exported to, and the export itself.

Every format is one file beside this one, see :class:`qatc.export.base.Format`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from qatc.errors import ConfigError
from qatc.export.base import Format
from qatc.export.compressed_tensors import COMPRESSED_TENSORS
from qatc.export.executorch.format import EXECUTORCH
from qatc.export.gguf.format import GGUF
from qatc.export.pt2.format import AOTI, PT2
from qatc.export.torchao import TORCHAO
from qatc.export.vllm.format import VLLM, VLLM_MARLIN
from qatc.output import Output, open_output
from qatc.progress import Observer
from qatc.storage.directories import complete_directory, refuse_existing, refuse_overlap
from qatc.storage.locks import locked

FORMATS: dict[str, Format] = {
    format.name: format
    for format in (
        *(COMPRESSED_TENSORS, TORCHAO, VLLM, VLLM_MARLIN, GGUF),
        *(PT2, AOTI, EXECUTORCH),
    )
}
"""By name."""


def export(
    source: Path,
    output: Path,
    *,
    format: str = "compressed-tensors",
    overwrite: bool = False,
    verify: Callable[[Output], None] | None = None,
    trust_remote_code: bool = False,
    observer: Observer | None = None,
) -> Path:
    """Write the qatc output ``source`` in a format (a key of :data:`FORMATS`); return ``output``.

    The output is complete or, when anything is raised, as it was. ``verify`` is called with the
    opened source before anything is written, and raises if it is not to be exported. ``observer``
    is told of what takes long.

    Raises:
        ConfigError: the format is unknown or cannot hold the model, ``output`` exists or would
            replace ``source``, or the model has code of its own, and ``trust_remote_code`` is
            false.
        CheckpointError: ``source`` cannot be read or ``output`` cannot be written.
    """
    if format not in FORMATS:
        raise ConfigError(f"unknown format {format!r}; valid formats: {', '.join(FORMATS)}")
    refuse_overlap({"the output": output}, {"the source": source})
    with locked(output):
        refuse_existing(output, overwrite)
        model = open_output(source, trust_remote_code=trust_remote_code)
        if verify is not None:
            verify(model)
        with complete_directory(output, overwrite=overwrite) as staging:
            FORMATS[format].write(model, staging, observer or Observer())
    return output

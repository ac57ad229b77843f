"""PyTorch's own format: the lowered model as programs that torch runs, and needs nothing else for.

There are two programs, one for a prompt and one for a single token behind it, see
:mod:`qatc.export.pt2.capture`. ``pt2`` stores them as they are (``torch.export.save``), which takes
no compiler and runs on any machine and device; ``aoti`` compiles them for this machine's processor
(AOTInductor). Uncompiled they give the bits of :func:`qatc.load`, where its kernels compute on
integers; what Inductor compiles sums floats in another order.

They cannot hold inputs that are rotated at run time and layers with a sliding window, which are
refused, nor more than one sequence at a time.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qatc.errors import CheckpointError, ConfigError, DataError
from qatc.export.base import Format, context_of, refuse_windows
from qatc.export.programs import capture_errors, card_of, commands, notes_on_text, write_beside
from qatc.export.pt2 import generate
from qatc.export.pt2.capture import PHASES, Steps
from qatc.graph import compilation
from qatc.numerics import packing
from qatc.numerics.minmax import COMPILE_OPTIONS
from qatc.output import Output, QuantizedWeight
from qatc.output.compressed_tensors import refuse_rotated
from qatc.passes.lower_linear import PACKED, SCALE
from qatc.progress import Observer
from qatc.recipe.spec import read_spec_arg, spec_arg
from qatc.storage.directories import EXPORT_FILE
from qatc.storage.files import read_json

_PACKAGE = "model.pt2"
_PREFIX = "model."
"""Before the names of tensors in a program: the module that is captured holds the model."""


def write_exported(output: Output, directory: Path, observer: Observer) -> None:
    """Write an opened output into an empty directory, as it is captured."""
    notes = _notes(output, "pt2")
    steps = Steps(output)
    for phase in PHASES:
        observer.stage(f"capture {phase}")
        torch.export.save(steps.program(phase), directory / f"{phase}.pt2")
    _write_beside(output, steps, directory, "pt2", notes)


def write_compiled(output: Output, directory: Path, observer: Observer) -> None:
    """Write an opened output into an empty directory, compiled; the weights are stored once."""
    notes = _notes(output, "aoti")  # refuses before what takes minutes
    steps = Steps(output, to_compile=True)
    with capture_errors("AOTInductor cannot compile the model:", "--format pt2 compiles nothing"):
        _compile(steps, directory / _PACKAGE, observer)
    _write_beside(output, steps, directory, "aoti", notes)


def _compile(steps: Steps, path: Path, observer: Observer) -> None:
    from torch._inductor import aot_compile
    from torch._inductor.package.package import package_aoti

    options = {
        "aot_inductor.package": True,
        "aot_inductor.package_constants_in_so": False,
        "aot_inductor.package_constants_on_disk_format": "pickle_weights",
        **COMPILE_OPTIONS,
    }
    files: dict[str, Any] = {}
    with torch.no_grad():
        for phase in PHASES:
            observer.stage(f"capture {phase}")
            program = steps.program(phase)
            observer.stage(f"compile {phase}")
            assert program.example_inputs is not None
            files[phase] = aot_compile(program.module(), *program.example_inputs, options=options)
    package_aoti(str(path), files)


def _write_beside(
    output: Output, steps: Steps, directory: Path, format: str, notes: Sequence[str]
) -> None:
    told = {
        "format": format,
        "torch_version": torch.__version__,
        "same": steps.same,
        "cache": [[c.heads, c.width, str(c.dtype).removeprefix("torch.")] for c in steps.cache],
        "weights": {
            name: [spec_arg(weight.spec), weight.codes.shape[1]]
            for name, weight in output.weights.items()
        },
    }
    compiled = format == "aoti"
    card = card_of(
        output,
        kind="compiled by AOTInductor" if compiled else "exported by torch.export",
        about=f"Programs of torch {torch.__version__} with the codes and scales that qatc made",
        packages=[f"torch=={_torch_version()}" if compiled else "torch"],
        notes=notes,
    )
    write_beside(output, directory, Path(generate.__file__), told, card)


def _torch_version() -> str:
    """Without what it was built for."""
    return torch.__version__.partition("+")[0]


def _notes(output: Output, format: str) -> list[str]:
    refuse_rotated(output.recipe, "a program of torch")
    refuse_windows(output, "torch", context_of(output))
    found = [
        "one sequence at a time; as many tokens as the cache that it is given has slots",
        *notes_on_text(output),
    ]
    if format == "pt2":
        return [*found, "each of the two programs holds all weights"]
    if (obstacle := compilation.obstacle("cpu")) is not None:
        raise ConfigError(f"AOTInductor cannot compile here: {obstacle}; --format pt2 takes none")
    return [*found, f"compiled for this machine's processor, and for torch {_torch_version()}"]


def read(directory: Path) -> dict[str, QuantizedWeight]:
    """The quantized weights of a directory that one of the formats wrote, by name.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    try:
        told = read_json(directory / EXPORT_FILE)
        stored = _stored(directory, told["format"], told.get("same", {}))
        return {name: _weight(stored, name, *how) for name, how in told["weights"].items()}
    except (DataError, OSError, RuntimeError, KeyError, ValueError) as error:
        raise CheckpointError(
            f"{directory} is damaged, or holds no programs of qatc ({error}); export it again"
        ) from error


def _weight(stored: Mapping[str, Tensor], name: str, told: str, width: int) -> QuantizedWeight:
    spec = read_spec_arg(told)
    packed, scale = (stored[name + suffix].detach() for suffix in (PACKED, SCALE))
    return QuantizedWeight(packing.unpack(packed, spec.bits, width), scale, spec)


def _stored(directory: Path, format: str, same: Mapping[str, str]) -> dict[str, Tensor]:
    """The tensors of the programs by the names of transformers.

    A package has what two of them share, as tied ends do, under whichever name.
    """
    if format == "pt2":
        state: Mapping[str, Tensor] = torch.export.load(directory / "decode.pt2").state_dict
    else:
        state = _of_package(directory / _PACKAGE)
    found = {name.removeprefix(_PREFIX): tensor for name, tensor in state.items()}
    shared = {other: found[name] for name, other in same.items() if name in found}
    return shared | found


def _of_package(path: Path) -> dict[str, Tensor]:
    from torch.export.pt2_archive._package import PT2ArchiveReader

    with PT2ArchiveReader(str(path)) as archive:
        places = json.loads(archive.read_string("data/aotinductor/decode/weights_config.json"))
        files = {name: archive.read_bytes(f"data/weights/{own[0]}") for name, own in places.items()}
    return {
        name: torch.load(io.BytesIO(files[name])).as_strided(*how)
        for name, (_, *how) in places.items()
    }


PT2 = Format("pt2", "torch", write_exported, read, partial(_notes, format="pt2"), commands)
AOTI = Format(
    "aoti", "torch, on this machine", write_compiled, read, partial(_notes, format="aoti"), commands
)

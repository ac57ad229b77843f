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
import shlex
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import qatc
from qatc.errors import CheckpointError, ConfigError, DataError
from qatc.export.base import Format, context_of, copy_tokenizer, end_tokens, refuse_windows
from qatc.export.pt2 import generate
from qatc.export.pt2.capture import PHASES, Steps
from qatc.graph import compilation
from qatc.models.cards import CARD
from qatc.numerics import packing
from qatc.numerics.minmax import COMPILE_OPTIONS
from qatc.output import Output, QuantizedWeight
from qatc.output.compressed_tensors import refuse_rotated
from qatc.output.model_card import base_name, provenance, recipe_rows, table
from qatc.passes.lower_linear import PACKED, SCALE
from qatc.recipe.spec import read_spec_arg, spec_arg
from qatc.storage.directories import EXPORT_FILE
from qatc.storage.files import read_json, write_atomically, write_json

SCRIPT = Path(generate.__file__)
_PACKAGE = "model.pt2"
_PREFIX = "model."
"""Before the names of tensors in a program: the module that is captured holds the model."""


def write_exported(output: Output, directory: Path) -> None:
    """Write an opened output into an empty directory, as it is captured."""
    steps = Steps(output)
    for phase in PHASES:
        torch.export.save(steps.program(phase), directory / f"{phase}.pt2")
    _write_rest(output, steps, directory, "pt2")


def write_compiled(output: Output, directory: Path) -> None:
    """Write an opened output into an empty directory, compiled; the weights are stored once."""
    from torch._inductor import aot_compile
    from torch._inductor.package.package import package_aoti

    steps = Steps(output)
    options = {
        "aot_inductor.package": True,
        "aot_inductor.package_constants_in_so": False,
        "aot_inductor.package_constants_on_disk_format": "pickle_weights",
        **COMPILE_OPTIONS,
    }
    files: dict[str, Any] = {}
    with torch.no_grad():
        for phase in PHASES:
            program = steps.program(phase)
            assert program.example_inputs is not None
            files[phase] = aot_compile(
                program.module(),
                *program.example_inputs,
                options=options,
            )
    package_aoti(str(directory / _PACKAGE), files)
    _write_rest(output, steps, directory, "aoti")


def _write_rest(output: Output, steps: Steps, directory: Path, format: str) -> None:
    """What the programs need besides: how they are called, the tokenizer, the card."""
    told = {
        "format": format,
        "files": sorted(path.name for path in directory.iterdir()),
        "recipe": output.recipe.to_dict(),
        "qatc_version": qatc.__version__,
        "torch_version": torch.__version__,
        "cache": [[c.heads, c.width, str(c.dtype).removeprefix("torch.")] for c in steps.cache],
        "ends": end_tokens(output),
        "weights": {
            name: [spec_arg(weight.spec), weight.codes.shape[1]]
            for name, weight in output.weights.items()
        },
    }
    write_json(directory / EXPORT_FILE, told)
    copy_tokenizer(output, directory)
    shutil.copyfile(SCRIPT, directory / SCRIPT.name)
    write_atomically(directory / CARD, _card(output, format).encode(errors="backslashreplace"))


def _card(output: Output, format: str) -> str:
    metadata, recipe = output.metadata, output.recipe
    kind = "compiled by AOTInductor" if format == "aoti" else "exported by torch.export"
    sections = [
        f"# {base_name(metadata)} at {recipe.bits}, {kind}",
        f"Programs of torch {torch.__version__} with the codes and scales that qatc made;"
        f" `{SCRIPT.name}` shows how they are called.",
        f'## How to run it\n\n```\npip install torch tokenizers\npython {SCRIPT.name} "Once upon a'
        ' time"\n```',
        "\n".join(f"- {note}" for note in _notes(output, format)),
        "## What is quantized",
        table([["", ""], *recipe_rows(recipe.to_dict())]),
        *provenance(metadata),
    ]
    return "\n\n".join(sections) + "\n"


def _notes(output: Output, format: str) -> list[str]:
    refuse_rotated(output.recipe, "a program of torch")
    refuse_windows(output, "torch", context_of(output))
    found = ["one sequence at a time; as many tokens as the cache that it is given has slots"]
    if format == "pt2":
        return [*found, "each of the two programs holds all weights"]
    if (obstacle := compilation.obstacle()) is not None:
        raise ConfigError(f"AOTInductor cannot compile here: {obstacle}; --format pt2 takes none")
    version = torch.__version__.partition("+")[0]
    return [*found, f"compiled for this machine's processor, and for torch {version}"]


def read(directory: Path) -> dict[str, QuantizedWeight]:
    """The quantized weights of a directory that one of the formats wrote, by name.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    try:
        told = read_json(directory / EXPORT_FILE)
        stored = _stored(directory, told["format"])
        return {name: _weight(stored, name, *how) for name, how in told["weights"].items()}
    except (DataError, OSError, RuntimeError, KeyError, ValueError) as error:
        raise CheckpointError(
            f"{directory} is damaged, or holds no programs of qatc ({error}); export it again"
        ) from error


def _weight(stored: Mapping[str, Tensor], name: str, told: str, width: int) -> QuantizedWeight:
    spec = read_spec_arg(told)
    packed, scale = (stored[name + suffix].detach() for suffix in (PACKED, SCALE))
    return QuantizedWeight(packing.unpack(packed, spec.bits, width), scale, spec)


def _stored(directory: Path, format: str) -> dict[str, Tensor]:
    """The tensors of the programs by the names of transformers."""
    if format == "pt2":
        state: Mapping[str, Tensor] = torch.export.load(directory / "decode.pt2").state_dict
    else:
        state = _of_package(directory / _PACKAGE)
    return {name.removeprefix(_PREFIX): tensor for name, tensor in state.items()}


def _of_package(path: Path) -> dict[str, Tensor]:
    from torch.export.pt2_archive._package import PT2ArchiveReader

    with PT2ArchiveReader(str(path)) as archive:
        places = json.loads(archive.read_string("data/aotinductor/decode/weights_config.json"))
        files = {name: archive.read_bytes(f"data/weights/{own[0]}") for name, own in places.items()}
    return {
        name: torch.load(io.BytesIO(files[name])).as_strided(*how)
        for name, (_, *how) in places.items()
    }


def commands(output: Output, directory: Path) -> list[str]:
    """How the programs are run."""
    return [f'python {shlex.quote(str(directory / SCRIPT.name))} "Once upon a time"']


PT2 = Format("pt2", "torch", write_exported, read, partial(_notes, format="pt2"), commands)
AOTI = Format(
    "aoti", "torch, on this machine", write_compiled, read, partial(_notes, format="aoti"), commands
)

"""What formats share that are programs, which a script beside them runs: see pt2, executorch."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._dynamo import config as dynamo_config
from torch.export import ExportedProgram

import qatc
from qatc.errors import CaptureError, QatcError
from qatc.export.base import TOKENIZER, copy_tokenizer, end_tokens
from qatc.models.cards import CARD
from qatc.output import Output
from qatc.output.model_card import base_name, provenance, recipe_rows, table
from qatc.storage.directories import EXPORT_FILE
from qatc.storage.files import write_atomically, write_json

SCRIPT = "generate.py"
"""The name of the script; it stands alone, so each format has one, with the same ``main``."""


@contextmanager
def capture_errors(failure: str, way_out: str) -> Iterator[None]:
    """Raise what torch and its like raise, which is of many kinds, as ``CaptureError``.

    Args:
        failure: what did not work, with a colon, for the message.
        way_out: what to do instead, likewise.
    """
    try:
        yield
    except QatcError:
        raise
    except Exception as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), "")
        raise CaptureError(
            f"{failure} {type(error).__name__}: {reason.strip()[:400]}; {way_out}"
        ) from error


def capture(
    module: nn.Module, example: tuple[Any, ...], shapes: tuple[Any, ...]
) -> ExportedProgram:
    """A module as one program.

    Args:
        module: a function of tensors, or of lists of them.
        example: arguments.
        shapes: the dimensions of each that are free, as ``torch.export.export`` takes them.

    Raises:
        CaptureError: torch cannot export the module.
    """
    failure = "torch cannot export the model as one graph:"
    # As in qatc.graph.capture: symbols of an earlier capture are none of this one.
    fresh = dynamo_config.patch(fake_tensor_cache_enabled=False)
    with capture_errors(failure, "run it by qatc.load"), torch.no_grad(), fresh:
        exported = torch.export.export(module, example, dynamic_shapes=shapes, strict=False)
    return exported


def write_beside(
    output: Output, directory: Path, script: Path, told: Mapping[str, Any], card: str
) -> None:
    """Write what programs need besides, into the directory that holds them and nothing else yet.

    Args:
        output: opened.
        directory: of the programs.
        script: shows how they are called.
        told: what it, and who reads the weights back, must know of them.
        card: a model card, see :func:`card_of`.
    """
    common = {
        "files": sorted(path.name for path in directory.iterdir()),
        "recipe": output.recipe.to_dict(),
        "qatc_version": qatc.__version__,
        "ends": end_tokens(output),
    }
    write_json(directory / EXPORT_FILE, {**told, **common})
    copy_tokenizer(output, directory)
    shutil.copyfile(script, directory / SCRIPT)
    write_atomically(directory / CARD, card.encode(errors="backslashreplace"))


def card_of(
    output: Output, *, kind: str, about: str, packages: Sequence[str], notes: Sequence[str]
) -> str:
    """A model card.

    Args:
        output: opened.
        kind: of program, for the title.
        about: a sentence on what was written.
        packages: what the script takes from PyPI, besides the tokenizer's.
        notes: what a user should know, a line each.
    """
    metadata, recipe = output.metadata, output.recipe
    install = f"pip install {' '.join(packages)}"
    if _has_tokenizer(output):
        install += f' tokenizers\npython {SCRIPT} "Once upon a time"'
    sections = [
        f"# {base_name(metadata)} at {recipe.bits}, {kind}",
        f"{about}; `{SCRIPT}` shows the calls.",
        f"## How to run it\n\n```\n{install}\n```",
        "\n".join(f"- {note}" for note in notes),
        "## What is quantized",
        table([["", ""], *recipe_rows(recipe.to_dict())]),
        *provenance(metadata),
    ]
    return "\n\n".join(sections) + "\n"


def notes_on_text(output: Output) -> list[str]:
    """What a user should know of how the script reads a prompt."""
    if _has_tokenizer(output):
        return []
    return [
        f"the model has no {TOKENIZER}, so {SCRIPT} cannot read a prompt; its Model takes the ids"
        " of tokens"
    ]


def commands(output: Output, directory: Path) -> list[str]:
    """How the programs are run; nothing where the script could not read a prompt."""
    if not _has_tokenizer(output):
        return []
    return [f'python {shlex.quote(str(directory / SCRIPT))} "Once upon a time"']


def _has_tokenizer(output: Output) -> bool:
    return (output.place / TOKENIZER).is_file()

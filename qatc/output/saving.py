"""Save a model that runs on integers as the output that it came from, without quantizing again."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qatc.errors import ConfigError
from qatc.numerics import packing
from qatc.output.codes import QuantizedWeight
from qatc.output.contents import Output
from qatc.output.directory import copy_companions, digest_of, write_output
from qatc.passes.lower_linear import PACKED, SCALE
from qatc.recipe.recipe import Recipe
from qatc.recipe.spec import QuantSpec
from qatc.storage.directories import complete_directory

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_MEASURED = ("figures", "parity", "memory", "kernels")
"""What ``qatc.json`` says of the very model that was written, and of no other."""

_REPORTS = ("report.md", "loss.png", "metrics.jsonl", "blockwise.jsonl")


@dataclass(frozen=True)
class Origin:
    """What a loaded model came from, as far as its tensors do not tell.

    Attributes:
        directory: where it was loaded from.
        metadata: its ``qatc.json``.
        recipe: what it was trained with.
        packed: spec and number of columns of every packed weight, by parameter name.
        dtypes: dtypes of the other tensors as they were stored.
        trust_remote_code: whether the model runs its own code.
    """

    directory: Path
    metadata: Mapping[str, Any]
    recipe: Recipe
    packed: Mapping[str, tuple[QuantSpec, int]]
    dtypes: Mapping[str, torch.dtype]
    trust_remote_code: bool

    @classmethod
    def of(cls, output: Output) -> Origin:
        """What is to be remembered of an opened output: not its tensors."""
        weights = output.weights.items()
        return cls(
            output.place,
            output.metadata,
            output.recipe,
            {name: (weight.spec, weight.codes.shape[1]) for name, weight in weights},
            {name: value.dtype for name, value in output.state.items()},
            output.trust_remote_code,
        )


def make_saveable(model: PreTrainedModel, origin: Origin) -> None:
    """Give a loaded model a ``save_pretrained`` that writes all of it.

    That of transformers knows parameters by their names only, and would leave out packed ones.
    """
    # A partial rather than a method: deepcopy binds it to the copied model.
    model.save_pretrained = partial(save_loaded, model, origin)  # type: ignore[method-assign]


def save_loaded(
    model: PreTrainedModel,
    origin: Origin,
    save_directory: Path | str,
    *,
    max_shard_size: int | str = "5GB",
    **options: Any,
) -> None:
    """Write a loaded model as an output that :func:`qatc.load` reads bit for bit.

    Codes, scales and all other tensors are those that the model holds. Tokenizer and report are
    copied from the directory that it was loaded from; the report and the figures only if no tensor
    has changed since.

    Args:
        model: from :func:`qatc.load`.
        origin: what that noted about it.
        save_directory: a directory that does not exist yet, or is empty.
        max_shard_size: larger models are split into files of this many bytes, or e.g. ``"2GB"``.
        options: further options of transformers' method, at what they are by default.

    Raises:
        ConfigError: the directory exists and is not empty, or an option is not supported.
        CheckpointError: the disk is full or not writable.
    """
    asked = [f"{k}={v!r}" for k, v in options.items() if not _is_default(k, v)]
    if asked:
        raise ConfigError(
            f"a model that runs on integers cannot be saved with {', '.join(asked)};"
            " save_pretrained(DIRECTORY) writes all of it"
        )
    directory, state = Path(save_directory), _float_state(model, origin)
    wanted = origin.metadata["float_digests"]
    changed = [n for n, digest in wanted.items() if n in state and digest_of(state[n]) != digest]
    stale = _MEASURED if changed else ()
    metadata = {key: value for key, value in origin.metadata.items() if key not in stale}
    if directory.is_dir() and not any(directory.iterdir()):
        directory.rmdir()
    with complete_directory(directory) as staging:
        if origin.directory.is_dir():
            copy_companions(origin.directory, staging)
            for name in _REPORTS if changed else ():
                (staging / name).unlink(missing_ok=True)
        else:
            warnings.warn(
                f"{origin.directory}, which the model was loaded from, is gone: {directory} gets"
                " no tokenizer; save one there",
                stacklevel=2,
            )
        output = Output(
            model.config,
            origin.recipe,
            quantized_weights(model, origin),
            state,
            metadata,
            model.generation_config,
            origin.trust_remote_code,
        )
        write_output(staging, output, max_shard_bytes=_bytes(max_shard_size))


def quantized_weights(model: nn.Module, origin: Origin) -> dict[str, QuantizedWeight]:
    """The codes and scales that a loaded model holds, by parameter name."""
    held = dict(model.named_buffers(remove_duplicate=False))
    found = {}
    for name in [n.removesuffix(PACKED) for n in held if n.endswith(PACKED)]:
        packed = held[name + PACKED]
        # A tied weight is held under several names, and was stored under one of them.
        stored = name if name in origin.packed else _twin(packed, held, origin)
        spec, width = origin.packed[stored]
        codes = packing.unpack(packed, spec.bits, width)
        found[name] = QuantizedWeight(codes, held[name + SCALE], spec)
    return found


def _twin(packed: Tensor, held: Mapping[str, Tensor], origin: Origin) -> str:
    return next(name for name in origin.packed if held.get(name + PACKED) is packed)


def _float_state(model: nn.Module, origin: Origin) -> dict[str, Tensor]:
    """What is not packed, in the dtype in which it was stored if that loses nothing."""
    state = {}
    for name, value in model.state_dict().items():
        if name.endswith((PACKED, SCALE)):
            continue
        stored = value.to(origin.dtypes.get(name, value.dtype))
        state[name] = stored if torch.equal(stored.to(value.dtype), value) else value
    return state


def _is_default(name: str, value: Any) -> bool:
    on = ("is_main_process", "safe_serialization", "save_peft_format", "save_original_format")
    return value is True if name in on else value in (None, False)


def _bytes(size: int | str) -> int:
    if isinstance(size, int):
        return size
    match = re.fullmatch(r"(\d+)\s*([KMGT]?)B", size.strip(), re.IGNORECASE)
    if match is None:
        raise ConfigError(f"max_shard_size takes a number of bytes, or e.g. '5GB'; got {size!r}")
    thousands = " KMGT".index(match[2].upper() or " ")
    return int(match[1]) * int(1000**thousands)

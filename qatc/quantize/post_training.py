"""The stage of a run between its baselines and its training: post-training methods."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from qatc.data.corpus import Rows
from qatc.errors import CheckpointError
from qatc.models.vocabulary import are_tied, find_ends
from qatc.ptq import apply, parse_method, untie_head
from qatc.quantize.given import Setting
from qatc.quantize.pair import Pair, change_student
from qatc.storage.directories import complete_directory

_FILE = "student.safetensors"
_SCALE = "start scale of "
"""What the name of a scale's tensor begins with: no parameter is called so."""


def apply_method(setting: Setting, pair: Pair, rows: Rows) -> Pair:
    """Change the student by the post-training methods of the run; the teacher stays as it is.

    The result is kept with the run, which goes on from there.

    Raises:
        ConfigError: the model is not built as a method needs it.
        CheckpointError: the result cannot be kept, or what was kept is damaged.
    """
    config = setting.config
    method, kept = parse_method(config.method), config.partial / "post-training"
    if not method.steps:
        return pair
    was_tied = are_tied(find_ends(pair.student))

    def change(student: Any) -> dict[str, Tensor]:
        if kept.exists():
            return _take_up(student, kept)
        some = rows[: config.calibration_rows]
        setting.observer.stage(f"Calibrating {method.name} on {len(some)} rows")
        scales = apply(
            method, student, some, config.recipe, seed=config.training.seed,
            batch_size=config.training.batch_size,
        )  # fmt: skip
        _keep(student, scales, kept)
        return scales

    changed = change_student(setting, pair, change)
    if was_tied and not are_tied(find_ends(changed.student)):
        setting.observer.note(
            "head and embedding, which were one weight, are two: the norm before the head is folded"
            " into the head alone"
        )
    return changed


def _keep(student: Any, scales: dict[str, Tensor], place: Path) -> None:
    from safetensors.torch import save_file

    tensors = {name: p.detach().contiguous() for name, p in student.named_parameters()}
    tensors |= {_SCALE + name: scale.contiguous() for name, scale in scales.items()}
    with complete_directory(place) as staging:
        try:
            save_file(tensors, staging / _FILE)
        except Exception as error:  # safetensors raises its own error for a full disk
            raise CheckpointError(
                f"cannot write {place}: {error}; free some space and run the same command again"
            ) from error


def _take_up(student: Any, place: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    device = next(student.parameters()).device
    try:
        tensors = load_file(place / _FILE, device=str(device))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{place / _FILE} is damaged ({error}); remove the directory {place} and run the same"
            " command again"
        ) from error
    scales = {n.removeprefix(_SCALE): tensors.pop(n) for n in [*tensors] if n.startswith(_SCALE)}
    if len(tensors) > len(dict(student.named_parameters())):
        untie_head(student)
    for name, parameter in student.named_parameters():
        parameter.data = tensors[name]
    return scales

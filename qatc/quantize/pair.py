"""The second stage of a run: the teacher, and the student with the quantized graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from qatc.data.corpus import Rows
from qatc.divided.hold import is_released, release
from qatc.divided.load import load_divided
from qatc.errors import ConfigError
from qatc.evaluation.metrics import Metrics, evaluate
from qatc.graph import compilation
from qatc.machine.device import release_memory
from qatc.machine.world import current
from qatc.models import LoadedModel, load_model
from qatc.models.pipelines import why_no_integer_forward
from qatc.models.preparation import prepare, prepared_state, quantized_specs, restore
from qatc.models.scales import of_attention, of_weight
from qatc.models.support import refuse_idle_patterns
from qatc.models.vocabulary import tying_note
from qatc.quantize.given import Setting
from qatc.recipe.recipe import Recipe
from qatc.recipe.spec import QuantSpec
from qatc.training.sharding import own_rows


@dataclass(frozen=True, eq=False)
class Loaded:
    """Both models as they were loaded.

    Attributes:
        student: with masters in the dtype that is trained.
        teacher: in the compute dtype.
        stored: dtype of the checkpoint.
        inputs: the fingerprint of the model by what it is called in a message.
        place: the device of the teacher.
    """

    student: Any
    teacher: LoadedModel
    stored: torch.dtype
    inputs: Mapping[str, str]
    place: str


@dataclass(frozen=True, eq=False)
class Pair:
    """Both models, ready to train.

    Attributes:
        student: prepared, with masters in the dtype that is trained.
        teacher: in the compute dtype.
        stored: dtype of the checkpoint, and of what is not quantized in the output.
        compute: dtype that both compute in.
        integer_forward: whether the student computes its quantized linears on integers.
        quantized: the weights that are quantized by name, and how.
        place: the device of the teacher, whether it is there or dropped for a while.
    """

    student: Any
    teacher: LoadedModel
    stored: torch.dtype
    compute: torch.dtype
    integer_forward: bool
    quantized: Mapping[str, QuantSpec]
    place: str

    def autocast(self) -> AbstractContextManager[Any]:
        """What the student is run under."""
        if self.compute is torch.float32:
            return nullcontext()
        device = next(self.student.parameters()).device
        return torch.autocast(device.type, dtype=self.compute)


def load_models(setting: Setting, compute: torch.dtype, in_host: bool = False) -> Loaded:
    """Load the model twice.

    Args:
        setting: the run.
        compute: dtype of the teacher.
        in_host: keep the teacher in the host's memory, where it answers too: it writes and records
            nothing any more. Divided, it has room on the devices.

    Raises:
        QatcError: it cannot be loaded.
    """
    config = setting.config

    masters = torch.bfloat16 if config.training.master_dtype == "bfloat16" else torch.float32
    if masters is not torch.float32 and compute is not masters:
        raise ConfigError(
            f"masters in bfloat16 need a run that computes in it, and this one computes in"
            f" {str(compute).removeprefix('torch.')}: pass --dtype bfloat16, or leave"
            " --master-dtype at float32"
        )
    place = "cpu" if in_host and not setting.divided else setting.device
    student, teacher = _load(setting, masters, setting.device), _load(setting, compute, place)
    inputs = {f"the model {config.model}": student.fingerprint}
    if not setting.compile:
        asked = config.compile is False
        why = compilation.obstacle(torch.device(setting.device).type)
        reason = "as --no-compile asks" if asked else f"as {why}: slower"
        setting.observer.note(f"running uncompiled, {reason}")
    return Loaded(student.model, teacher, student.dtype, inputs, place)


def _load(setting: Setting, dtype: torch.dtype, device: str) -> LoadedModel:
    name, trust = setting.config.model, setting.config.trust_remote_code
    if not setting.divided:
        return load_model(name, dtype=dtype, device=device, trust_remote_code=trust)
    return load_divided(
        *(current(), name),
        dtype=dtype,
        device=device,
        trust_remote_code=trust,
        train_ends=setting.config.train_embeddings,
        note=setting.observer.note,
    )


def make_pair(setting: Setting, loaded: Loaded, compute: torch.dtype) -> Pair:
    """Put the quantized graph under the student and decide what is trained.

    Raises:
        QatcError: the model cannot be quantized so.
    """
    config, student = setting.config, loaded.student
    refuse_idle_patterns(student, config.recipe)
    # Weights that have still to be turned are rounded, for the baseline, without a rotation.
    _prepare(setting, student, replace(config.recipe, rotate_inputs=()), compute)
    on_integers = prepared_state(student).integer_forward
    if not on_integers:
        obstacle = why_no_integer_forward(config.recipe, torch.device(setting.device))
        setting.observer.note(f"linears computed in float: {obstacle or 'as asked'}")
    if (note := tying_note(student, config.recipe)) is not None:
        setting.observer.note(note)
    if not (config.train_embeddings or setting.divided):
        _share_embeddings(student, loaded.teacher.model)
    quantized = quantized_specs(student)
    stored, place = loaded.stored, loaded.place
    return Pair(student, loaded.teacher, stored, compute, on_integers, quantized, place)


def change_student(
    setting: Setting, pair: Pair, change: Callable[[Any], Mapping[str, Tensor]]
) -> Pair:
    """Change the plain student under the quantized graph, which is put on it again.

    Args:
        setting: the run.
        pair: whose student is changed in place.
        change: takes the student with layers of its own, and gives where learned scales start.
    """
    student = plain_student(pair)
    starts = change(student)
    return prepare_again(setting, pair, student, setting.config.recipe, starts)


def plain_student(pair: Pair) -> Any:
    """The student with layers of its own, until it is prepared again."""
    return restore(pair.student)


def prepare_again(
    setting: Setting,
    pair: Pair,
    student: Any,
    recipe: Recipe,
    start_scales: Mapping[str, Tensor] | None = None,
) -> Pair:
    """Put the quantized graph of a recipe under the plain student of a pair."""
    _prepare(setting, student, recipe, pair.compute, start_scales)
    return replace(pair, quantized=quantized_specs(student))


def _prepare(
    setting: Setting,
    student: nn.Module,
    recipe: Recipe,
    compute: torch.dtype,
    start_scales: Mapping[str, Tensor] | None = None,
) -> None:
    masters = next(student.parameters()).dtype
    prepare(
        student,
        recipe,
        compile=setting.compile,
        # Learned scales and centers are in fp32, whatever the masters.
        compute_dtype=None if compute is masters is torch.float32 else compute,
        integer_forward=setting.config.integer_forward,
        start_scales=start_scales,
        checkpoint_activations=setting.config.training.checkpoint_activations,
    )


def _share_embeddings(student: nn.Module, teacher: nn.Module) -> None:
    """Freeze the student's embeddings and head, and let them use the teacher's memory."""
    for get in ("get_input_embeddings", "get_output_embeddings"):
        own, source = getattr(student, get)(), getattr(teacher, get)()
        if own is None:
            continue
        own.weight.requires_grad_(False)
        alike = own.weight.dtype, own.weight.device
        if alike == (source.weight.dtype, source.weight.device):
            own.weight.data = source.weight.data


def drop_teacher(pair: Pair) -> None:
    """Let go of the memory of a teacher that is not run for a while, but for what is shared."""
    release(pair.teacher.model)
    release_memory(pair.place)  # the graphs that wrote the corpus refer to its weights in circles


def load_dropped_teacher(setting: Setting, pair: Pair) -> Pair:
    """The pair with its teacher loaded again, if it was dropped."""
    if not is_released(pair.teacher.model):
        return pair
    teacher = _load(setting, pair.compute, pair.place)
    if not (setting.config.train_embeddings or setting.divided):
        _share_embeddings(pair.student, teacher.model)
    return replace(pair, teacher=teacher)


def evaluate_one(setting: Setting, pair: Pair, model: nn.Module, rows: Rows) -> Metrics:
    """Measure student or teacher on rows, against the teacher."""
    return evaluate(
        model,
        rows,
        teacher=pair.teacher.model,
        batch_size=setting.config.training.batch_size,
        autocast=pair.autocast if model is pair.student else nullcontext,
        compile=setting.compile,
        world=setting.world,
        on_progress=setting.observer.evaluated,
    )


@torch.no_grad()
def round_unquantized(pair: Pair) -> None:
    """Round what is stored in float to its stored dtype, so that what ships is evaluated."""
    # Of a tied weight that only one of its users quantizes, the other one stores the float.
    for name, parameter in pair.student.named_parameters(remove_duplicate=False):
        if name not in pair.quantized and not (of_weight(name) or of_attention(name)):
            own = own_rows(parameter)
            own.copy_(own.to(pair.stored).to(own.dtype))

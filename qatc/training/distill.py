"""Distillation: the student learns the teacher's whole distribution, token by token.

By default, the loss is the soft-label cross-entropy on the logits (LLM-QAT, arXiv 2305.17888,
equation 4),

    L = - (1/n) * sum over real tokens t, sum over vocabulary v, of p_T(v | t) log p_S(v | t)

averaged over the n real tokens of the step, so that it depends neither on the batch size nor on
the length; of conversations, over those that a token of an answer follows. Its gradient is that of
KL(teacher || student), which differs from it by the teacher's entropy and is what the logs show: it
is 0 for a perfect student. Other losses, and sums of them, are in :mod:`qatc.losses.objective`.

A run keeps everything that decides its future in its checkpoints (parameters, optimizer, random
state, step), so that a resumed run is the uninterrupted one, bit for bit on a CPU.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qatc.data.corpus import Rows, derived_seed
from qatc.errors import ConfigError, TrainingError
from qatc.losses.chunks import find_chunks
from qatc.losses.objective import distillation_losses, parse_loss, recorded_losses
from qatc.machine.device import send
from qatc.machine.signals import StopRequest
from qatc.machine.world import current
from qatc.models.preparation import prepare, restore
from qatc.models.regions import is_transformers_model
from qatc.recipe.recipe import Recipe
from qatc.training.checkpoint import Checkpoints
from qatc.training.config import StepMetrics, TrainingConfig, default_learning_rate, schedule
from qatc.training.optimizers import RoundingAdamW, StepInBackward, make_optimizer
from qatc.training.records import Records
from qatc.training.sharding import (
    check_batch,
    clip_gradients,
    device_of,
    own_share,
    require_sharded,
)

_UNQUANTIZED = "16-16-16"
"""Bits of what only has its layers compiled."""


class Distiller:
    """One distillation run.

    Args:
        student: the prepared model; parameters that require a gradient are trained.
        teacher: the full-precision model; of a config whose teacher is recorded, None will do.
        rows: the training corpus, packed, and with what is recorded of the teacher in that case.
        config: how to train.
        directory: where checkpoints and ``metrics.jsonl`` go.
        rounding_kl: KL of the untrained student, for the default learning rate.
        autocast: makes a context for the student's forward pass (bf16 compute over fp32 masters).
        compile: compile the loss with Inductor.
        note: is told what a user may want to know before the first step.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        rows: Rows,
        config: TrainingConfig,
        directory: Path,
        *,
        rounding_kl: float = 1.0,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
        compile: bool = False,
        note: Callable[[str], object] = lambda text: None,
    ) -> None:
        if len(rows) < config.batch_size:
            raise ConfigError(
                f"the corpus has {len(rows)} rows to train on, fewer than one batch of"
                f" {config.batch_size}; generate more, or lower --batch-size"
            )
        if (rows.recorded if config.teacher == "recorded" else teacher) is None:
            raise ConfigError(
                "there is no teacher to learn from; give it, or for teacher='recorded' rows with"
                " what is recorded of it (qatc.data.teacher_logits)"
            )
        self.world = current()
        check_batch(self.world, config.batch_size)
        self.student, self.teacher, self.rows, self.config = student, teacher, rows, config
        self.terms = parse_loss(config.loss)
        self.autocast, self.compile = autocast, compile
        self.device = device_of(student)
        few = torch.from_numpy(rows[:2].tokens[:, :16]).to(self.device, torch.long)
        tokens = config.batch_size // self.world.size * rows.tokens.shape[1]
        of = None if config.teacher == "recorded" else teacher
        self.chunks = find_chunks(
            *(student, of, few, config.loss_chunk, tokens), autocast=autocast, note=note
        )
        self.rate = config.learning_rate or default_learning_rate(_width(student), rounding_kl)
        self.trained = {n: p for n, p in student.named_parameters() if p.requires_grad}
        require_sharded(self.world, self.trained)
        self.optimizer = make_optimizer(self.trained, config, self.rate, compile)
        if config.offload != "none" and self.device.type == "cpu":
            note(f"all is in host memory anyway: --offload {config.offload} saves nothing")
        self.in_backward: StepInBackward | None = None
        if config.fused_step:
            assert isinstance(self.optimizer, RoundingAdamW)
            self.in_backward = StepInBackward(self.optimizer, self.trained, config.gradient_clip)
        aside = self.world.size > 1 or self.device.type != "cpu"
        self.checkpoints = Checkpoints(directory / "checkpoints", config.keep_checkpoints, aside)
        self.records = Records(directory / "metrics.jsonl", StepMetrics)

    @property
    def history(self) -> list[StepMetrics]:
        """Every step so far."""
        return self.records.history

    def run(self, on_step: Callable[[StepMetrics], None] | None = None) -> list[StepMetrics]:
        """Train from the last checkpoint, if there is one, to the end.

        Raises:
            TrainingError: the loss is not a number or diverges; the last good checkpoint is kept.
            KeyboardInterrupt: after Ctrl-C or another signal to end, once a checkpoint is written.
            CheckpointError: a checkpoint is damaged or cannot be written.
        """
        try:
            return self._run(on_step)
        finally:
            if self.in_backward is not None:
                self.in_backward.remove()
            self.checkpoints.close()

    def _run(self, on_step: Callable[[StepMetrics], None] | None) -> list[StepMetrics]:
        step = self._resume()
        with StopRequest() as stop:
            while step < self.config.steps:
                step += 1
                record = self.step(step)
                self.checkpoints.settle()
                self._check(record)
                self.records.add(record)
                if on_step is not None:
                    on_step(record)
                stopped = stop.agree(self.world.greatest)
                ended = step == self.config.steps
                if stopped or ended or step % self.config.checkpoint_every == 0:
                    self._save(step)
                if stopped:
                    break
            self.world.on_each(self.checkpoints.wait)
            if stop.requested:
                stop.obey()
        return self.history

    def step(self, step: int) -> StepMetrics:
        """Take one optimizer step, of this number from 1; nothing is checked, logged or saved."""
        started = time.perf_counter()
        batches = [self.rows[rows] for rows in self._batches(step)]
        tokens = sum(int(batch.real.sum()) for batch in batches)
        counted = sum(int(batch.counted.sum()) for batch in batches)
        rate = self.rate * schedule(step, self.config)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        counts = {term.name: counted for term in self.terms}
        counts["label"] = max(1, sum(int(batch.labelled.sum()) for batch in batches))
        weights = {t.name: t.weight_at(step, self.config.steps) for t in self.terms}
        found: list[tuple[Mapping[str, Tensor], Tensor]] = []
        for batch in batches:
            mix = {name: weights[name] / counts[name] for name in weights}
            losses, divergence = self._losses(own_share(self.world, batch), mix)
            parts = [weights[name] * value / counts[name] for name, value in losses.items()]
            torch.stack(parts).sum().backward()
            found.append(({n: value.detach() for n, value in losses.items()}, divergence))
        loss = kl = 0.0
        for losses, divergence in found:  # read when all is under way, as reading waits for it
            for name, value in losses.items():
                loss += weights[name] * float(value) / counts[name]
            kl += float(divergence) / counted
        loss, kl = self.world.sum([loss, kl])
        norm = self._update(loss)
        seconds = time.perf_counter() - started
        return StepMetrics(step, loss, kl, rate, norm, tokens, seconds)

    def _update(self, loss: float) -> float:
        """Take the optimizer's step, if it has not been; the norm of the gradient, unclipped."""
        if self.in_backward is not None:
            return self.in_backward.finish()
        norm = clip_gradients(self.trained.values(), self.config.gradient_clip)
        if math.isfinite(loss) and math.isfinite(norm):
            self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    def _losses(self, batch: Rows, mix: Mapping[str, float]) -> tuple[Mapping[str, Tensor], Tensor]:
        tokens, counted, labelled = (
            send(torch.from_numpy(array), self.device)
            for array in (batch.tokens, batch.counted, batch.labelled)
        )
        ids = tokens.long()
        terms = [term.name for term in self.terms]
        how: Any = {
            "autocast": self.autocast,
            "compile": self.compile,
            "chunks": self.chunks,
            "mix": mix,
        }
        if self.config.teacher == "recorded":
            assert batch.recorded is not None
            targets = batch.recorded.read(batch.counted).to(self.device)
            return recorded_losses(self.student, targets, ids, counted, labelled, terms, **how)
        assert self.teacher is not None
        return distillation_losses(
            *(self.student, self.teacher, ids, counted, labelled), terms, **how
        )

    def _batches(self, step: int) -> Iterator[Any]:
        """Row numbers of the step's batches: a new order every epoch, decided by the seed."""
        size, count = self.config.batch_size, self.config.accumulate
        per_epoch = len(self.rows) // size
        for number in range((step - 1) * count, step * count):
            epoch, position = divmod(number, per_epoch)
            generator = torch.Generator().manual_seed(derived_seed(self.config.seed, epoch))
            order = torch.randperm(len(self.rows), generator=generator)
            yield order[position * size : (position + 1) * size].numpy()

    def _check(self, record: StepMetrics) -> None:
        if not (math.isfinite(record.loss) and math.isfinite(record.gradient_norm)):
            raise TrainingError(
                f"the loss is not a number at step {record.step}; {self._kept()}."
                f" Start over (--overwrite) with a lower --lr than {self.rate:g},"
                " or with --dtype float32"
            )
        start = [r.kl for r in self.history[:10]]
        recent = [r.kl for r in self.history[-20:]]
        if len(self.history) >= 50 and min(recent) > 3 * max(start) + 1:
            raise TrainingError(
                f"the loss diverges: KL {record.kl:.2f} at step {record.step} after"
                f" {max(start):.2f} at the start; {self._kept()}. Start over"
                f" (--overwrite) with a lower --lr than {self.rate:g}"
            )

    def _kept(self) -> str:
        kept = self.checkpoints.latest()
        return f"the last good checkpoint, step {kept}, is kept" if kept else "no step is kept"

    def _save(self, step: int) -> None:
        self.records.sync()
        self.checkpoints.save(step, self.student, self.trained, self.optimizer)

    def _resume(self) -> int:
        step = self.checkpoints.restore(self.student, self.trained, self.optimizer)
        self.records.resume(step)
        return step


def _width(model: nn.Module) -> int:
    width = getattr(getattr(model, "config", None), "hidden_size", None)
    if not isinstance(width, int):
        raise ConfigError("the model's config has no hidden_size; pass a learning rate (--lr)")
    return width


@contextmanager
def compiled_layers(teacher: Any, compile: bool) -> Iterator[None]:
    """Inside the block, the layers of a full-precision model run as one compiled graph.

    It is captured as the student's is, and quantizes nothing: in fp32 it gives what the layers give
    to a few last places, in bf16 it rounds less often than they do, which keep every intermediate
    value. A teacher is run in every step, so that compiling it pays from a few dozens of them on.

    Args:
        teacher: a transformers model; any other one is left as it is.
        compile: whether to compile at all.

    Raises:
        CaptureError: a layer cannot be captured.
    """
    if not (compile and is_transformers_model(teacher)):
        yield
        return
    prepare(teacher, Recipe.from_bits(_UNQUANTIZED), compile=True)
    try:
        yield
    finally:
        restore(teacher)

"""Block by block: decoder layers are trained one after the other, each to give what the teacher's
gives.

Layer ``i`` of the student reads what the layers before it, trained already, give; it learns to give
what the teacher's layer ``i`` gives behind the teacher's own layers. So a layer makes up for the
errors of those before it, as in BRECQ (arXiv 2102.05426, section 3.2) and OmniQuant (arXiv
2308.13137, equation 1), who train roundings and scales so; here it is all that the layer has. What
is lowered is the squared error of a token's output relative to the teacher's squared norm,
:func:`qatc.losses.distances.relative_error`, averaged over the real tokens.

A step needs gradients, optimizer state and activations of one layer alone, and of both models that
layer: beside a GPU all else of them waits in host memory meanwhile, and comes back at the end. What
layers read is kept there too, see :mod:`qatc.training.streams`: ``R x T x D`` values for the
student and as many for the teacher, in the compute dtype, of ``R = blockwise_rows`` rows.

A finished layer is a checkpoint of its parameters, and within a layer there are those of the
optimizer as well; what layers read is computed anew when a run goes on. The resumed run is the
uninterrupted one, bit for bit on a CPU.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qatc.data.corpus import Rows, derived_seed
from qatc.errors import ConfigError, TrainingError
from qatc.losses.distances import relative_error
from qatc.machine.device import move
from qatc.machine.signals import StopRequest
from qatc.models import find_regions
from qatc.training.checkpoint import Checkpoints
from qatc.training.config import TrainingConfig, default_learning_rate, schedule
from qatc.training.optimizers import make_optimizer
from qatc.training.records import Records
from qatc.training.streams import Stream

RECORDS = "blockwise.jsonl"
"""The file of every step, in the run's directory."""


@dataclass(frozen=True)
class LayerMetrics:
    """What one optimizer step of one layer saw.

    Attributes:
        layer: number of the layer, from 1.
        step: number of the step within it, from 1.
        loss: squared error relative to the teacher's squared norm, a mean over tokens.
        learning_rate: rate of the step.
        gradient_norm: norm before clipping.
        tokens: real tokens of the step.
        seconds: wall-clock time since the step before; the first step of a layer bears what it
            takes to compute what the layer reads.
    """

    layer: int
    step: int
    loss: float
    learning_rate: float
    gradient_norm: float
    tokens: int
    seconds: float


class BlockwiseTrainer:
    """One training of decoder layers, one after the other.

    Args:
        student: the prepared model; of its layers, parameters that require a gradient are trained.
        teacher: the full-precision model, of the dtype that the student computes in.
        rows: the training corpus, packed; the first of them are used.
        config: how to train. Every layer has ``layer_steps`` steps over a schedule of its own.
        directory: where checkpoints and :data:`RECORDS` go.
        rounding_kl: KL of the untrained student, for the default learning rate.
        autocast: makes a context for the student's forward pass.

    Raises:
        ConfigError: the rows are fewer than a batch.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        rows: Rows,
        config: TrainingConfig,
        directory: Path,
        *,
        rounding_kl: float = 1.0,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        kept = min(len(rows), config.blockwise_rows) // config.batch_size * config.batch_size
        if not kept:
            raise ConfigError(
                f"there are {min(len(rows), config.blockwise_rows)} rows to train layers on, fewer"
                f" than one batch of {config.batch_size}; generate more, raise --blockwise-rows, or"
                " lower --batch-size"
            )
        self.rows, self.config, self.steps = rows[:kept], config, config.layer_steps
        self.student, self.teacher, self.autocast = student, teacher, autocast
        self.layers = find_regions(student)
        self.rounding_kl = rounding_kl
        self.directory = directory
        self.records = Records(directory / RECORDS, LayerMetrics)
        self.device = next(student.parameters()).device
        self._bring: Callable[[Iterable[nn.Module]], None] = _leave
        self._send: Callable[[Iterable[nn.Module]], None] = _leave
        if self.device.type != "cpu":
            self._bring = partial(move, device=self.device)
            self._send = partial(move, device=torch.device("cpu"))
        self._real = torch.from_numpy(self.rows.real)
        self._clock = 0.0

    def run(self, on_step: Callable[[LayerMetrics], None] | None = None) -> list[LayerMetrics]:
        """Train from where an earlier run has come to, if there was one, to the end.

        Raises:
            TrainingError: an error is not a number; the layers before are kept.
            KeyboardInterrupt: after Ctrl-C or another signal to end, once a checkpoint is written.
            CheckpointError: a checkpoint is damaged or cannot be written.
        """
        ends = [self._checkpoints(n).latest() or 0 for n in range(len(self.layers))]
        self.records.resume(sum(ends))
        if min(ends) == self.steps:
            for number in range(len(self.layers)):
                self._restore(number)
            return self.records.history
        self._clock = time.perf_counter()
        with StopRequest() as stop:
            dtype = next(self.teacher.parameters()).dtype
            target = Stream(self.teacher, self.rows, self.config.batch_size, dtype)
            source = Stream(self.student, self.rows, self.config.batch_size, dtype, self.autocast)
            models = self.student, self.teacher
            self._send(models)
            pairs = zip(self.layers, find_regions(self.teacher), strict=True)
            for number, ((_, layer), (_, its)) in enumerate(pairs):
                self._bring((layer, its))
                target.advance(number)
                if ends[number] == self.steps:
                    self._restore(number)
                else:
                    self._train(number, source, target.hidden, on_step, stop)
                layer.zero_grad(set_to_none=True)
                if stop.requested:
                    stop.obey()
                if number + 1 < len(self.layers):
                    source.advance(number)
                self._send((layer, its))
            self._bring(models)
        return self.records.history

    def _train(
        self,
        number: int,
        source: Stream,
        target: Tensor,
        on_step: Callable[[LayerMetrics], None] | None,
        stop: StopRequest,
    ) -> None:
        """Train a layer from its last checkpoint to the end, or until a signal."""
        trained, checkpoints = self._trained(number), self._checkpoints(number)
        width = source.hidden.shape[-1]
        peak = self.config.learning_rate or default_learning_rate(width, self.rounding_kl)
        optimizer = make_optimizer(trained, self.config, peak)
        step = checkpoints.restore(self.student, trained, optimizer)
        own = replace(self.config, steps=self.steps, warmup_steps=0)
        while step < self.steps and not stop.requested:
            step += 1
            for group in optimizer.param_groups:
                group["lr"] = peak * schedule(step, own)
            record = self._step(number, step, source, target, trained, optimizer)
            if not (math.isfinite(record.loss) and math.isfinite(record.gradient_norm)):
                raise TrainingError(
                    f"the error of layer {number + 1} is not a number at its step {step}; the"
                    " layers before it are kept. Start over (--overwrite) with a lower --lr than"
                    f" {peak:g}, or with --dtype float32"
                )
            self.records.add(record)
            if on_step is not None:
                on_step(record)
            if step == self.steps:  # nothing of its optimizer is needed any more
                optimizer = _stateless(trained)
            if stop.requested or step == self.steps or step % self.config.checkpoint_every == 0:
                self.records.sync()
                checkpoints.save(step, self.student, trained, optimizer)

    def _step(
        self,
        number: int,
        step: int,
        source: Stream,
        target: Tensor,
        trained: Mapping[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
    ) -> LayerMetrics:
        batches = list(self._batches(number, step))
        tokens = int(sum(self._real[rows].sum() for rows in batches))
        loss = 0.0
        for rows in batches:
            output = source.run(number, source.hidden[rows].to(self.device))
            wanted, real = target[rows].to(self.device), self._real[rows].to(self.device)
            error = relative_error(output, wanted, real) / tokens
            error.backward()
            loss += float(error.detach())
        norm = float(nn.utils.clip_grad_norm_(trained.values(), self.config.gradient_clip))
        if math.isfinite(loss) and math.isfinite(norm):
            optimizer.step()
        optimizer.zero_grad()
        before, self._clock = self._clock, time.perf_counter()
        rate, seconds = optimizer.param_groups[0]["lr"], self._clock - before
        return LayerMetrics(number + 1, step, loss, rate, norm, tokens, seconds)

    def _batches(self, number: int, step: int) -> Iterator[Tensor]:
        """Row numbers of a step's batches: a new order every epoch, another for every layer."""
        size, count = self.config.batch_size, self.config.accumulate
        per_epoch = len(self.rows) // size
        seed = derived_seed(self.config.seed, number)
        for batch in range((step - 1) * count, step * count):
            epoch, position = divmod(batch, per_epoch)
            generator = torch.Generator().manual_seed(derived_seed(seed, epoch))
            order = torch.randperm(len(self.rows), generator=generator)
            yield order[position * size : (position + 1) * size]

    def _restore(self, number: int) -> None:
        """Load a finished layer."""
        trained = self._trained(number)
        self._checkpoints(number).restore(self.student, trained, _stateless(trained))

    def _checkpoints(self, number: int) -> Checkpoints:
        return layer_checkpoints(self.directory, number)

    def _trained(self, number: int) -> dict[str, nn.Parameter]:
        name, layer = self.layers[number]
        return {f"{name}.{n}": p for n, p in layer.named_parameters() if p.requires_grad}


def layer_checkpoints(directory: Path, number: int) -> Checkpoints:
    """Those of a layer, in the directory of a run."""
    return Checkpoints(directory / "layers" / f"{number:04d}", keep=1)


def _leave(modules: Iterable[nn.Module]) -> None:
    """What is in host memory anyway is not moved."""


def _stateless(trained: Mapping[str, nn.Parameter]) -> torch.optim.Optimizer:
    """An optimizer that has nothing to be kept."""
    return torch.optim.SGD(trained.values())

"""How a student is trained, what a step saw, and the rate of each step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from qatc.errors import ConfigError
from qatc.losses.objective import parse_loss, refuse_unrecorded
from qatc.training.parts import parse_train

Teacher = Literal["online", "recorded"]


@dataclass(frozen=True)
class TrainingConfig:
    """How the student is trained.

    Args:
        steps: optimizer steps.
        batch_size: rows per forward pass.
        accumulate: forward passes per optimizer step.
        learning_rate: peak rate; ``None`` follows the model's width, see
            :func:`default_learning_rate`.
        warmup_steps: steps of linear warm-up before the cosine decay.
        gradient_clip: greatest norm of the gradient.
        seed: of the order of the data, any number from 0.
        checkpoint_every: steps between checkpoints.
        keep_checkpoints: how many of the last checkpoints to keep.
        loss: what the student lowers, such as ``logits`` or ``logits+0.5*hidden:decay``; see
            :mod:`qatc.losses.objective`.
        teacher: ``online``: it computes its answer to every batch; or ``recorded``: that is read
            from beside the corpus, see :mod:`qatc.data.teacher_logits`.
        train: what is trained, and in what order, see :mod:`qatc.training.parts`.
        blockwise_steps: optimizer steps of every decoder layer, where they are trained one after
            the other, over a cosine without warm-up; ``None``: ``steps`` where nothing follows,
            which takes about as long as those end to end, and else a quarter of them, besides those
            end to end.
        blockwise_rows: rows of the corpus that layers are trained on, at most: hidden states of so
            many are kept in host memory, twice.
        lora_rank: rank of the updates of ``lora``. 16 are 0.8 % of a weight of 4096 x 4096.
        loss_chunk: tokens whose logits are there at a time, see :mod:`qatc.losses.chunks`; 0 for
            those of a whole batch, ``None`` for chunks where they are large.
        checkpoint_activations: keep the inputs of layers alone, see :func:`qatc.prepare`; who makes
            a student does.
        optimizer: ``adamw``, or ``adamw8bit`` with moments in 8 bits.
        master_dtype: dtype of the parameters that are trained; ``bfloat16`` is rounded
            stochastically, see :mod:`qatc.training.adamw`.
        fused_step: update every parameter within the backward pass, as soon as its gradient is
            there, which is dropped then; the gradient of each is clipped by itself.
        offload: ``none`` keeps all on the GPU, ``optimizer`` what the optimizer knows in host
            memory, ``parameters`` both models and gradients as well, and the CPU takes the
            optimizer's step.

    Raises:
        ConfigError: a value is out of range.
    """

    steps: int = 1500
    batch_size: int = 8
    accumulate: int = 1
    learning_rate: float | None = None
    warmup_steps: int = 0
    gradient_clip: float = 1.0
    seed: int = 0
    checkpoint_every: int = 250
    keep_checkpoints: int = 2
    loss: str = "logits"
    teacher: Teacher = "online"
    train: str = "full"
    blockwise_steps: int | None = None
    blockwise_rows: int = 1024
    lora_rank: int = 16
    loss_chunk: int | None = None
    checkpoint_activations: bool = False
    optimizer: str = "adamw"
    master_dtype: str = "float32"
    fused_step: bool = False
    offload: str = "none"

    def __post_init__(self) -> None:
        terms = [term.name for term in parse_loss(self.loss)]
        stages = parse_train(self.train)
        if self.teacher not in get_args(Teacher):
            raise ConfigError(f"teacher must be online or recorded; got {self.teacher!r}")
        if self.teacher == "recorded":
            refuse_unrecorded(terms)
        if self.teacher == "recorded" and stages.by_layer:
            raise ConfigError(
                f"--train {self.train} compares layers with the teacher's, of which nothing is"
                " recorded; let the teacher run (--teacher online), or train end to end"
            )
        if stages.by_layer and stages.parts is None and terms not in (["logits"], ["hidden"]):
            raise ConfigError(
                f"the loss {self.loss} is one of the whole model, and --train {self.train} lowers"
                " that of hidden states, layer by layer; leave out --loss, or let it be lowered end"
                " to end afterwards (--train blockwise+full)"
            )
        if stages.by_layer and self.fused_step:
            raise ConfigError(
                f"--fused-step keeps no gradients of a model, and --train {self.train} has those of"
                " a single layer; leave out one of them"
            )
        if stages.by_layer and stages.parts is None and self.loss_chunk is not None:
            raise ConfigError(
                f"--loss-chunk is of logits, of which --train {self.train} reads none; leave it out"
            )
        if self.offload == "parameters" and stages.parts in (None, "lora"):
            raise ConfigError(
                f"--offload parameters is of a model whose weights are trained end to end, and"
                f" --train is {self.train}; leave it out, or choose --offload optimizer"
            )
        if self.blockwise_steps is not None and not stages.by_layer:
            raise ConfigError(
                f"blockwise_steps says how long layers are trained one after the other, and train"
                f" is {self.train}; choose --train blockwise or blockwise+full, or leave it out"
            )
        if self.blockwise_steps is not None and self.blockwise_steps < 1:
            raise ConfigError(f"blockwise_steps must be at least 1; got {self.blockwise_steps}")
        counts = ("steps", "batch_size", "accumulate", "checkpoint_every", "keep_checkpoints")
        for name in (*counts, "blockwise_rows", "lora_rank"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1; got {getattr(self, name)}")
        for name in ("warmup_steps", "seed"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must not be negative; got {getattr(self, name)}")
        if self.loss_chunk is not None and self.loss_chunk < 0:
            raise ConfigError(f"loss_chunk must not be negative; got {self.loss_chunk}")
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                raise ConfigError(
                    f"{name} must be {' or '.join(known)}; got {getattr(self, name)!r}"
                )
        if self.fused_step and self.accumulate > 1:
            raise ConfigError(
                "a fused step drops gradients at once, and accumulate adds up those of"
                f" {self.accumulate} passes; leave out one of --fused-step and --accumulate"
            )
        for name in ("learning_rate", "gradient_clip"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise ConfigError(f"{name} must be a positive number; got {value}")

    @property
    def layer_steps(self) -> int:
        """Steps of every decoder layer, where they are trained one after the other."""
        if self.blockwise_steps is not None:
            return self.blockwise_steps
        return self.steps if parse_train(self.train).parts is None else max(1, self.steps // 4)

    @property
    def plain_optimizer(self) -> bool:
        """Whether nothing but where its state lies is asked that torch's own cannot do."""
        return (self.optimizer, self.master_dtype) == ("adamw", "float32") and not self.fused_step


_CHOICES = {
    "optimizer": ("adamw", "adamw8bit"),
    "master_dtype": ("float32", "bfloat16"),
    "offload": ("none", "optimizer", "parameters"),
}


@dataclass(frozen=True)
class StepMetrics:
    """What one optimizer step saw.

    Attributes:
        step: number of the step, from 1.
        loss: what was lowered; of ``logits``, soft-label cross-entropy in nats per token.
        kl: KL(teacher || student), nats per token.
        learning_rate: rate of the step.
        gradient_norm: norm before clipping.
        tokens: real tokens of the step.
        seconds: wall-clock time.
    """

    step: int
    loss: float
    kl: float
    learning_rate: float
    gradient_norm: float
    tokens: int
    seconds: float


def default_learning_rate(width: int, rounding_kl: float = 1.0) -> float:
    """The peak learning rate for a model of this hidden size and this loss by rounding.

    It is inverse in the width, through the paper's 2e-5 at 4096; at 64 that is 1.3e-3, where 5e-4
    learned measurably less in the same number of steps. A model that rounding hardly moved has
    little to learn and much to lose, so below a KL of 1 the rate falls with its square root.

    Args:
        width: hidden size.
        rounding_kl: KL(teacher || model) after rounding and before training, nats per token.
    """
    return 2e-5 * 4096 / width * math.sqrt(min(max(rounding_kl, 1e-4), 1.0))


def schedule(step: int, config: TrainingConfig) -> float:
    """Linear warm-up, then cosine decay to zero: the factor on the peak rate at a step, from 1."""
    if step <= config.warmup_steps:
        return step / (config.warmup_steps + 1)
    progress = (step - 1 - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * progress))

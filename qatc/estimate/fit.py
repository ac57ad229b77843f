"""The cheapest options with which a run fits.

An option is cheap that adds little time. What each adds is reckoned as a share of a training step:
from operations where it computes more, from bytes and the link where it moves more, and by a fixed
share where it was measured to be little. Time that an option saves counts as none, so that nothing
is chosen that is not needed. Of all choices that fit, the one that adds least is taken; of equal
ones, that with fewer options.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from qatc.errors import ConfigError
from qatc.estimate.memory import largest, phases
from qatc.estimate.parts import PhaseMemory, chunk_of
from qatc.estimate.setup import Setup
from qatc.estimate.shapes import Shape
from qatc.estimate.work import Speed, forward_operations, step_seconds

ASSUMED = Speed(100.0, 1000.0)
"""What options are ordered by where no throughput is known."""

CHUNK = 256
"""Tokens of ``--loss-chunk``."""


@dataclass(frozen=True)
class Option:
    """One way to need less memory.

    Attributes:
        name: as it is typed.
        changes: fields of :class:`~qatc.estimate.setup.Setup` and their values.
        training: those that are fields of ``TrainingConfig`` too, by which a run is told.
        added: maps shape, speed and the run as it is chosen to the share of a step that it adds.
        effect: what it changes, besides memory.
    """

    name: str
    changes: dict[str, Any]
    training: tuple[str, ...]
    added: Callable[[Shape, Setup, Speed], float]
    effect: str


def _share(share: float) -> Callable[[Shape, Setup, Speed], float]:
    return lambda shape, setup, speed: share


def _again(shape: Shape, setup: Setup, speed: Speed) -> float:
    """A second forward pass of the layers."""
    length = setup.max_length
    whole = (3 + (setup.teacher == "online")) * forward_operations(shape, length)
    return forward_operations(shape, length, head=False) / whole


def _moved(what: str) -> Callable[[Shape, Setup, Speed], float]:
    """What comes from the host, and goes back."""

    def added(shape: Shape, setup: Setup, speed: Speed) -> float:
        # Beside a plain step: other options that make it longer would make this one look cheap.
        plain = replace(setup, offload="none", checkpoint_activations=False, teacher="online")
        here = step_seconds(shape, plain, speed)
        return step_seconds(shape, replace(plain, offload=what), speed) / here - 1

    return added


OPTIONS = (
    Option(
        "--data CORPUS", {"written_before": True}, (), _share(0.005),
        "the corpus is written before, by generate-data, which has the device to itself",
    ),
    Option(
        "--no-verify", {"verify": False}, (), _share(0.005),
        "the output is to be verified later, in the host's memory: qatc verify --device cpu",
    ),
    Option(
        f"--loss-chunk {CHUNK}", {"loss_chunk": CHUNK}, ("loss_chunk",), _share(0.01),
        "nothing but the order of sums",
    ),
    Option(
        "--fused-step", {"fused_step": True}, ("fused_step",), _share(0.01),
        "gradients are clipped one tensor at a time",
    ),
    Option(
        "--optimizer adamw8bit", {"optimizer": "adamw8bit"}, ("optimizer",), _share(0.02),
        "the optimizer's state is rounded",
    ),
    Option(
        "--master-dtype bfloat16", {"master_dtype": "bfloat16"}, ("master_dtype",), _share(0.02),
        "masters are rounded, at random; KL a little worse",
    ),
    Option(
        "--teacher recorded", {"teacher": "recorded"}, ("teacher",), _share(0.03),
        "the corpus is made before, by generate-data --record-logits 32+32; noisier gradients",
    ),
    Option(
        "--checkpoint-activations", {"checkpoint_activations": True},
        ("checkpoint_activations",), _again,
        "nothing",
    ),
    Option(
        "--offload optimizer", {"offload": "optimizer"}, ("offload",), _moved("optimizer"),
        "nothing; the host holds the optimizer's state",
    ),
    Option(
        "--offload parameters", {"offload": "parameters"}, ("offload",), _moved("parameters"),
        "nothing; the host holds both models in training, and takes the optimizer's step",
    ),
)  # fmt: skip
"""All, each with what it adds. Halving the batch is tried beside them, see :func:`fit`."""

_HALVING = 0.03
"""Share of a step that each halving of the rows of a forward pass adds."""


@dataclass(frozen=True)
class Choice:
    """Options with which a run fits.

    Attributes:
        setup: the run with them.
        options: that were chosen.
        halvings: how often the rows of a forward pass were halved, and passes doubled.
        shares: share of a training step that each option adds.
        phase: the phase that holds most.
    """

    setup: Setup
    options: tuple[Option, ...]
    halvings: int
    shares: tuple[float, ...]
    phase: PhaseMemory

    @property
    def halving_share(self) -> float:
        """Share of a training step that halving the rows adds."""
        return self.halvings * _HALVING

    @property
    def added(self) -> float:
        """Share of a training step that all of it adds."""
        return self.halving_share + sum(self.shares)

    @property
    def typed(self) -> list[str]:
        """The options as they are typed."""
        rows = [f"--batch-size {self.setup.batch_size}", f"--accumulate {self.setup.accumulate}"]
        return [*(rows if self.halvings else []), *(option.name for option in self.options)]


def fit(shape: Shape, setup: Setup, memory: float, speed: Speed = ASSUMED) -> Choice | None:
    """The cheapest options with which every phase fits into ``memory`` bytes of each GPU.

    Args:
        shape: of the model.
        setup: of the run; what it asks for already is kept.
        memory: bytes of a GPU, or of the machine.
        speed: what options are weighed by.

    Returns:
        None where not even all options together are enough.
    """
    best: Choice | None = None
    for choice in _choices(shape, setup, memory, speed):
        if choice.phase.total <= memory and (best is None or _key(choice) < _key(best)):
            best = choice
    return best


def smallest(shape: Shape, setup: Setup, memory: float, speed: Speed = ASSUMED) -> Choice:
    """The choice that comes nearest, whether it fits or not."""
    found = _choices(shape, setup, memory, speed)
    return min(found, key=lambda choice: (round(choice.phase.total / 1e6), *_key(choice)))


def require_fit(shape: Shape, setup: Setup, memory: float, speed: Speed = ASSUMED) -> Choice:
    """The cheapest options that fit.

    Raises:
        ConfigError: there are none.
    """
    found = fit(shape, setup, memory, speed)
    if found is not None:
        return found
    nearest = smallest(shape, setup, memory, speed)
    raise ConfigError(
        f"{shape.name} does not fit into {memory / 1e9:.1f} GB: with {' '.join(nearest.typed)} it"
        f" takes {nearest.phase.total / 1e9:.1f} GB while {nearest.phase.title}; take a larger GPU,"
        " more of them (torchrun), or a shorter --max-length"
    )


def training_changes(choice: Choice) -> dict[str, Any]:
    """What a choice changes in ``TrainingConfig``, by the names of its fields."""
    found = {name: option.changes[name] for option in choice.options for name in option.training}
    if choice.halvings:
        found |= {"batch_size": choice.setup.batch_size, "accumulate": choice.setup.accumulate}
    return found


def _key(choice: Choice) -> tuple[float, int]:
    return round(choice.added, 4), len(choice.options) + choice.halvings


def _choices(shape: Shape, setup: Setup, memory: float, speed: Speed) -> Iterator[Choice]:
    """Every combination that can be typed."""
    open_to = [option for option in OPTIONS if _is_open(option, shape, setup)]
    for halvings, rows in enumerate(_rows(setup)):
        halved = {"batch_size": rows, "accumulate": setup.accumulate << halvings}
        for size in range(len(open_to) + 1):
            for options in itertools.combinations(open_to, size):
                if sum("offload" in option.changes for option in options) > 1:
                    continue
                changes = halved | {k: v for option in options for k, v in option.changes.items()}
                if changes.get("fused_step", setup.fused_step) and changes["accumulate"] > 1:
                    continue
                own = replace(setup, **changes)
                yield Choice(
                    own,
                    options,
                    halvings,
                    tuple(option.added(shape, own, speed) for option in options),
                    largest(phases(shape, own, memory)),
                )


def _is_open(option: Option, shape: Shape, setup: Setup) -> bool:
    """Whether an option is not asked for already, and of use."""
    if "offload" in option.changes and not setup.on_gpu:
        return False
    if "master_dtype" in option.changes and setup.compute != "bfloat16":
        return False
    if {option.name, *option.changes} & set(setup.closed):
        return False
    if "loss_chunk" in option.changes and 0 < chunk_of(shape, setup) <= CHUNK:
        return False
    return any(getattr(setup, name) != value for name, value in option.changes.items())


def _rows(setup: Setup) -> Sequence[int]:
    """Rows of a forward pass, halved as often as every GPU keeps some."""
    found = [setup.batch_size]
    while found[-1] % (2 * setup.gpus) == 0:
        found.append(found[-1] // 2)
    return found

"""What of a student is trained, and in what order.

==================  ================================================================================
``train``           what
==================  ================================================================================
``full``            everything, end to end
``scales``          the learned scales of weights, keys and values alone (as in LSQ, arXiv
                    1902.08153, with all else frozen)
``norms``           the weights and biases of norms alone
``lora``            low-rank updates of the linears in decoder layers, see
                    :mod:`qatc.training.low_rank`, and learned scales, if there are any
``blockwise``       decoder layers, one after the other, see :mod:`qatc.training.blockwise`
``blockwise+full``  those first, and then everything, end to end
``blockwise+lora``  those first, and then low-rank updates, end to end
==================  ================================================================================
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from torch import nn

from qatc.errors import ConfigError
from qatc.models import find_regions
from qatc.models.scales import is_gain
from qatc.passes.quantize_weights import SCALE_GAIN
from qatc.recipe.recipe import Recipe
from qatc.training.low_rank import UPDATES, Updates, add_updates


@dataclass(frozen=True)
class Schedule:
    """The stages of a training.

    Attributes:
        by_layer: whether decoder layers are trained one after the other, first.
        parts: what is trained end to end then: ``full``, ``scales``, ``norms`` or ``lora``; None
            for nothing.
    """

    by_layer: bool
    parts: str | None


SCHEDULES = {
    "full": Schedule(False, "full"),
    "scales": Schedule(False, "scales"),
    "norms": Schedule(False, "norms"),
    "lora": Schedule(False, "lora"),
    "blockwise": Schedule(True, None),
    "blockwise+full": Schedule(True, "full"),
    "blockwise+lora": Schedule(True, "lora"),
}
"""By what ``train`` calls them."""


def parse_train(text: str) -> Schedule:
    """The stages that ``text`` names.

    Raises:
        ConfigError: it names none.
    """
    if text not in SCHEDULES:
        raise ConfigError(f"train must be one of {', '.join(SCHEDULES)}; got {text!r}")
    return SCHEDULES[text]


def check_parts(train: str, method: str, trains: bool, rotates: bool, recipe: Recipe) -> None:
    """Raise unless a run has what is to be trained in it.

    Args:
        train: see the module.
        method: how the model gets to its codes, as a user names it.
        trains, rotates: whether that trains, and whether it turns the residual stream.
        recipe: what is quantized and how.

    Raises:
        ConfigError: with the way out.
    """
    if train != "full" and not trains:
        raise ConfigError(
            f"the method {method} trains nothing, and --train {train} says what is to be trained;"
            f" add qat to the method, or leave out --train"
        )
    if train == "scales" and not (recipe.weights.learned or recipe.kv.learned):
        raise ConfigError(
            "the recipe has no learned scales that --train scales could train; choose"
            " --preset best, or clip: learned in a recipe file"
        )
    if parse_train(train).by_layer and rotates:
        raise ConfigError(
            f"--train {train} compares the layers' outputs with the teacher's, and {method} turns"
            " those of the student; leave out rotate, or train end to end (--train full)"
        )


def choose_parts(model: nn.Module, parts: str, rank: int = 1, seed: int = 0) -> Updates | None:
    """Let nothing but these parts of a prepared model require a gradient.

    What does not require one before stays so.

    Args:
        model: the model.
        parts: what is trained.
        rank: of the updates of ``lora``.
        seed: of how they start.

    Returns:
        The updates of ``lora``, which are on the model until they are merged or removed.

    Raises:
        ConfigError: the model has none of them.
    """
    if parts == "full":
        return None
    updates = add_updates(model, rank, seed) if parts == "lora" else None
    chosen = set(_FINDERS[parts](model))
    if not chosen:
        raise ConfigError(
            f"{type(model).__name__} has no {parts} that could be trained; choose another --train"
        )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and name in chosen)
    return updates


@contextmanager
def trained_at_once(model: nn.Module, train: str, rank: int = 1) -> Iterator[None]:
    """Inside the block, what a step of the largest stage trains requires a gradient, and no more.

    Of layers that are trained one after the other it is the last one, and of ``lora`` updates of
    this rank.
    """
    updates = None
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    stages = parse_train(train)
    if stages.parts is None:
        last = {id(p) for p in find_regions(model)[-1][1].parameters()}
        for parameter in model.parameters():
            parameter.requires_grad_(parameter.requires_grad and id(parameter) in last)
    else:
        updates = choose_parts(model, stages.parts, rank)
    try:
        yield
    finally:
        if updates is not None:
            updates.remove()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(before[name])


def _scales(model: nn.Module) -> Iterator[str]:
    """Names of the gains of learned scales."""
    return (n for n, _ in model.named_parameters() if n.endswith(SCALE_GAIN) or is_gain(n))


def _norms(model: nn.Module) -> Iterator[str]:
    """Names of what belongs to modules whose weight is a vector, which norms alone have."""
    for path, module in model.named_modules():
        weight = module._parameters.get("weight")
        if weight is not None and weight.dim() == 1:
            yield from (f"{path}.{name}" if path else name for name in module._parameters)


def _updates(model: nn.Module) -> Iterator[str]:
    """Names of what updates are made of, and of the gains of learned scales."""
    yield from (n for n, _ in model.named_parameters() if n.startswith(f"{UPDATES}."))
    yield from _scales(model)


_FINDERS: Mapping[str, Callable[[nn.Module], Iterator[str]]] = {
    "scales": _scales,
    "norms": _norms,
    "lora": _updates,
}

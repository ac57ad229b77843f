"""The two ends of a language model: its token embedding and its output head.

They are no part of a decoder layer, and stay in full precision unless a recipe says otherwise.
Where it does, each is captured and rewritten as a region of its own. Many models *tie* the two: one
weight ``[V, K]`` is the table of the one and the weight of the other. Quantized alike they have the
same codes, which are stored once.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from qatc.errors import ConfigError
from qatc.models import is_transformers_model
from qatc.recipe.recipe import DEFAULT_SKIP, Recipe
from qatc.recipe.spec import FLOAT_BITS, QuantSpec

Role = Literal["head", "embedding"]

_GETTERS = {"head": "get_output_embeddings", "embedding": "get_input_embeddings"}
_CLASSES = {"head": nn.Linear, "embedding": nn.Embedding}
_UNQUANTIZED = QuantSpec(FLOAT_BITS)


@dataclass(frozen=True)
class End:
    """The head or the embedding of a model.

    Attributes:
        role: which of the two.
        name: full name of the module.
        module: an ``nn.Linear`` or an ``nn.Embedding``.
    """

    role: Role
    name: str
    module: Any

    @property
    def weight(self) -> str:
        """Full name of the weight."""
        return f"{self.name}.weight"


def find_ends(model: nn.Module) -> list[End]:
    """The embedding and the head of a Hugging Face model, as far as it has them."""
    if not is_transformers_model(model):
        return []
    names = {id(module): name for name, module in model.named_modules()}
    roles: tuple[Role, ...] = ("embedding", "head")
    found = [(role, getattr(model, _GETTERS[role])()) for role in roles]
    return [End(role, names[id(m)], m) for role, m in found if id(m) in names]


def quantized_ends(model: nn.Module, recipe: Recipe) -> list[End]:
    """The ends of ``model`` that ``recipe`` quantizes.

    Raises:
        ConfigError: the model has no such end or one that is computed in another way, a skip
            pattern names it, or tied weights are to have different bits.
    """
    ends = {end.role: end for end in find_ends(model)}
    chosen = []
    for role in ("embedding", "head"):
        if not getattr(recipe, role).quantizes:
            continue
        option = f"--{role}-bits"
        end = ends.get(role)
        if end is None:
            raise ConfigError(
                f"{type(model).__name__} has no {role} that transformers knows of;"
                f" leave out {option}"
            )
        kind = _CLASSES[role]
        if not isinstance(end.module, kind) or getattr(end.module, "max_norm", None) is not None:
            raise ConfigError(
                f"the {role} {end.name} is a {type(end.module).__name__} that does more than an"
                f" nn.{kind.__name__}; leave out {option}"
            )
        pattern = next((p for p in recipe.skip if p not in DEFAULT_SKIP and _hits(p, end)), None)
        if pattern is not None:
            raise ConfigError(
                f"the recipe quantizes {end.weight} and skips it with {pattern!r};"
                f" leave out {option}, or the pattern"
            )
        chosen.append(end)
    if len(chosen) == 2 and are_tied(chosen) and recipe.head != recipe.embedding:
        raise ConfigError(
            f"{chosen[0].weight} and {chosen[1].weight} are one tied weight, which cannot have"
            f" {recipe.embedding.bits} bits in the embedding and {recipe.head.bits} in the head;"
            " give both the same bits, or quantize the head alone"
        )
    return chosen


def _hits(pattern: str, end: End) -> bool:
    return Recipe(skip=(pattern,)).skips(end.weight)


def are_tied(ends: list[End]) -> bool:
    """Whether the head and the embedding among ``ends`` are one weight."""
    weights = [end.module.weight for end in ends]
    return len(weights) == 2 and weights[0] is weights[1]


def tying_note(model: nn.Module, recipe: Recipe) -> str | None:
    """What it costs to quantize only one user of a tied weight; None where that is not asked for.

    Two forms of the weight are stored then.
    """
    ends = find_ends(model)
    chosen = [end for end in ends if getattr(recipe, end.role).quantizes]
    if len(chosen) != 1 or not are_tied(ends):
        return None
    (end,) = chosen
    (other,) = (e for e in ends if e is not end)
    extra = end.module.weight.numel() * getattr(recipe, end.role).bits / 8 / 1e6
    return (
        f"{end.weight} is tied to {other.weight}, which stays in full precision: the codes take"
        f" {extra:,.0f} MB on top of it; --{other.role}-bits {getattr(recipe, end.role).bits} as"
        " well stores the weight once, as codes"
    )


def head_recipe(recipe: Recipe) -> Recipe:
    """The recipe of the graph that is the head: a single linear."""
    return dataclasses.replace(
        recipe,
        weights=recipe.head,
        weight_bits=(),
        kv=_UNQUANTIZED,
        value_bits=None,
        center_keys=False,
        rotate_inputs=(),
        rotate_keys=False,
        head=_UNQUANTIZED,
        embedding=_UNQUANTIZED,
        target="qatc",  # its rules are in the specs, and a whole model is what a runtime holds
    )


def untie(config: Any) -> None:
    """Let the config of a model say that its head and its embedding are stored apart."""
    for part in {id(c): c for c in (config, config.get_text_config())}.values():
        if hasattr(part, "tie_word_embeddings"):
            part.tie_word_embeddings = False

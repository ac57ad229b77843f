"""Bits of single weights: pairs of a pattern of parameter names and bits, the first match holds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Any

from qatc.errors import ConfigError
from qatc.recipe.spec import FLOAT_BITS, VALID_BITS

WeightBits = tuple[tuple[str, int], ...]

_LISTED = 6
"""Patterns that are named one by one where a recipe is described."""


def first_match(weight_bits: WeightBits, parameter_name: str) -> int | None:
    """The bits of the first pattern that matches; None if none does."""
    matching = (bits for pattern, bits in weight_bits if fnmatchcase(parameter_name, pattern))
    return next(matching, None)


def check_weight_bits(weight_bits: Any) -> None:
    """Raise ``ConfigError`` unless these are pairs of a pattern, each another one, and bits."""
    valid = isinstance(weight_bits, tuple) and all(
        isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str)
        for pair in weight_bits
    )
    if not valid:
        raise ConfigError(
            "weight_bits must be a tuple of pairs of a name pattern and bits (in YAML a mapping,"
            f" such as {{'*.v_proj.weight': 6}}); got {weight_bits!r}"
        )
    for pattern, bits in weight_bits:
        if type(bits) is not int or bits not in VALID_BITS:
            raise ConfigError(
                f"weight_bits of {pattern!r} must be 2 to 8, or 16 for not quantized; got {bits!r}"
            )
    twice = [name for name, count in Counter(name for name, _ in weight_bits).items() if count > 1]
    if twice:
        raise ConfigError(
            f"weight_bits names the pattern {twice[0]!r} twice, of which only the first would hold;"
            " leave one out"
        )


def describe(weight_bits: Iterable[tuple[str, int]], code: str = "") -> str:
    """In words: each pattern with its bits or, where there are many, how many have which bits.

    Args:
        weight_bits: the pairs.
        code: what to put around names, such as the backtick of Markdown.
    """
    pairs = [*weight_bits]
    counts = Counter(bits for _, bits in pairs)
    if len(pairs) <= _LISTED:
        return ", ".join(f"{code}{pattern}{code}: {_bits(bits)}" for pattern, bits in pairs)
    return ", ".join(
        f"{counts[bits]} {'in' if bits == FLOAT_BITS else 'with'} {_bits(bits)}"
        for bits in sorted(counts)
    )


def _bits(bits: int) -> str:
    return "full precision" if bits == FLOAT_BITS else f"{bits} bits"

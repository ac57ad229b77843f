"""How one kind of tensor is quantized: a frozen value, free of torch.

The contract (symmetric MinMax, no observer, no clipping, no state), for a row ``x`` of values that
share one scale and ``b`` bits:

=============  ==========================  ===============================
range          scale                       codes
=============  ==========================  ===============================
restricted     ``max|x| / (2**(b-1) - 1)``  ``-(2**(b-1)-1) .. 2**(b-1)-1``
full           ``max|x| / ((2**b - 1)/2)``  ``-2**(b-1) .. 2**(b-1)-1``
signed         ``x* / -2**(b-1)``          ``-2**(b-1) .. 2**(b-1)-1``
asymmetric     ``(max - min)/(2**b - 1)``  ``-2**(b-1) .. 2**(b-1)-1``
affine         ``(max - min)/(2**b - 1)``  ``-2**(b-1) .. 2**(b-1)-1``
=============  ==========================  ===============================

``x*`` is the value of the largest magnitude with its sign, so that it gets the code ``-2**(b-1)``
and no code is left unused: the rule of GGUF's Q4_0. The scale is negative where ``x*`` is positive.
The asymmetric range is one of keys and values, whose codes have an offset besides their scale, so
that they reach from the least to the greatest value: see :mod:`qatc.numerics.asymmetric`. The
affine range is one of activations, whose codes have a whole zero point: the code of 0, which lies
between ``min`` and ``max`` always. It is XNNPACK's: see :mod:`qatc.numerics.affine`.

``code = round_half_to_even(x / scale)`` and the quantized value is ``code * scale``. The restricted
range is the one of LLM-QAT (arXiv 2305.17888, equation 1); the full range is that of torchao and of
compressed-tensors in transformers. torchao multiplies with the reciprocal, ``x * (1 / scale)``, and
has no scale below 2^-23: see ``rounding``. With ``clip="learned"`` the scale is not that of the
table but a trained one, and what lies beyond the outermost codes is cut off.

A weight's scale is rounded before its codes are, to a value that the dtype in which the runtime
stores it holds exactly, and bf16 as well: see ``scale_dtype``.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any, Literal, get_args

from qatc.errors import ConfigError

Range = Literal["restricted", "full", "signed", "asymmetric", "affine"]

ScaleDType = Literal["bfloat16", "float16"]

Rounding = Literal["division", "reciprocal"]

Clip = Literal["none", "learned"]

KVSite = Literal["cache", "projection"]

FLOAT_BITS = 16
"""The number of bits that stands for "not quantized"."""

VALID_BITS = (2, 3, 4, 5, 6, 7, 8, FLOAT_BITS)


@dataclass(frozen=True)
class QuantSpec:
    """Bits, range and granularity of one kind of tensor.

    Args:
        bits: 2 to 8, or 16 for "not quantized".
        group_size: number of neighbouring values of the last dimension that share a scale, or
            ``None`` for one scale per row. A row is a token for activations, an output channel for
            weights, and a token of one head for keys and values.
        range: ``"restricted"``, ``"full"``, ``"signed"``, of keys and values ``"asymmetric"`` or,
            of activations, ``"affine"``: see the module's table.
        scale_dtype: of weights: what else than fp32 must hold their scales exactly. ``"bfloat16"``
            has fp32's range. ``"float16"``, in which GGUF stores scales, ends at 65504 and has
            steps of 2^-24 below 2^-14.
        rounding: of activations: ``"division"`` rounds ``x / scale``, ``"reciprocal"`` rounds
            ``x * (1 / scale)`` with a scale of at least 2^-23, as torchao does.
        clip: of weights, keys and values: ``"none"``, or ``"learned"``: scales are trained. Those
            of weights start where the squared error is least, one for each row or group; keys and
            values keep their dynamic scales, times a trained factor for each head. See
            :mod:`qatc.numerics.learned`.

    Raises:
        ConfigError: a value is not one of the above.
    """

    bits: int = FLOAT_BITS
    group_size: int | None = None
    range: Range = "restricted"
    scale_dtype: ScaleDType = "bfloat16"
    rounding: Rounding = "division"
    clip: Clip = "none"

    def __post_init__(self) -> None:
        if type(self.bits) is not int or self.bits not in VALID_BITS:
            raise ConfigError(f"bits must be 2 to 8, or 16 for not quantized; got {self.bits!r}")
        if self.group_size is not None and (
            type(self.group_size) is not int or self.group_size < 1
        ):
            raise ConfigError(
                "group_size must be a positive number of values, or null for one scale per row;"
                f" got {self.group_size!r}"
            )
        if self.range not in get_args(Range):
            raise ConfigError(
                f"range must be one of {', '.join(get_args(Range))}; got {self.range!r}"
            )
        if self.scale_dtype not in get_args(ScaleDType):
            raise ConfigError(
                f"scale_dtype must be one of {', '.join(get_args(ScaleDType))};"
                f" got {self.scale_dtype!r}"
            )
        if self.rounding not in get_args(Rounding):
            raise ConfigError(
                f"rounding must be one of {', '.join(get_args(Rounding))}; got {self.rounding!r}"
            )
        if self.clip not in get_args(Clip):
            raise ConfigError(f"clip must be one of {', '.join(get_args(Clip))}; got {self.clip!r}")

    @property
    def quantizes(self) -> bool:
        """Whether anything is quantized at all (``bits`` is not 16)."""
        return self.bits != FLOAT_BITS

    @property
    def code_min(self) -> int:
        """The smallest code that can occur."""
        return -self.code_max if self.range == "restricted" else -(1 << (self.bits - 1))

    @property
    def code_max(self) -> int:
        """The largest code that can occur."""
        return (1 << (self.bits - 1)) - 1

    @property
    def steps(self) -> float:
        """The number of steps from zero to ``max|x|``: 7, 7.5 or 8 for 4 bits.

        Of the asymmetric and affine ranges, from the least to the greatest value: 15 for 4 bits.
        """
        if self.asymmetric or self.affine:
            return float((1 << self.bits) - 1)
        if self.range == "full":
            return ((1 << self.bits) - 1) / 2
        return float(self.code_max if self.range == "restricted" else -self.code_min)

    @property
    def asymmetric(self) -> bool:
        """Whether its codes have an offset besides their scale."""
        return self.quantizes and self.range == "asymmetric"

    @property
    def affine(self) -> bool:
        """Whether its codes have a zero point."""
        return self.quantizes and self.range == "affine"

    @property
    def learned(self) -> bool:
        """Whether its scales are trained."""
        return self.quantizes and self.clip == "learned"


def rule_in_words(bits: int, range_: Range) -> str:
    """What codes there are, and what a scale is, for so many bits."""
    half = 1 << (bits - 1)
    least, scale = {
        "restricted": (1 - half, f"max / {half - 1}"),
        "full": (-half, f"max / {half - 0.5:g}"),
        "signed": (-half, f"largest value / -{half}"),
        "asymmetric": (-half, f"(max - min) / {2 * half - 1}, and an offset beside it"),
        "affine": (-half, f"(max - min) / {2 * half - 1}, 0 between them, and a zero point"),
    }[range_]
    return f"codes {least} to {half - 1}, scale = {scale}"


_NAMES = tuple(own.name for own in dataclasses.fields(QuantSpec))


def spec_arg(spec: QuantSpec) -> str:
    """A spec as the argument of an operator: ``int4``, ``int8,range=full``, ``int4,group_size=32``.

    What is at its default is left out. With :func:`read_spec_arg`, its inverse, this is the only
    place where a spec is taken apart and put together.
    """
    parts = [f"int{spec.bits}"]
    for own in dataclasses.fields(spec)[1:]:
        value = getattr(spec, own.name)
        if value != own.default:
            parts.append(f"{own.name}={value}")
    return ",".join(parts)


@functools.cache
def read_spec_arg(text: str) -> QuantSpec:
    """The spec that :func:`spec_arg` wrote.

    Raises:
        ConfigError: ``text`` says none.
    """
    # Dynamo traces this, in attention over a cache: plain loops over plain strings.
    first, *others = text.split(",")
    given: dict[str, Any] = {}
    for part in (first.replace("int", "bits=", 1), *others):
        name, _, value = part.partition("=")
        if name not in _NAMES or not value:
            raise ConfigError(f"{text!r} is no spec; it looks like 'int4' or 'int4,group_size=32'")
        given[name] = int(value) if value.isdecimal() else value
    return QuantSpec(**given)

"""Runtimes that a model can be trained for: how each rounds what training has to round alike.

A runtime quantizes activations, keys and values by a rule of its own, and what is trained with
another one is a little off there. A recipe's ``target`` sets the rules of the runtime that will
serve the model; bits stay the user's choice. Each rule is written down with where it is from.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from qatc.errors import ConfigError
from qatc.recipe.spec import FLOAT_BITS, VALID_BITS, QuantSpec

Preset = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Target:
    """The rules of one runtime.

    Attributes:
        weights, activations, kv: fields of the site's ``QuantSpec`` that the runtime decides.
        kv_bits: bits of K and V that the runtime has a symmetric cache for, 16 included.
        source: where the rules are from.
        note: what they leave open.
        wide_weights: the rules of weights of more than 4 bits, where they are others.
        input_bits: bits that it rounds inputs of quantized weights to, 16 included.
        obstacle: why it cannot multiply by a weight that is quantized so, and the way out.
    """

    weights: Mapping[str, Any]
    activations: Mapping[str, Any]
    kv: Mapping[str, Any]
    kv_bits: tuple[int, ...]
    source: str
    note: str = ""
    wide_weights: Mapping[str, Any] | None = None
    input_bits: tuple[int, ...] = VALID_BITS
    obstacle: Callable[[QuantSpec], str | None] = lambda weight: None

    def rules(self, site: str, bits: int) -> Mapping[str, Any]:
        """What it decides of ``weights``, ``activations`` or ``kv`` of so many bits; of 16 nothing.

        Weights are those of head and embedding, too.
        """
        if bits == FLOAT_BITS:
            return _PLAIN
        if site == "weights" and self.wide_weights is not None and bits > 4:
            return self.wide_weights
        rules: Mapping[str, Any] = getattr(self, site)
        return rules

    def check(self, name: str, kv_bits: int) -> None:
        """Raise ``ConfigError`` if the runtime has no cache of these bits."""
        if kv_bits not in self.kv_bits:
            valid = ", ".join(map(str, self.kv_bits))
            raise ConfigError(
                f"the target {name} has no symmetric KV cache of {kv_bits} bits; choose KV bits of"
                f" {valid}, or leave the target out"
            )


def why_not_in_xnnpack(weight: QuantSpec) -> str | None:
    """Why XNNPACK cannot multiply by a weight that is quantized so, and the way out, or None."""
    group, bits = weight.group_size, weight.bits
    if group is not None and bits > 4:
        return (
            f"it has {bits} bits in groups, and more than 4 bits have one scale per channel there;"
            " quantize it without groups (group_size: null in a recipe), or run it by qatc"
        )
    if group is not None and group % XNNPACK_GROUP:
        return (
            f"it has groups of {group}, and XNNPACK takes multiples of {XNNPACK_GROUP}; quantize it"
            f" with --group-size {XNNPACK_GROUP}"
        )
    if weight.range == "signed":
        return (
            "it has negative scales, as the signed range makes them, and XNNPACK takes positive"
            " ones; quantize it with the restricted range (--preset paper)"
        )
    return None


XNNPACK_GROUP = 32
"""Weights of 4 bits that share a scale, or a multiple of it: what XNNPACK multiplies."""

_ANY = VALID_BITS
_PLAIN: Mapping[str, Any] = MappingProxyType({})
_FULL: Mapping[str, Any] = MappingProxyType({"range": "full"})
_TORCHAO: Mapping[str, Any] = MappingProxyType({"range": "full", "rounding": "reciprocal"})
_BLOCKS: Mapping[str, Any] = MappingProxyType({"group_size": 32})
_AFFINE: Mapping[str, Any] = MappingProxyType({"range": "affine"})
_XNNPACK_GROUPS: Mapping[str, Any] = MappingProxyType({"group_size": XNNPACK_GROUP})
_FP16_BLOCKS: Mapping[str, Any] = MappingProxyType({"group_size": 32, "scale_dtype": "float16"})

TARGETS: Mapping[str, Target] = MappingProxyType(
    {
        "qatc": Target(
            _PLAIN, _PLAIN, _PLAIN, _ANY, "LLM-QAT, arXiv 2305.17888, equation 1: amax / 127"
        ),
        "transformers": Target(
            _PLAIN,
            _FULL,
            _FULL,
            (4, 8, 16),
            "compressed-tensors 0.20: dynamic per-token int8 with amax / 127.5 and codes -128..127;"
            " kv_cache_scheme with strategy group and the head dimension as group: amax / 127.5 and"
            " amax / 7.5 per token and head",
            "K and V bits are set in the runtime's kv_cache_scheme, not by the checkpoint",
        ),
        "torchao": Target(
            _PLAIN,
            _TORCHAO,
            _PLAIN,
            _ANY,
            "torchao 0.18, Int8Tensor: dynamic per-token int8 with a scale of amax / 127.5, of at"
            " least 2^-23, codes -128..127, and a product with the scale's reciprocal",
            "in bf16 it computes so when it is compiled; uncompiled it rounds scales to bf16, and"
            " it has no cache for K and V",
        ),
        "vllm": Target(
            _PLAIN,
            _PLAIN,
            _PLAIN,
            (8, 16),
            "vLLM 0.33: dynamic per-token int8 with amax / 127; --kv-cache-dtype"
            " int8_per_token_head with amax / 127",
            "its 4-bit cache is asymmetric behind a random rotation; the 8-bit one multiplies by"
            " the reciprocal of the scale and rounds half away from zero: close, not the same",
        ),
        "llama.cpp": Target(
            _FP16_BLOCKS,
            _BLOCKS,
            _BLOCKS,
            (4, 8, 16),
            "llama.cpp Q4_0, Q5_0, Q8_0 and its K and V types: blocks of 32 values; scales of"
            " weights in fp16",
            "it rounds half away from zero, keeps the scales of activations in fp16 and rotates K"
            " and V: close, not the same",
        ),
        "executorch": Target(
            _XNNPACK_GROUPS,
            _AFFINE,
            _PLAIN,
            (16,),
            "XNNPACK as of ExecuTorch 1.5: inputs of linear layers in 8 bits with a scale of"
            " (max - min) / 255 and a whole zero point per token; weights of 4 bits in groups of"
            " 32, of 8 bits with one scale per channel",
            wide_weights=_PLAIN,
            input_bits=(8,),
            obstacle=why_not_in_xnnpack,
        ),
    }
)
"""Targets by name."""

OTHER_NAMES: Mapping[str, str] = MappingProxyType({"gguf": "llama.cpp"})
"""Formats by whose name a target may be called."""


def target_name(name: str) -> str:
    """The name that a target has in :data:`TARGETS`, by that or another one of its names.

    Raises:
        ConfigError: there is no such target.
    """
    known = OTHER_NAMES.get(name, name) if isinstance(name, str) else None
    if known in TARGETS:
        return known
    others = ", ".join(f"{other} for {own}" for other, own in OTHER_NAMES.items())
    raise ConfigError(f"target must be one of {', '.join(TARGETS)} ({others}); got {name!r}")


def find_target(name: str) -> Target:
    """The target of this name.

    Raises:
        ConfigError: there is none.
    """
    return TARGETS[target_name(name)]

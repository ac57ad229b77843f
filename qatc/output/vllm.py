"""What vLLM computes of quantized weights, and how it is started.

What is said of GPUs is by the source of vLLM 0.33, where no output has been run; on a CPU vLLM 0.32
has run them. Which kernel runs follows from what ``config.json`` declares:

====================================  ==========  ==============================================
declared                              a weight    what multiplies, and what it needs
====================================  ==========  ==============================================
``int-quantized``, inputs of 8 bits   1 byte      CUTLASS or Triton, int8 by int8
``pack-quantized``, inputs declared   1/2 byte    Humming, with ``--linear-backend humming``; all
                                                  others leave inputs in float
``pack-quantized``, none declared     1/2 byte    Marlin, inputs in float, or in int8 with
                                                  ``VLLM_MARLIN_INPUT_DTYPE=int8``
====================================  ==========  ==============================================

``int-quantized`` weights without inputs, or in groups, find no kernel. How K and V are stored is an
option (``--kv-cache-dtype``): ``int8_per_token_head`` has the scale ``max / 127``, and its four-bit
type is asymmetric, behind a rotation. A checkpoint that names an integer cache is refused.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from qatc.errors import ConfigError
from qatc.output.compressed_tensors import refuse_rotated
from qatc.output.layouts import PACKED, PACKED_BITS, Form
from qatc.recipe.recipe import Recipe

VERSION = "0.33"
"""Whose source this was read in."""

RUN_ON_CPU = "0.32"
"""That has run outputs without a GPU: int8 products by oneDNN, and weights alone."""

KV_TYPE = "int8_per_token_head"

MARLIN = "VLLM_MARLIN_INPUT_DTYPE=int8"

_HUMMING = "humming"
HUMMING = f"--linear-backend {_HUMMING}"

_MARLIN_GROUPS = (None, 32, 64, 128)
_HUMMING_INPUTS = (4, 8)
_BITS = 8


def refuse_unheld(recipe: Recipe, form: Form) -> None:
    """Raise ``ConfigError`` if vLLM cannot run what was trained with ``recipe`` in this form."""
    refuse_rotated(recipe, "vLLM")
    if (reason := why_not(recipe, form)) is not None:
        raise ConfigError(reason)


def why_not(recipe: Recipe, form: Form) -> str | None:
    """Why vLLM finds no kernel for a model in a form, and the way out; None if it does."""
    inputs, weights = recipe.activations, recipe.weights
    if recipe.head.quantizes or recipe.embedding.quantizes:
        return (
            "vLLM reads a quantized head or embedding in a layout of its own, which is not written;"
            " quantize without --head-bits and --embedding-bits"
        )
    if not weights.quantizes:
        left = "vLLM quantizes the inputs of quantized weights only; quantize the weights as well"
        return left if inputs.quantizes else None
    if form == "vllm-marlin":
        return _why_not_marlin(recipe)
    if form == "qatc" and len({own <= PACKED_BITS for own in _widths(recipe)}) == 2:
        return (
            "its weights lie in two layouts, and vLLM joins those of queries, keys and values;"
            " qatc export --format vllm writes one layout, where activations have 8 bits"
        )
    if not inputs.quantizes:
        return _why_not_alone(recipe)
    if _widest(recipe) <= PACKED_BITS and form != "vllm":
        return None if inputs.bits in _HUMMING_INPUTS else _not_so_many(inputs.bits)
    if inputs.bits != _BITS:
        return _not_so_many(inputs.bits)
    if inputs.group_size is not None:
        return (
            "vLLM gives activations one scale per token, and this model was trained with groups of"
            f" {inputs.group_size}; quantize with --target vllm"
        )
    if weights.group_size is not None:
        return (
            "vLLM multiplies int8 codes by int8 codes of one scale per output channel, and this"
            f" model has groups of {weights.group_size}; quantize without --group-size"
            + ("" if _widest(recipe) > PACKED_BITS else ", or take --format vllm-marlin")
        )
    return None


def _why_not_alone(recipe: Recipe) -> str | None:
    """The same of weights whose inputs are in float."""
    if (widest := _widest(recipe)) <= PACKED_BITS:
        return _not_such_groups(recipe)
    return (
        f"vLLM has no kernel for weights of {widest} bits in this layout behind activations of 16;"
        " quantize the activations to 8 bits, or the weights to 4"
    )


def _not_such_groups(recipe: Recipe) -> str | None:
    group = recipe.weights.group_size
    if group in _MARLIN_GROUPS:
        return None
    return (
        f"Marlin has groups of 32, 64 or 128 weights, and this model has {group}; quantize with one"
        " of those, or without --group-size"
    )


def _why_not_marlin(recipe: Recipe) -> str | None:
    inputs, weights = recipe.activations, recipe.weights
    if not inputs.quantizes:
        return "vllm-marlin is for activations of 8 bits, and here are none; take --format vllm"
    if inputs.bits != _BITS or inputs.group_size is not None:
        return (
            "Marlin rounds activations to 8 bits with one scale per token, and this model was"
            " trained with others; quantize with --target vllm"
        )
    if (widest := _widest(recipe)) > PACKED_BITS:
        return (
            f"Marlin multiplies 8-bit activations by weights of 4 bits, and here are some of"
            f" {widest}; take --format vllm"
        )
    if (reason := _not_such_groups(recipe)) is not None:
        return reason
    if weights.group_size is not None and weights.range == "signed":
        return (
            "Marlin takes the scales of groups for positive, and those of signed codes are not;"
            " quantize without --preset best, or without --group-size"
        )
    return None


def _not_so_many(bits: int) -> str:
    return f"vLLM rounds activations to {_BITS} bits, and this model was trained with {bits}"


def _widest(recipe: Recipe) -> int:
    """The most bits that a quantized weight of a layer has."""
    return max(_widths(recipe))


def _widths(recipe: Recipe) -> list[int]:
    """Bits that quantized weights of layers may have."""
    return [recipe.weights.bits, *(bits for _, bits in recipe.weight_bits if bits <= _BITS)]


def form_of(recipe: Recipe, config: Mapping[str, Any]) -> Form:
    """The form that a ``config.json`` declares, of those that differ for vLLM."""
    groups = (config.get("quantization_config") or {}).get("config_groups", {}).values()
    if recipe.activations.quantizes and groups:
        if all(group["format"] != PACKED for group in groups):
            return "vllm"
        if all(group["input_activations"] is None for group in groups):
            return "vllm-marlin"
    return "qatc"


def command(place: str, recipe: Recipe, form: Form) -> str:
    """How vLLM is started with a model in a form.

    Args:
        place: its directory, or name on the hub.
        recipe: what it was trained with.
        form: as of :func:`form_of`.
    """
    before = "".join(f"{name}={value} " for name, value in environment(form).items())
    behind = f" {HUMMING}" if _takes_humming(recipe, form) else ""
    behind += f" --kv-cache-dtype {KV_TYPE}" if _has_cache(recipe) else ""
    return f"{before}vllm serve {shlex.quote(place)}{behind}"


def tried(form: Form) -> str:
    """Where vLLM has run models of this kind, in words."""
    if form == "vllm-marlin":
        return f"what vLLM does is by its source ({VERSION}): this layout has not been run"
    return (
        f"vLLM {RUN_ON_CPU} has run this layout on a CPU, whose cache is in float; what it does on"
        f" a GPU is by its source ({VERSION}), and has not been run"
    )


def environment(form: Form) -> dict[str, str]:
    """Variables of the environment that a form needs."""
    if form != "vllm-marlin":
        return {}
    name, _, value = MARLIN.partition("=")
    return {name: value}


def kv_type(recipe: Recipe) -> str:
    """What ``--kv-cache-dtype`` is for what was trained; ``auto`` leaves K and V in float."""
    return KV_TYPE if _has_cache(recipe) else "auto"


def backend(recipe: Recipe, form: Form) -> str:
    """What ``--linear-backend`` is for what was trained."""
    return _HUMMING if _takes_humming(recipe, form) else "auto"


def needs(recipe: Recipe, form: Form) -> str | None:
    """What the switch in :func:`command` is for, if it has one."""
    if form == "vllm-marlin":
        return f"without `{MARLIN}` it leaves activations in float"
    if _takes_humming(recipe, form):
        return f"without `{HUMMING}` it leaves activations in float"
    return None


def _takes_humming(recipe: Recipe, form: Form) -> bool:
    return form == "qatc" and recipe.weights.quantizes and recipe.activations.quantizes


def _has_cache(recipe: Recipe) -> bool:
    return {recipe.kv.bits, recipe.values.bits} == {_BITS}


def differences(recipe: Recipe, form: Form) -> list[str]:
    """What vLLM computes in another way than the model was trained for, each in some words."""
    found, kv = [], recipe.kv
    if recipe.activations.quantizes and recipe.activations.range == "full":
        found.append("activations scaled by max / 127 (max / 127.5 here)")
    elif recipe.activations.affine:
        found.append("activations scaled by max / 127 (with a zero point beside the scale here)")
    grouped = recipe.weights.group_size is not None and recipe.weights.quantizes
    if form == "vllm-marlin" and grouped:
        found.append("the scales of groups in 4,096 steps of the largest one")
    changed = kv.learned or recipe.center_keys or recipe.rotate_keys or kv.group_size is not None
    if kv.quantizes and not _has_cache(recipe):
        found.append(f"K and V in float ({recipe.kv_bits} bits here)")
    elif kv.quantizes and (changed or kv.range != "restricted" or recipe.kv_site != "cache"):
        found.append("K and V scaled by max / 127 per token and head (by another rule here)")
    return found

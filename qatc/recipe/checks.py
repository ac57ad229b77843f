"""What a recipe cannot say."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, get_args

from qatc.errors import ConfigError
from qatc.recipe.spec import VALID_BITS, KVSite, QuantSpec
from qatc.recipe.targets import Target, find_target
from qatc.recipe.weight_bits import check_weight_bits

if TYPE_CHECKING:
    from qatc.recipe.recipe import Recipe

_NOT_AFFINE = {
    "group_size": "has one scale and zero point per token",
    "rounding": "rounds by a rule of its own",
}
"""Fields of activations that the affine range leaves no choice of, and why."""


def check(recipe: Recipe) -> None:
    """Raise ``ConfigError`` if a value of a recipe is not valid, or does not go with another."""
    target = find_target(recipe.target)
    _check_specs(recipe)
    _check_value_bits(recipe)
    check_weight_bits(recipe.weight_bits)
    target.check(recipe.target, recipe.kv.bits)
    _check_products(recipe, target)
    _check_keys_and_values(recipe)
    _check_patterns(recipe)
    if recipe.rotate_inputs:
        _check_rotation(recipe)


def _check_specs(recipe: Recipe) -> None:
    for site in ("activations", "kv"):
        if getattr(recipe, site).scale_dtype != QuantSpec.scale_dtype:
            raise ConfigError(
                f"{site}.scale_dtype is {getattr(recipe, site).scale_dtype!r}, and only the"
                " scales of weights are stored; leave it out"
            )
    for site in ("weights", "kv", "head", "embedding"):
        if getattr(recipe, site).rounding != QuantSpec.rounding:
            raise ConfigError(
                f"{site}.rounding is {getattr(recipe, site).rounding!r}, and only activations are"
                " rounded so by a runtime; leave it out"
            )
    for site in ("activations", "head", "embedding"):
        if getattr(recipe, site).learned:
            raise ConfigError(
                f"{site}.clip is 'learned', and only the scales of layers' weights, keys and"
                " values are trained; leave it out"
            )
    if recipe.activations.range == "signed":
        raise ConfigError(
            "activations.range is 'signed', which no product of activations has; take"
            " 'restricted' or 'full'"
        )
    for site in ("weights", "activations", "head", "embedding"):
        if getattr(recipe, site).asymmetric:
            other = "'affine', which has a zero point" if site == "activations" else "'signed'"
            raise ConfigError(
                f"{site}.range is 'asymmetric', and only keys and values have an offset beside"
                f" their scale; take 'restricted', 'full' or {other}"
            )
    for site in ("weights", "kv", "head", "embedding"):
        if getattr(recipe, site).affine:
            other = "'asymmetric'" if site == "kv" else "'restricted', 'full' or 'signed'"
            raise ConfigError(
                f"{site}.range is 'affine', and only activations have a zero point; take {other}"
            )
    for name, why in _NOT_AFFINE.items():
        given = getattr(recipe.activations, name)
        if recipe.activations.affine and given != getattr(QuantSpec, name):
            raise ConfigError(
                f"activations.range is 'affine', which {why}, and activations.{name} is {given!r};"
                " leave it out"
            )


def _check_products(recipe: Recipe, target: Target) -> None:
    """What the runtime of a target cannot multiply."""
    specs = {"weights": recipe.weights, "head": recipe.head}
    for pattern, bits in recipe.weight_bits:
        specs[f"weight_bits of {pattern}"] = replace(recipe.weights, bits=bits)
    quantized = {name: spec for name, spec in specs.items() if spec.quantizes}
    for name, spec in quantized.items():
        if obstacle := target.obstacle(spec):
            raise ConfigError(f"the target {recipe.target} cannot hold {name}: {obstacle}")
    inputs = recipe.activations
    if quantized and inputs.bits not in target.input_bits:
        valid = " or ".join(map(str, target.input_bits))
        raise ConfigError(
            f"the target {recipe.target} rounds inputs of quantized weights to {valid} bits, and"
            f" {recipe.bits} leaves them at {inputs.bits}; choose {valid}, such as --bits 4-8-16"
        )
    if inputs.quantizes and not recipe.weights.quantizes and target.input_bits != VALID_BITS:
        raise ConfigError(
            f"the target {recipe.target} rounds inputs only where weights are quantized, and"
            f" {recipe.bits} leaves those of layers in float; choose --bits 4-8-16 or the like"
        )


def _check_value_bits(recipe: Recipe) -> None:
    bits = recipe.value_bits
    if bits is None:
        return
    if type(bits) is not int or not 2 <= bits <= 8:
        raise ConfigError(f"value_bits must be 2 to 8, or null for those of kv; got {bits!r}")
    if not recipe.kv.quantizes or recipe.kv_site != "cache":
        raise ConfigError(
            "value_bits is for a cache of codes; give kv fewer bits than 16 and take kv_site: cache"
        )
    if recipe.target != "qatc":
        raise ConfigError(
            f"value_bits is for the cache of qatc, and the target {recipe.target} has its own;"
            " leave it out, or train for the target qatc"
        )


def _check_keys_and_values(recipe: Recipe) -> None:
    if recipe.target != "qatc" and (recipe.kv.asymmetric or recipe.rotate_keys):
        what = "rotate_keys" if recipe.rotate_keys else "kv.range 'asymmetric' (--kv-range)"
        raise ConfigError(
            f"{what} is for the cache of qatc, which the target {recipe.target} has not; leave it"
            " out, or train for the target qatc"
        )
    if recipe.kv.asymmetric and recipe.kv.group_size:
        raise ConfigError(
            "kv.range is 'asymmetric', which has one scale and offset per token and head; leave"
            " kv.group_size out"
        )
    changes_keys = recipe.center_keys or recipe.rotate_keys
    own = recipe.kv.learned or recipe.kv.asymmetric or changes_keys
    if recipe.kv_site != "cache" and own:
        raise ConfigError(
            "centered or rotated keys, and learned scales or offsets of K and V, are of the"
            " cache site; take kv_site: cache"
        )
    if changes_keys and not recipe.kv.quantizes:
        name = "center_keys" if recipe.center_keys else "rotate_keys"
        raise ConfigError(f"{name} without quantized keys; give kv fewer bits than 16")
    if recipe.kv_site not in get_args(KVSite):
        raise ConfigError(
            f"kv_site must be one of {', '.join(get_args(KVSite))}; got {recipe.kv_site!r}"
        )


def _check_patterns(recipe: Recipe) -> None:
    for field_name in ("skip", "rotate_inputs"):
        patterns = getattr(recipe, field_name)
        if not isinstance(patterns, tuple) or not all(isinstance(p, str) for p in patterns):
            raise ConfigError(
                f"{field_name} must be a tuple (in YAML a list) of name patterns; got {patterns!r}"
            )
    if recipe.weight_bits and not recipe.weights.quantizes:
        raise ConfigError(
            "weight_bits are exceptions from the bits of weights, and those are 16, for not"
            " quantized; give weights fewer bits, and weight_bits 16 where none are wanted"
        )


def _check_rotation(recipe: Recipe) -> None:
    if not (recipe.weights.quantizes and recipe.activations.quantizes):
        raise ConfigError(
            "rotate_inputs turns the inputs of quantized weights before they are quantized"
            f" themselves, and {recipe.bits} leaves one of the two at 16 bits; leave"
            " rotate_inputs out, or choose fewer bits"
        )
    if recipe.target != "qatc":
        raise ConfigError(
            f"the target {recipe.target} rotates no inputs of linear layers at run time; leave"
            " rotate_inputs out, or train for the target qatc"
        )

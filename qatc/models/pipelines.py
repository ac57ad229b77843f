"""Which passes make a training graph of a layer, of a head, and of an embedding."""

from __future__ import annotations

import torch

from qatc.kernels import integer_linear
from qatc.models.vocabulary import head_recipe
from qatc.passes import (
    Canonicalize,
    CenterKeys,
    GraphPass,
    Pipeline,
    QuantizeEmbeddings,
    QuantizeKV,
    QuantizeLinearInputs,
    QuantizeWeights,
    RotateKeys,
    RotateLinearInputs,
    UseIntegerForward,
)
from qatc.recipe.exceptions import NONE, Exceptions
from qatc.recipe.recipe import Recipe


def training_pipeline(
    recipe: Recipe,
    own: Exceptions = NONE,
    linears: bool = True,
    integer_forward: bool = False,
) -> Pipeline:
    """The passes that make a training graph for ``recipe``.

    Args:
        recipe: what is quantized and how.
        own: what the recipe says of single parameters of the captured module.
        linears: whether the module has linear layers that are not skipped.
        integer_forward: whether those are computed on integers; the recipe must allow it, see
            :func:`why_no_integer_forward`.
    """
    passes: list[GraphPass] = [Canonicalize()]
    if linears and own.rotated:
        passes.append(RotateLinearInputs(own.rotated))
    if linears and recipe.activations.quantizes:
        passes.append(QuantizeLinearInputs(recipe.activations, own.skip))
    if linears and recipe.weights.quantizes:
        passes.append(QuantizeWeights(recipe.weights, own.skip, own.bits))
    if recipe.rotate_keys:
        passes.append(RotateKeys())
    if recipe.center_keys:
        passes.append(CenterKeys())
    if recipe.kv.quantizes:
        values = None if recipe.value_bits is None else recipe.values
        passes.append(QuantizeKV(recipe.kv, recipe.kv_site, values))
    if linears and integer_forward:
        passes.append(UseIntegerForward())
    return Pipeline(tuple(passes))


def head_pipeline(recipe: Recipe, integer_forward: bool = False) -> Pipeline:
    """The passes that make a training graph of the output head."""
    own = head_recipe(recipe)
    integers = integer_forward and recipe_allows_integers(own)
    return training_pipeline(own, integer_forward=integers)


def embedding_pipeline(recipe: Recipe) -> Pipeline:
    """The passes that make a training graph of the token embedding."""
    return Pipeline((Canonicalize(), QuantizeEmbeddings(recipe.embedding)))


def why_no_integer_forward(recipe: Recipe, device: torch.device) -> str | None:
    """Why :func:`prepare` computes linears in float if it is left to choose, or None."""
    if not recipe_allows_integers(recipe):
        if recipe.weights.group_size or recipe.activations.group_size:
            return "groups have several scales in one sum"
        return "weights or activations are not quantized"
    if not integer_linear.is_fast(device):
        return f"this {device.type} has no fast int8 product"
    return None


def recipe_allows_integers(recipe: Recipe) -> bool:
    """Whether quantized linears are products of integers with one scaling."""
    specs = (recipe.weights, recipe.activations)
    return all(spec.quantizes and not spec.group_size for spec in specs)

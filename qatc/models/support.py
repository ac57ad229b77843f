"""Why a Hugging Face model cannot be quantized, where that can be told before anything is captured.

Told apart by what a config says and by the shapes of parameters, not by lists of architectures.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from torch import nn

from qatc.errors import ConfigError
from qatc.models.regions import find_regions, sharded_parts
from qatc.numerics import minmax
from qatc.recipe.recipe import DEFAULT_SKIP, Recipe


def refuse_adapter(name: str) -> None:
    """Raise ``ConfigError`` if the directory ``name`` holds an adapter, alone or beside a model."""
    path = Path(name) / "adapter_config.json"
    if not path.is_file():
        return
    try:
        base = json.loads(path.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError):
        base = None
    raise ConfigError(
        f"{name} holds an adapter{f' of {base}' if base else ''} and qatc quantizes whole models;"
        " merge it into its base model first: PeftModel.from_pretrained(BASE, ADAPTER)"
        ".merge_and_unload().save_pretrained(DIR)"
    )


def softcapping(config: Any) -> float | None:
    """What attention caps its scores at, by the config of a model that may or may not do so."""
    for name in ("attn_logit_softcapping", "attn_logit_softcap", "attn_softcap"):
        cap = getattr(config, name, None)
        if cap:
            return float(cap)
    return None


_STATEFUL = ("linear_attention", "lightning_attention", "conv", "mamba", "mamba2", "recurrent")
"""What configs of hybrid models call layers without attention, in ``layer_types``."""


def refuse_unsupported(model: Any) -> None:
    """Raise ``ConfigError`` with the reason if this Hugging Face model is none for qatc."""
    config, kind = model.config, type(model).__name__
    if getattr(config, "is_encoder_decoder", False):
        raise ConfigError(
            f"{kind} is an encoder with a decoder; qatc quantizes decoder-only causal language"
            " models: choose another model"
        )
    text = config.get_text_config()
    kinds = getattr(text, "layer_types", None) or getattr(text, "layers_block_type", None) or []
    hybrid = [layer for layer in kinds if layer in _STATEFUL]
    if hybrid:
        raise ConfigError(
            f"{len(hybrid)} of the {len(kinds)} layers of {kind} are of the kind {hybrid[0]}, which"
            " keeps a recurrent or convolved state in place of keys and values; qatc has a cache"
            " for attention only; choose another model"
        )
    shared = getattr(text, "num_kv_shared_layers", 0)
    if shared:
        raise ConfigError(
            f"the last {shared} layers of {kind} attend to the keys and values of other layers"
            f" (num_kv_shared_layers={shared}), and qatc captures every layer with keys and values"
            " of its own; choose another model"
        )


def refuse_stacked_weights(model: nn.Module, recipe: Recipe) -> None:
    """Raise ``ConfigError`` if weights are stacked in three dimensions, where no pass finds them.

    A mixture of experts keeps most of its weights there. Those of convolutions have as many
    dimensions, and stay in full precision.
    """
    stacked = [
        (f"{name}.{own}", parameter)
        for name, region in find_regions(model)
        for own, parameter in region.named_parameters()
        if parameter.dim() > 2
        and not is_convolution(owner_of(region, own))
        and not recipe.skips(f"{name}.{own}")
    ]
    if stacked:
        name, parameter = stacked[0]
        raise ConfigError(
            f"{name} stacks weights in {parameter.dim()} dimensions, as experts do, which qatc"
            f" cannot quantize; leave them in full precision with"
            f" {skip_options([name for name, _ in stacked])}, or choose a dense model"
        )


def refuse_unstorable(model: nn.Module, quantized: list[str]) -> None:
    """Raise ``ConfigError`` if a quantized weight is not that of a ``torch.nn.Linear``.

    No format holds it: a runtime dequantizes the weights of linear layers, and knows no others.
    """
    others = [n for n in quantized if not isinstance(owner_of(model, n), nn.Linear)]
    if others:
        owner = type(owner_of(model, others[0])).__name__
        raise ConfigError(
            f"{others[0]} is multiplied like the weight of a linear layer but belongs to a {owner},"
            " and outputs hold quantized weights of torch.nn.Linear only; leave it in full"
            f" precision with {skip_options(others)}"
        )


def owner_of(module: nn.Module, parameter: str) -> nn.Module:
    """The submodule that a parameter belongs to."""
    return module.get_submodule(parameter.rpartition(".")[0])


def is_convolution(module: nn.Module) -> bool:
    """Whether a module is a convolution, of however many dimensions."""
    return isinstance(module, nn.modules.conv._ConvNd)


def skip_options(names: list[str]) -> str:
    """Options of the command line that leave parameters of these names in full precision.

    One serves all layers: a number between dots gives way to a star. What stands under one module
    named for experts goes by that name.
    """
    patterns = {
        "*.experts.*"
        if ".experts." in name
        else ".".join("*" if part.isdigit() else part for part in name.split("."))
        for name in names
    }
    return " ".join(f"--skip '{pattern}'" for pattern in sorted(patterns))


def refuse_idle_patterns(model: nn.Module, recipe: Recipe) -> None:
    """Raise ``ConfigError`` if a pattern of a recipe names nothing that it could be about."""
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    for pattern in recipe.skip:
        if pattern not in DEFAULT_SKIP and not any(fnmatchcase(name, pattern) for name in names):
            raise ConfigError(
                f"the skip pattern {pattern!r} matches no parameter; names look like"
                f" {names[len(names) // 2]!r}, so try '*{names[len(names) // 2].split('.')[-2]}*'"
            )
    # Without weight_bits, which can skip as well.
    weights = [name for name, _ in _layer_weights(model, replace(recipe, weight_bits=()))]
    hints = {
        "weight_bits": "output head and token embedding have --head-bits and --embedding-bits",
        "rotate_inputs": "--method rotate asks for *.down_proj.weight where activations have fewer"
        " than 8 bits; a --recipe names others, or none",
    }
    patterns = [("rotate_inputs", pattern) for pattern in recipe.rotate_inputs]
    patterns += [("weight_bits", pattern) for pattern, _ in recipe.weight_bits]
    for kind, pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in weights):
            example = f"such as {weights[0]!r}" if weights else "of which there are none"
            raise ConfigError(
                f"the {kind} pattern {pattern!r} matches no weight of the layers that is quantized,"
                f" {example}; {hints[kind]}"
            )


def refuse_turned(recipe: Recipe) -> None:
    """Raise ``ConfigError`` if weights are turned, which a plain model would not know."""
    if recipe.rotate_inputs:
        raise ConfigError(
            "this model rotates inputs of its linear layers, and their weights are turned, of which"
            " a plain checkpoint says nothing: it would compute something else. Quantize it with"
            " qatc quantize, whose output says so, or take a recipe without rotate_inputs"
        )


def refuse_sharded(model: nn.Module, recipe: Recipe) -> None:
    """What a recipe adds to a model that is sharded already would be in no shard, nor learn."""
    if sharded_parts(model) and (recipe.weights.learned or recipe.kv.learned or recipe.center_keys):
        raise ConfigError(
            "the model is sharded, and the recipe adds learned scales or centers of keys to it;"
            " call qatc.prepare before fully_shard"
        )


def refuse_lost_scales(model: nn.Module, recipe: Recipe) -> None:
    """A runtime that stores scales in fp16 would turn small weights to nothing."""
    for name, parameter in _layer_weights(model, recipe):
        lost = minmax.why_scales_are_lost(parameter, recipe.weights_of(name))
        if lost is not None:
            raise ConfigError(
                f"{name} is not for the target {recipe.target}: {lost}; choose another target"
                f" (qatc, transformers, vllm), or keep it in float with --skip {name!r}"
            )


def _layer_weights(model: nn.Module, recipe: Recipe) -> Iterator[tuple[str, nn.Parameter]]:
    """Matrices of the layers that a recipe does not skip, by their full names."""
    for name, region in find_regions(model):
        for own, parameter in region.named_parameters():
            full = f"{name}.{own}" if name else own
            if parameter.dim() == 2 and not recipe.skips(full):
                yield full, parameter


def has_adapters(model: nn.Module) -> bool:
    """Whether layers of a model are wrapped by adapters, as peft does it."""
    return any("base_layer" in module._modules for module in model.modules())


def refuse_adapters(model: nn.Module) -> None:
    """Raise ``ConfigError`` if a model has adapters already."""
    if has_adapters(model):
        raise ConfigError(
            "the model has adapters (LoRA, say), which would be quantized like its own weights;"
            " prepare it first and add them then: get_peft_model(qatc.prepare(model, recipe), ...)"
        )

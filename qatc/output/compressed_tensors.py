"""What ``config.json`` says of quantized weights, so that compressed-tensors loads them.

Transformers and vLLM read it. The tensors themselves lie as :mod:`qatc.output.layouts` says:

============  ====================  ==========
weight bits   format                declared
============  ====================  ==========
2 to 4        ``pack-quantized``    4 bits
5 to 8        ``int-quantized``     8 bits
============  ====================  ==========

Narrower codes are valid codes of the declared width, so a runtime needs no support for 3 or 6
bits; the true bits are in ``qatc.json``. Where weights of several bits lie in both formats, the
linears of the format that most have are declared as a class, and the others by name.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch

from qatc.errors import ConfigError
from qatc.output.layouts import PACKED, PACKED_BITS, PLAIN, PLAIN_BITS, layout_of
from qatc.recipe.recipe import Recipe
from qatc.recipe.spec import QuantSpec

OWN_LAYOUT = "not for this runtime; run: qatc export"
"""Where compressed-tensors expects the name of a format, this one makes it refuse the checkpoint
and quote it, instead of reading codes as if they were weights."""


ROTATED = "its inputs are rotated online: run it by qatc"
"""The same where the weights are of a model whose inputs are rotated at run time. Of more than 50
characters pydantic leaves out the middle."""


def refuse_rotated(recipe: Recipe, runtime: str) -> None:
    """Raise ``ConfigError`` if a model of ``recipe`` needs a rotation, which no other runtime has.

    Its weights read rotated inputs: without the rotation it would compute nothing of use.
    """
    if recipe.rotate_inputs:
        raise ConfigError(
            f"this model rotates inputs of its linear layers while it runs"
            f" ({', '.join(recipe.rotate_inputs)}), which {runtime} does not; run it by qatc, or"
            " quantize it again without: with --target transformers, say, or a recipe that leaves"
            " out rotate_inputs"
        )


def loads_as_it_is(config: Mapping[str, Any]) -> bool:
    """Whether transformers finds all quantized weights where a ``config.json`` declares them."""
    groups = (config.get("quantization_config") or {}).get("config_groups", {})
    return all(group["format"] in (PACKED, PLAIN) for group in groups.values())


def joined(layouts: Collection[str]) -> str:
    """What a checkpoint that holds weights in these layouts is called as a whole."""
    return next(iter(layouts)) if len(set(layouts)) == 1 else "mixed-precision"


def quantization_config(
    recipe: Recipe,
    ignore: list[str],
    ends: Mapping[str, tuple[QuantSpec, QuantSpec, str]] | None = None,
    layouts: Mapping[str, Sequence[str]] | None = None,
) -> dict[str, Any]:
    """The ``quantization_config`` of ``config.json``.

    Args:
        recipe: what the model was trained with; weights must be quantized.
        ignore: names of the linear modules that stay float, the output head among them.
        ends: of output head and token embedding, if they are quantized, the spec of weight and
            input and the layout, by name of the module.
        layouts: names of the quantized linear modules of layers, see :func:`modules_by_layout`;
            ``None`` where all of them lie as ``recipe.weights`` do.
    """
    if layouts is None:
        layouts = {layout_of(recipe.weights): ()} if recipe.weights.quantizes else {}
    targets = [([name], *how) for name, how in sorted((ends or {}).items())]
    for layout in sorted(layouts, key=lambda layout: len(layouts[layout])):
        targets.append(([*layouts[layout]], recipe.weights, recipe.activations, layout))
    if layouts:  # the class comes last, as names of modules go before it
        targets[-1] = (["Linear"], *targets[-1][1:])
    groups = {f"group_{i}": _group(*target) for i, target in enumerate(targets)}
    if recipe.rotate_inputs:
        groups = {name: group | {"format": ROTATED} for name, group in groups.items()}
    return {
        "quant_method": "compressed-tensors",
        "format": joined({group["format"] for group in groups.values()}),
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": list(ignore),
        "kv_cache_scheme": None,
    }


def modules_by_layout(layouts: Mapping[str, str]) -> dict[str, list[str]]:
    """The modules whose weights lie in each layout.

    Args:
        layouts: of weights by name.
    """
    found: dict[str, list[str]] = {}
    for name, layout in sorted(layouts.items()):
        found.setdefault(layout, []).append(name.removesuffix(".weight"))
    return found


def _group(
    targets: list[str], weights: QuantSpec, inputs: QuantSpec, layout: str
) -> dict[str, Any]:
    declared = PLAIN_BITS if layout == PLAIN else PACKED_BITS
    group: dict[str, Any] = {
        "targets": targets,
        "weights": _arguments(declared, weights.group_size, "channel", dynamic=False),
        "input_activations": None,
        "output_activations": None,
        # Without it transformers infers int-quantized for every layer with quantized inputs, and
        # finds no weights where they are packed.
        "format": layout,
    }
    if inputs.quantizes:
        group["input_activations"] = _arguments(
            inputs.bits, inputs.group_size, "token", dynamic=True
        )
    return group


def find_float_linears(model: torch.nn.Module, weights: Collection[str]) -> list[str]:
    """Names of the linear modules of ``model`` whose weight is not among ``weights``.

    Raises:
        ConfigError: one of ``weights`` belongs to another kind of module, which a runtime would
            not dequantize.
    """
    linears = [n for n, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    tables = [n for n, module in model.named_modules() if isinstance(module, torch.nn.Embedding)]
    others = sorted(set(weights) - {f"{name}.weight" for name in (*linears, *tables)})
    if others:
        owner = type(model.get_submodule(others[0].removesuffix(".weight"))).__name__
        raise ConfigError(
            f"the quantized weight {others[0]} belongs to a {owner}, and compressed-tensors holds"
            f" torch.nn.Linear and torch.nn.Embedding only; add {others[0]!r} to the recipe's skip"
        )
    return [name for name in linears if f"{name}.weight" not in weights]


def _arguments(bits: int, group_size: int | None, per_row: str, *, dynamic: bool) -> dict[str, Any]:
    return {
        "num_bits": bits,
        "type": "int",
        "symmetric": True,
        "strategy": per_row if group_size is None else "group",
        "group_size": group_size,
        "dynamic": dynamic,
    }

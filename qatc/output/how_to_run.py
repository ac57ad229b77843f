"""How a model card says that an output is run and measured: the commands, and what differs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qatc.output import torchao, vllm
from qatc.output.compressed_tensors import loads_as_it_is
from qatc.output.layouts import TORCHAO, Form
from qatc.recipe.recipe import Recipe


def runtimes(metadata: Mapping[str, Any], config: Mapping[str, Any]) -> list[str]:
    """Each runtime that loads it, with what differs there."""
    recipe, trust = metadata["recipe"], "auto_map" in config
    flag, argument = (" --trust-remote-code", ", trust_remote_code=True") if trust else ("", "")
    sections = []
    if recipe["kv"]["bits"] == 16 or recipe["kv_site"] == "cache":
        sections += [
            "**qatc**, on integers, with the numerics that it was trained for:",
            "```python\n"
            "import qatc\n"
            "from transformers import AutoTokenizer\n\n"
            f'model = qatc.load("THIS_DIRECTORY"{argument})\n'
            f'tokenizer = AutoTokenizer.from_pretrained("THIS_DIRECTORY"{argument})\n'
            'ids = tokenizer("Once upon a time", return_tensors="pt")["input_ids"]\n'
            "print(tokenizer.decode(model.generate(input_ids=ids, max_new_tokens=20)[0]))\n"
            "```",
            f'```\nqatc generate THIS_DIRECTORY --prompt "Once upon a time"{flag}\n```',
        ]
    if "rotate_inputs" in recipe:
        return [*sections, "Other runtimes do not rotate inputs, and cannot run it."]
    if not loads_as_it_is(config):
        return [
            *sections,
            "Head and embedding are stored here as qatc alone reads them."
            " `qatc export THIS_DIRECTORY --output OTHER` writes the same model for transformers.",
        ]
    reader = reader_of(config)
    needs = f" (`pip install {reader}`)" if reader else ""
    sections += [
        f"**transformers**{needs}{_in_words(_differences(recipe, config))}:",
        "```python\n"
        "from transformers import AutoModelForCausalLM\n\n"
        f'model = AutoModelForCausalLM.from_pretrained("THIS_DIRECTORY"{argument})\n'
        "```",
    ]
    if reader == TORCHAO and recipe["activations"]["bits"] != 16 and config["dtype"] != "float32":
        sections.append(
            f"torchao keeps the scales of activations in {config['dtype']}, unless `torch.compile`"
            " compiles the model."
        )
    elif reader == "compressed-tensors":
        sections += _in_vllm(Recipe.from_dict(recipe), config, flag)
    return sections


def _in_vllm(recipe: Recipe, config: Mapping[str, Any], flag: str) -> list[str]:
    form = vllm.form_of(recipe, config)
    read = f"by the source of vLLM {vllm.VERSION}, where this model has not been tried"
    if reason := vllm.why_not(recipe, form):
        return [f"**vLLM** does not run it, {read}: {reason}."]
    different = " and ".join(vllm.differences(recipe, form))
    computes = f", with {different}" if different else ""
    switch = f"; {needed}" if (needed := vllm.needs(recipe, form)) else ""
    return [
        f"**vLLM**{computes}, {read}{switch}:",
        f"```\n{vllm.command('THIS_DIRECTORY', recipe, form)}{flag}\n```",
        *_other_layouts(recipe, form),
    ]


def _other_layouts(recipe: Recipe, form: Form) -> list[str]:
    """Exports in which vLLM computes the same by other kernels, where this layout asks for one."""
    found: list[str] = []
    if form != "qatc" or vllm.needs(recipe, form) is None:
        return found
    if vllm.why_not(recipe, "vllm") is None:
        found.append("`--format vllm` is for its int8 kernels, at a byte a weight")
    if vllm.why_not(recipe, "vllm-marlin") is None:
        found.append(f"`--format vllm-marlin` for Marlin, started with `{vllm.MARLIN}`")
    if not found:
        return found
    return [f"Of `qatc export THIS_DIRECTORY --output OTHER`, {', and '.join(found)}."]


def reader_of(config: Mapping[str, Any]) -> str | None:
    """The package by which transformers loads the weights, if it takes one."""
    method: str | None = config.get("quantization_config", {}).get("quant_method")
    return method


def _in_words(differences: Sequence[str]) -> str:
    if not differences:
        return ", with the same numerics"
    return ", with other numerics: " + " and ".join(differences)


def _differences(recipe: Mapping[str, Any], config: Mapping[str, Any]) -> list[str]:
    """What plain transformers computes in another way than the model was trained for."""
    if reader_of(config) == TORCHAO:
        return torchao.differences(Recipe.from_dict(recipe))
    activations, kv = recipe["activations"], recipe["kv"]
    found = []
    if kv["bits"] != 16:
        found.append(f"no KV quantization ({Recipe.from_dict(recipe).kv_bits} bits here)")
    declared = vllm.form_of(Recipe.from_dict(recipe), config) != "vllm-marlin"
    if activations["bits"] != 16 and (recipe["weights"]["bits"] == 16 or not declared):
        found.append(f"no quantized inputs of linear layers ({activations['bits']} bits here)")
    elif activations["bits"] != 16 and activations["range"] != "full":
        largest = (1 << (activations["bits"] - 1)) - 1
        trained = f"max / {largest}"
        if activations["range"] == "affine":
            trained = "a zero point beside the scale"
        found.append(
            f"another activation rule (scale = max / {largest + 0.5:g}, where this model was"
            f" trained with {trained})"
        )
    return found


def measuring(metadata: Mapping[str, Any], config: Mapping[str, Any], teacher: str) -> list[str]:
    """How its figures are measured again; ``teacher`` is the model that it was made from."""
    recipe, trust = metadata["recipe"], "auto_map" in config
    flag, argument = (" --trust-remote-code", ", trust_remote_code=True") if trust else ("", "")
    sections = [
        f"```\nqatc evaluate THIS_DIRECTORY --text FILE --teacher {teacher}{flag}\n```",
    ]
    differences = _differences(recipe, config)
    if not loads_as_it_is(config):
        cannot = "lm-eval's own `hf` model and plain transformers cannot load this form"
        if "rotate_inputs" not in recipe:
            cannot += ", and measure other numerics on an exported one"
        sections.insert(0, f"{cannot}. To measure what it was trained for:")
    elif differences:
        sections.insert(
            0,
            "lm-eval's own `hf` model and plain transformers measure other numerics, with"
            f" {' and '.join(differences)}. Their figures are not those of this model. To measure"
            " what it was trained for:",
        )
    if recipe["kv"]["bits"] == 16 or recipe["kv_site"] == "cache":
        sections += [
            "In lm-eval (`pip install 'lm-eval[hf]'`), hand over the model that `qatc.load` makes:",
            "```python\n"
            "import lm_eval\n"
            "import qatc\n"
            "from lm_eval.models.huggingface import HFLM\n"
            "from transformers import AutoTokenizer\n\n"
            f'model = qatc.load("THIS_DIRECTORY"{argument})\n'
            f'tokenizer = AutoTokenizer.from_pretrained("THIS_DIRECTORY"{argument})\n'
            "wrapped = HFLM(pretrained=model, tokenizer=tokenizer)\n"
            'print(lm_eval.simple_evaluate(model=wrapped, tasks=["hellaswag"])["results"])\n'
            "```",
        ]
    return sections

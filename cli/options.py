"""Options that several commands share, and how they become library values."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from qatc.data.config import CorpusConfig
from qatc.errors import ConfigError, QatcError
from qatc.recipe.recipe import DEFAULT_SKIP, Recipe
from qatc.storage.files import read_yaml

Output = Annotated[Path, typer.Argument(help="Directory written by qatc quantize.")]
Model = Annotated[
    str, typer.Option("--model", help="Hub name or directory of the model.", show_default=False)
]
Bits = Annotated[
    str | None,
    typer.Option(
        "--bits",
        help="Bits of weights, activations and KV cache: 2 to 8, or 16 for none. Default: 4-8-4.",
        show_default=False,
    ),
]
RecipeFile = Annotated[
    Path | None,
    typer.Option("--recipe", help="YAML recipe, instead of --bits.", show_default=False),
]
GroupSize = Annotated[
    int | None,
    typer.Option(
        "--group-size",
        help="Inputs that share a weight scale. Default: all, one scale per output channel.",
        show_default=False,
    ),
]
KVRange = Annotated[
    str | None,
    typer.Option(
        "--kv-range",
        help="Range of K and V: restricted, full, signed or asymmetric (from the least to the"
        " greatest value; its offsets take 4 bytes per token and head). Default: what preset and"
        " target have.",
        show_default=False,
    ),
]
KVSite = Annotated[
    str | None,
    typer.Option(
        "--kv-site",
        help="Where K and V are quantized: cache (default) or projection (as in the paper's code).",
        show_default=False,
    ),
]
Skip = Annotated[
    list[str] | None,
    typer.Option(
        "--skip",
        help="Pattern of parameter names that stay in full precision, besides embeddings and"
        " lm_head; may be repeated.",
        show_default=False,
    ),
]
HeadBits = Annotated[
    int | None,
    typer.Option(
        "--head-bits",
        help="Bits of the output head (lm_head): 2 to 8. Default: 16, for none.",
        show_default=False,
    ),
]
EmbeddingBits = Annotated[
    int | None,
    typer.Option(
        "--embedding-bits",
        help="Bits of the token embedding: 2 to 8. Where it is tied to the head, give both the"
        " same, and the weight is stored once. Default: 16, for none.",
        show_default=False,
    ),
]
Target = Annotated[
    str | None,
    typer.Option(
        "--target",
        help="Runtime to train for: qatc (default), transformers, torchao, vllm, llama.cpp (gguf is"
        " the same) or executorch. Sets how activations, K and V are rounded.",
        show_default=False,
    ),
]
Preset = Annotated[
    str | None,
    typer.Option(
        "--preset",
        help="paper (default): symmetric MinMax, as LLM-QAT; or best, which loses least at equal"
        " bits: signed codes and learned scales in the layers, centered keys.",
        show_default=False,
    ),
]
Samples = Annotated[int, typer.Option("--samples", help="Sequences to generate.")]
Strategy = Annotated[
    str,
    typer.Option(
        "--strategy",
        help="hybrid, sample or greedy; or chat: conversations by the chat template.",
    ),
]
GreedyTokens = Annotated[
    str,
    typer.Option(
        "--greedy-tokens", help="Greedy tokens of hybrid, and at the start of chat's answers."
    ),
]
Turns = Annotated[
    int | None,
    typer.Option(
        "--turns",
        help="Answers in a conversation of chat, at most. Default: as many as fit.",
        show_default=False,
    ),
]
RecordLogits = Annotated[
    str | None,
    typer.Option(
        "--record-logits",
        help="Record of the teacher, at each token, its most likely ones and draws of the others,"
        " such as 32+32, for quantize --teacher recorded. Default: nothing, or 32+32 if that is"
        " asked for.",
        show_default=False,
    ),
]
Slots = Annotated[
    str, typer.Option(help="Sequences side by side; auto: as many as are fast and fit into memory.")
]
Rows = Annotated[int, typer.Option("--batch-size", help="Rows per forward pass.")]
LoraRank = Annotated[int, typer.Option(help="Rank of the updates of --train lora.")]
Seed = Annotated[int, typer.Option("--seed", help="Seed of everything that is drawn.")]
DType = Annotated[str, typer.Option("--dtype", help="Compute in auto, float32 or bfloat16.")]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")
]
Device = Annotated[str, typer.Option("--device", help="Torch device, or auto.")]
Compile = Annotated[
    bool | None,
    typer.Option(
        "--compile/--no-compile", help="Compile the graphs. Default: if this machine can."
    ),
]
Kernels = Annotated[
    str,
    typer.Option(
        "--kernels",
        help="What runs the quantized linears: auto (the fastest exact kernel), torchao (torchao's,"
        " where one is exact) or qatc (none of torchao's).",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace an existing output, once the new one is done.")
]

BITS = "4-8-4"
"""The default of ``--bits``."""

GREEDY_TOKENS = "-".join(map(str, CorpusConfig.greedy_tokens))
"""The default of ``--greedy-tokens``, as :func:`parse_range` reads it."""


def spelled(values: Mapping[str, Any]) -> list[str]:
    """The options, among these parameters of a command, that were given a value."""
    given = [name for name, value in values.items() if value not in (None, [], False)]
    return [f"--{name.replace('_', '-')}" for name in given]


def build_recipe(
    bits: str | None,
    recipe: Path | None,
    group_size: int | None = None,
    kv_site: str | None = None,
    skip: list[str] | None = None,
    target: str | None = None,
    head_bits: int | None = None,
    embedding_bits: int | None = None,
    preset: str | None = None,
    kv_range: str | None = None,
    spelled_out: Recipe | None = None,
) -> Recipe:
    """The recipe that the options describe, or the one that a run's file spells out."""
    if recipe is not None or spelled_out is not None:
        values = {"bits": bits, "group_size": group_size, "kv_site": kv_site, "skip": skip}
        values |= {"target": target, "head_bits": head_bits, "embedding_bits": embedding_bits}
        values |= {"preset": preset, "kv_range": kv_range}
        if clashing := spelled(values):
            source = "the recipe in --config" if recipe is None else "--recipe"
            raise ConfigError(
                f"{source} says it all; leave out {', '.join(clashing)} or change the file"
            )
        if recipe is not None:
            return Recipe.from_yaml(recipe)
        assert spelled_out is not None
        return spelled_out
    changes: dict[str, Any] = {} if kv_site is None else {"kv_site": kv_site}
    changes |= {} if target is None else {"target": target}
    changes |= {} if preset is None else {"preset": preset}
    changes |= {} if kv_range is None else {"kv_range": kv_range}
    own = {"head_bits": head_bits, "embedding_bits": embedding_bits}
    changes |= {name: value for name, value in own.items() if value is not None}
    patterns = DEFAULT_SKIP + tuple(skip or ())
    return Recipe.from_bits(bits or BITS, group_size=group_size, skip=patterns, **changes)


def parse_range(text: str) -> tuple[int, int]:
    """``"3-5"`` or ``"4"`` as a range of whole numbers."""
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", text.strip())
    if match is None:
        raise ConfigError(f"--greedy-tokens takes a number or a range such as 3-5; got {text!r}")
    low = int(match.group(1))
    return low, int(match.group(2) or low)


def parse_slots(text: str) -> int | Literal["auto"]:
    """``"auto"`` or a number of sequences that decode side by side."""
    if text.strip() == "auto":
        return "auto"
    try:
        return int(text)
    except ValueError:
        raise ConfigError(
            f"the number of sequences side by side is a whole number, or auto; got {text!r}"
        ) from None


_RECIPE = "qatc.recipe"
"""Where a command's context keeps the recipe that its run file spells out."""


def _read_run_file(
    context: typer.Context, parameter: typer.CallbackParam, file: Path | None
) -> Path | None:
    """Let what is in the file stand where the command line says nothing."""
    if file is None or context.resilient_parsing:
        return file
    try:
        plain = read_yaml(
            file, "the run file", "holds no options; it takes lines such as 'steps: 300'"
        )
        values = {str(key).replace("-", "_"): value for key, value in plain.items()}
        if isinstance(values.get("recipe"), Mapping):  # as runs write it, and no file's name
            context.meta[_RECIPE] = Recipe.from_dict(values.pop("recipe"))
    except QatcError as error:
        raise typer.BadParameter(str(error)) from None
    known = {p.name for p in context.command.params if p.name} - {parameter.name}
    for name in values:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1) or sorted(known)
            options = ", ".join(other.replace("_", "-") for other in near)
            raise typer.BadParameter(f"{file}: there is no option {name!r}; there is {options}")
    context.default_map = values
    return file


def recipe_of_run_file(context: typer.Context) -> Recipe | None:
    """The recipe that is spelled out in the file of this command, if there is one."""
    found: Recipe | None = context.meta.get(_RECIPE)
    return found


RunFile = Annotated[
    Path | None,
    typer.Option(
        "--config",
        help="YAML file of options, such as the run.yaml of an output; options given here win.",
        is_eager=True,
        callback=_read_run_file,
        show_default=False,
    ),
]

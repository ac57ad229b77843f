"""The models that the speed benchmarks compare, and how they take turns."""

from __future__ import annotations

import statistics
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

from benchmarks import common, llama, models
from qatc.recipe.recipe import Recipe
from qatc.runtime.model import load

SHAPES = {
    "110M": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12,
             "num_attention_heads": 12, "num_key_value_heads": 12, "head_dim": 64},
    "1B": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
           "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64},
    "7B": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
           "num_attention_heads": 32, "num_key_value_heads": 32, "head_dim": 128},
}  # fmt: skip
FLOAT = {"fp32": torch.float32, "bf16": torch.bfloat16}
BITS = ["8-8-8", "4-8-8", "4-8-4"]


class Variant(NamedTuple):
    """A model, and how it is called.

    Attributes:
        model: a transformers causal LM; for llama.cpp, the path of a GGUF file.
        compiled: whether transformers' own static cache and a compiled forward are used.
        quantized_cache: whether transformers' QuantizedCache is.
    """

    model: Any
    compiled: bool = False
    quantized_cache: bool = False

    @property
    def is_gguf(self) -> bool:
        """Whether llama.cpp runs it."""
        return isinstance(self.model, Path)


def add_options(parser: ArgumentParser) -> None:
    """The options that all speed benchmarks have."""
    parser.add_argument("--shape", default="110M", choices=SHAPES)
    parser.add_argument(
        "--model", type=lambda name: Path(models.find(name)), help="a LLaMA, instead of a shape"
    )
    parser.add_argument("--name", help="of the result, for --model")
    parser.add_argument("--variants", nargs="*", default=["*"], help="patterns of their names")
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument(
        "--bits",
        nargs="*",
        default=BITS,
        help="4-8-4+8 has head and embedding in 8 bits as well,"
        " and 4-8-4@torchao runs on torchao's kernels",
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--device", default="cpu")


def name_of(options: Namespace) -> str:
    """What a result is named after."""
    if options.model is None:
        return str(options.shape)
    return str(options.name or options.model.name)


def shape_of(options: Namespace) -> dict[str, int]:
    """The shape asked for."""
    if options.model is not None:
        config = AutoConfig.from_pretrained(options.model)
        return {name: getattr(config, name) for name in SHAPES["110M"]}
    changes = {"num_hidden_layers": options.layers} if options.layers else {}
    return SHAPES[options.shape] | changes


def config_of(options: Namespace) -> LlamaConfig:
    """The config of the model or of the shape asked for."""
    if options.model is not None:
        config: LlamaConfig = AutoConfig.from_pretrained(options.model)
        return config
    return LlamaConfig(
        vocab_size=32000,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        **shape_of(options),  # type: ignore[arg-type]
    )


def build(options: Namespace, scratch: Path) -> tuple[dict[str, Variant], dict[str, str]]:
    """All variants by name, and why others do not run here."""
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    config = config_of(options)
    variants: dict[str, Variant] = {}
    for name, dtype in FLOAT.items():
        model = _plain(config, options, dtype)
        variants[f"{name} eager"] = Variant(model)
        variants[f"{name} compiled"] = Variant(model, compiled=True)
    absent = _add_torchao(variants, config, options)
    reason = llama.why_not(variants["fp32 eager"].model)
    if reason is None and _chosen("llama.cpp Q4_0", options):
        files = llama.write(variants["fp32 eager"].model, scratch / "gguf")
        variants |= {f"llama.cpp {kind}": Variant(path) for kind, path in files.items()}
    elif reason is not None:
        absent["llama.cpp"] = reason
    reason = _why_no_quantized_cache(config)
    if reason is None:
        variants["bf16, QuantizedCache 4 bits"] = Variant(
            variants["bf16 eager"].model, quantized_cache=True
        )
    else:
        absent["bf16, QuantizedCache 4 bits"] = reason
    for bits in options.bits:
        source = variants["fp32 eager"].model
        sizes, _, library = bits.partition("@")
        layers, _, ends = sizes.partition("+")
        own: Any = {"head_bits": int(ends), "embedding_bits": int(ends)} if ends else {}
        recipe = Recipe.from_bits(layers, target=library or "qatc", **own)
        output = common.random_output(scratch / bits, recipe, source)
        kernels: Any = library or "auto"
        loaded = load(output, device=options.device, dtype=torch.bfloat16, kernels=kernels)
        on = f", {library}'s kernels" if library else ""
        variants[f"qatc {sizes}{on}"] = Variant(loaded)
    return {name: v for name, v in variants.items() if _chosen(name, options)}, absent


def _chosen(name: str, options: Namespace) -> bool:
    return any(fnmatch(name, pattern) for pattern in options.variants)


def _plain(config: LlamaConfig, options: Namespace, dtype: torch.dtype) -> Any:
    if options.model is None:
        model: Any = LlamaForCausalLM(config).eval().to(options.device, dtype)
    else:
        model = LlamaForCausalLM.from_pretrained(options.model, dtype=dtype).eval()
        model.to(options.device)
    model.set_attn_implementation("sdpa")
    return model


def _add_torchao(
    variants: dict[str, Variant], config: LlamaConfig, options: Namespace
) -> dict[str, str]:
    """torchao's own int8 and int4, compiled as its documentation has it."""
    from torchao.quantization import (
        Int4WeightOnlyConfig,
        Int8DynamicActivationInt8WeightConfig,
        quantize_,
    )

    absent: dict[str, str] = {}
    schemes: dict[str, Callable[[], Any]] = {
        "torchao W8A8 compiled": lambda: Int8DynamicActivationInt8WeightConfig(version=2),
        "torchao W4A16 compiled": lambda: Int4WeightOnlyConfig(group_size=128),
    }
    for name, make in schemes.items():
        if not _chosen(name, options):
            continue
        model = _plain(config, options, torch.bfloat16)
        try:
            quantize_(
                model,
                make(),
                lambda m, path: isinstance(m, torch.nn.Linear) and path != "lm_head",
            )
            model(input_ids=torch.zeros((1, 2), dtype=torch.long, device=options.device))
        except (ImportError, NotImplementedError, AssertionError, RuntimeError) as error:
            absent[name] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            continue
        variants[name] = Variant(model, compiled=True)
    return absent


def _why_no_quantized_cache(config: LlamaConfig) -> str | None:
    from transformers.cache_utils import QuantizedCache

    try:
        QuantizedCache(backend="quanto", config=config, nbits=4)
    except ImportError as error:
        return str(error)
    return None


def take_turns(
    steps: dict[str, Callable[[], Any]], rounds: int, repeat: int, device: str
) -> dict[str, list[float]]:
    """Seconds per call of every step: ``rounds`` figures, each the mean of ``repeat`` calls.

    A first call of every turn is not counted: it finds the processor's caches full of what the
    step before it left, code included, as it would not where nothing else runs.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            step()
            _synchronize(device)
            started = time.perf_counter()
            for _ in range(repeat):
                step()
            _synchronize(device)
            times[name].append((time.perf_counter() - started) / repeat)
    return times


def medians(times: dict[str, list[float]]) -> dict[str, float]:
    """The median of each."""
    return {name: statistics.median(found) for name, found in times.items()}


def ratios(figures: dict[str, float]) -> dict[str, dict[str, float]]:
    """Every qatc figure as a multiple of the better of eager and compiled, fp32 and bf16."""
    best = {}
    for dtype in FLOAT:
        measured = [figures[n] for n in (f"{dtype} eager", f"{dtype} compiled") if n in figures]
        if measured:
            best[dtype] = max(measured)
    return {
        name: {f"times the best {dtype}": round(value / best[dtype], 2) for dtype in best}
        for name, value in figures.items()
        if name.startswith("qatc")
    }


def _synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()

"""Decoding speed: tokens per second and bytes, full precision against integers.

    python benchmarks/decode.py --threads 2 --context 128 --context 4096 --batch 1 --batch 8

A random-weight LLaMA (about 110 million parameters by default) decodes behind a prompt of random
tokens. All variants are built first; then they take turns, a few tokens each, round by round, so
that what else the machine does hits them alike. The figure is the median of the rounds.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import torch
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

from qatc.recipe import Recipe
from qatc.runtime import load, memory

SHAPES = {
    "110M": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12,
             "num_attention_heads": 12, "num_key_value_heads": 12, "head_dim": 64},
    "1B": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
           "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64},
    "7B": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
           "num_attention_heads": 32, "num_key_value_heads": 32, "head_dim": 128},
}  # fmt: skip
FLOAT = {"fp32": torch.float32, "bf16": torch.bfloat16}
Step = Callable[[], Any]


def main() -> None:
    """Run the benchmark and write its result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="110M", choices=SHAPES)
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has")
    parser.add_argument("--context", type=int, action="append", required=True)
    parser.add_argument("--batch", type=int, action="append", required=True)
    parser.add_argument("--bits", nargs="*", default=["8-8-8", "4-8-8", "4-8-4"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=8, help="tokens a variant decodes a round")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    shape = SHAPES[arguments.shape]
    if arguments.layers:
        shape = shape | {"num_hidden_layers": arguments.layers}
    config = LlamaConfig(
        vocab_size=32000, max_position_embeddings=8192, tie_word_embeddings=True, **shape
    )
    runs = []
    with tempfile.TemporaryDirectory(prefix="qatc-decode-") as scratch, torch.inference_mode():
        models = build(config, arguments, Path(scratch))
        for batch in arguments.batch:
            for context in arguments.context:
                figures = measure(models, config, batch, context, arguments)
                runs.append({"batch": batch, "context": context, "tokens_per_second": figures})
                print(batch, context, {k: round(v, 2) for k, v in figures.items()}, flush=True)
    sizes = {
        name: vars(memory(model)) for name, (model, _) in models.items() if name in arguments.bits
    }
    common.save(
        f"decode-{arguments.shape}-{arguments.device}",
        {
            "shape": shape,
            "threads": torch.get_num_threads(),
            "rounds": arguments.rounds,
            "tokens": arguments.tokens,
            "dtype_of_the_rest": "bf16",
            "bytes": sizes,
            "runs": runs,
        },
    )


def build(config: Any, arguments: Any, scratch: Path) -> dict[str, tuple[Any, bool]]:
    """Every variant: the model, and whether it is transformers' own compiled one."""
    torch.manual_seed(0)
    models: dict[str, tuple[Any, bool]] = {}
    for name, dtype in FLOAT.items():
        model: Any = LlamaForCausalLM(config).eval().to(arguments.device, dtype)
        model.set_attn_implementation("sdpa")
        models[f"{name} eager"] = model, False
        models[f"{name} compiled"] = model, True
    source = models["fp32 eager"][0]
    for bits in arguments.bits:
        output = common.random_output(scratch / bits, Recipe.from_bits(bits), source)
        models[bits] = load(output, device=arguments.device, dtype=torch.bfloat16), False
    return models


def measure(
    models: dict[str, tuple[Any, bool]], config: Any, batch: int, context: int, arguments: Any
) -> dict[str, float]:
    """Tokens per second of every variant, over all rows of the batch."""
    torch._dynamo.reset()
    ids = torch.randint(config.vocab_size, (batch, context), device=arguments.device)
    steps = {n: stepper(m, c, ids, arguments) for n, (m, c) in models.items()}
    for step in steps.values():
        for _ in range(2):  # compiles
            step()
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(arguments.rounds):
        for name, step in steps.items():
            synchronize(arguments.device)
            started = time.perf_counter()
            for _ in range(arguments.tokens):
                step()
            synchronize(arguments.device)
            times[name].append((time.perf_counter() - started) / arguments.tokens)
    return {name: batch / statistics.median(found) for name, found in times.items()}


def stepper(model: Any, compiled: bool, ids: torch.Tensor, arguments: Any) -> Step:
    """A function that decodes one token for every row, behind the prompt."""
    new = ids[:, -1:]
    room = ids.shape[1] + (arguments.rounds + 1) * arguments.tokens + 8
    cache = StaticCache(model.config, max_cache_len=room) if compiled else None
    cache = model(input_ids=ids, past_key_values=cache, use_cache=True).past_key_values
    forward = torch.compile(model.forward) if compiled else model

    def step() -> Any:
        return forward(input_ids=new, past_key_values=cache, use_cache=True)

    return step


def synchronize(device: str) -> None:
    """Wait for the GPU, if it is one."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()

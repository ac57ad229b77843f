"""Decoding speed: tokens per second and bytes, full precision against integers.

    python -m benchmarks.decode --threads 2

A random-weight LLaMA (about 110 million parameters by default) decodes behind a prompt of random
tokens, at batch 1 and 8 and behind 128 and 4096 tokens; ``--model DIR`` takes a real LLaMA instead.
llama.cpp is a variant of batch 1 where the package llama-cpp-python is installed. All variants are
built first; then they take turns, a few tokens each, round by round, so that what else the machine
does hits them alike. The figure is the median of the rounds.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import StaticCache
from transformers.cache_utils import QuantizedCache

from benchmarks import common, llama, variants
from benchmarks.variants import Variant
from qatc.report.usage import memory


def main() -> None:
    """Run the benchmark and write its result."""
    parser = argparse.ArgumentParser(description=__doc__)
    variants.add_options(parser)
    parser.add_argument("--context", type=int, nargs="+", default=[128, 4096])
    parser.add_argument("--tokens", type=int, default=8, help="tokens a variant decodes a round")
    options = parser.parse_args()
    runs = []
    with tempfile.TemporaryDirectory(prefix="qatc-decode-") as scratch, torch.inference_mode():
        built, absent = variants.build(options, Path(scratch))
        for batch in options.batch:
            for context in options.context:
                runs.append(measure(built, batch, context, options))
    sizes = {name: vars(memory(v.model)) for name, v in built.items() if name.startswith("qatc")}
    common.save(
        f"decode-{variants.name_of(options)}-{options.device}",
        {
            "shape": variants.shape_of(options),
            "threads": torch.get_num_threads(),
            "rounds": options.rounds,
            "tokens": options.tokens,
            "dtype_of_the_rest": "bf16",
            "not_run": absent,
            "bytes": sizes,
            "runs": runs,
        },
    )


def measure(
    built: dict[str, Variant], batch: int, context: int, options: argparse.Namespace
) -> dict[str, Any]:
    """Tokens per second of every variant, over all rows of the batch."""
    torch._dynamo.reset()
    ids = torch.randint(32000, (batch, context), device=options.device)
    alone = {name: v for name, v in built.items() if batch == 1 or not v.is_gguf}
    steps = {name: stepper(variant, ids, options) for name, variant in alone.items()}
    for step in steps.values():
        for _ in range(2):  # compiles
            step()
    times = variants.take_turns(steps, options.rounds, options.tokens, options.device)
    figures = {name: batch / seconds for name, seconds in variants.medians(times).items()}
    print(batch, context, {name: round(value, 1) for name, value in figures.items()}, flush=True)
    return {
        "batch": batch,
        "context": context,
        "tokens_per_second": figures,
        "ratios": variants.ratios(figures),
        "seconds_per_step": times,
    }


def stepper(variant: Variant, ids: torch.Tensor, options: argparse.Namespace) -> Callable[[], Any]:
    """A function that decodes one token for every row, behind the prompt."""
    model, new = variant.model, ids[:, -1:]
    room = ids.shape[1] + options.rounds * (options.tokens + 1) + 8
    if variant.is_gguf:
        loaded = llama.Llama(model, room)
        loaded.prefill(ids[0].tolist())
        return partial(loaded.decode, int(new))
    cache: Any = None
    if variant.compiled:
        cache = StaticCache(model.config, max_cache_len=room)
    elif variant.quantized_cache:
        cache = QuantizedCache(backend="quanto", config=model.config, nbits=4)
    for part in ids.split(512, dim=1):  # a prefill of all at once needs too much memory at batch 8
        cache = model(input_ids=part, past_key_values=cache, use_cache=True).past_key_values
    forward = torch.compile(model.forward) if variant.compiled else model

    def step() -> Any:
        return forward(input_ids=new, past_key_values=cache, use_cache=True)

    return step


if __name__ == "__main__":
    main()

"""Prefill speed: prompt tokens per second, full precision against integers.

    python -m benchmarks.prefill --threads 2

The models are those of ``decode.py``, and take turns as they do there. A prefill fills an empty
KV cache; only the logits of the last token are computed.
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


def main() -> None:
    """Run the benchmark and write its result."""
    parser = argparse.ArgumentParser(description=__doc__)
    variants.add_options(parser)
    parser.set_defaults(batch=[1])
    parser.add_argument("--length", type=int, nargs="+", default=[512, 2048])
    options = parser.parse_args()
    runs = []
    with tempfile.TemporaryDirectory(prefix="qatc-prefill-") as scratch, torch.inference_mode():
        built, absent = variants.build(options, Path(scratch))
        for batch in options.batch:
            for length in options.length:
                runs.append(measure(built, batch, length, options))
    common.save(
        f"prefill-{variants.name_of(options)}-{options.device}",
        {
            "shape": variants.shape_of(options),
            "threads": torch.get_num_threads(),
            "rounds": options.rounds,
            "dtype_of_the_rest": "bf16",
            "not_run": absent,
            "runs": runs,
        },
    )


def measure(
    built: dict[str, Variant], batch: int, length: int, options: argparse.Namespace
) -> dict[str, Any]:
    """Prompt tokens per second of every variant, over all rows of the batch."""
    torch._dynamo.reset()
    ids = torch.randint(32000, (batch, length), device=options.device)
    alone = {name: v for name, v in built.items() if batch == 1 or not v.is_gguf}
    steps = {name: prefiller(variant, ids) for name, variant in alone.items()}
    for step in steps.values():
        for _ in range(2):  # compiles
            step()
    times = variants.take_turns(steps, options.rounds, 1, options.device)
    tokens = batch * length
    figures = {name: tokens / seconds for name, seconds in variants.medians(times).items()}
    print(batch, length, {name: round(value) for name, value in figures.items()}, flush=True)
    return {
        "batch": batch,
        "length": length,
        "tokens_per_second": figures,
        "ratios": variants.ratios(figures),
        "seconds": times,
    }


def prefiller(variant: Variant, ids: torch.Tensor) -> Callable[[], Any]:
    """A function that fills a new cache with the prompt."""
    model = variant.model
    if variant.is_gguf:
        return partial(llama.Llama(model, ids.shape[1] + 8).prefill, ids[0].tolist())
    forward = torch.compile(model.forward) if variant.compiled else model
    static = StaticCache(model.config, max_cache_len=ids.shape[1]) if variant.compiled else None

    def step() -> Any:
        cache: Any = static
        if static is not None:
            static.reset()
        elif variant.quantized_cache:
            cache = QuantizedCache(backend="quanto", config=model.config, nbits=4)
        return forward(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)

    return step


if __name__ == "__main__":
    main()

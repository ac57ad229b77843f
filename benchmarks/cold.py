"""The first token, cold: does it take longer the deeper a model is?

    python -m benchmarks.cold --layers 8 32

For every depth, in a new process with empty compile caches: load, then generate one token and one
more, and count the graphs that were compiled. Depths take turns.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import common
from qatc.recipe.recipe import Recipe


def main() -> None:
    """Run the benchmark and write its result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--bits", default="4-8-4")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(first_tokens(Path(options.child))))
        return
    runs: dict[int, list[dict[str, Any]]] = {layers: [] for layers in options.layers}
    with tempfile.TemporaryDirectory(prefix="qatc-cold-") as scratch:
        for layers in options.layers:
            write(Path(scratch) / str(layers), layers, options)
        for number in range(options.rounds):
            for layers in options.layers:
                cache = Path(scratch) / f"cache-{layers}-{number}"
                environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(cache)}
                output = str(Path(scratch) / str(layers))
                done = subprocess.run(
                    [sys.executable, "-m", "benchmarks.cold", "--child", output],
                    env=environment, cwd=common.ROOT, check=True, stdout=subprocess.PIPE, text=True,
                )  # fmt: skip
                runs[layers].append(json.loads(done.stdout.splitlines()[-1]))
                print(layers, runs[layers][-1], flush=True)
    first = {n: statistics.median(r["first_token_seconds"] for r in runs[n]) for n in runs}
    result = {"hidden": options.hidden, "bits": options.bits, "runs": runs, "first_token": first}
    common.save("cold", result | {"ratio": max(first.values()) / min(first.values())})


def write(directory: Path, layers: int, options: argparse.Namespace) -> None:
    """An output of a random model of this depth."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1000, hidden_size=options.hidden, intermediate_size=2 * options.hidden,
        num_hidden_layers=layers, num_attention_heads=8, num_key_value_heads=4,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    common.random_output(directory, Recipe.from_bits(options.bits), model)


@torch.inference_mode()
def first_tokens(directory: Path) -> dict[str, Any]:
    """Seconds until the first and the second token, and graphs compiled."""
    from torch._dynamo.utils import counters

    from qatc.runtime.model import load

    started = time.perf_counter()
    model: Any = load(directory)
    loaded = time.perf_counter()
    ids = torch.arange(16).unsqueeze(0)
    out = model(input_ids=ids, use_cache=True)
    first = time.perf_counter()
    model(input_ids=ids[:, :1], past_key_values=out.past_key_values, use_cache=True)
    second = time.perf_counter()
    return {
        "load_seconds": loaded - started,
        "first_token_seconds": first - loaded,
        "second_token_seconds": second - first,
        "graphs": counters["stats"]["unique_graphs"],
    }


if __name__ == "__main__":
    main()

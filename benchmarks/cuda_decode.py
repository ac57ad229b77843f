"""Decoding on a GPU: tokens per second of replayed steps, of plain ones, and of bf16.

    python -m benchmarks.cuda_decode

Random-weight LLaMAs in the shapes of 1B and 7B, whose codes are made on the device. Behind a
context, tokens are taken greedily and nothing waits for them. The context is not computed: what a
step takes does not depend on what the cache holds. What fails, or comes too late, is recorded as
that, and the rest goes on.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

from benchmarks import common
from qatc.output import Output, QuantizedWeight
from qatc.recipe.recipe import Recipe
from qatc.report.usage import decoding_report, memory
from qatc.runtime.cache import round_up
from qatc.runtime.cuda.arena import bucket
from qatc.runtime.forward import runtime_of
from qatc.runtime.model import load

SHAPES: dict[str, dict[str, Any]] = {
    "1B": {
        "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192,
        "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
        "tie_word_embeddings": True,
    },
    "7B": {
        "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
        "tie_word_embeddings": False,
    },
    "tiny": {
        "vocab_size": 256, "hidden_size": 64, "intermediate_size": 128,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
}  # fmt: skip

ROUNDS = 3

Step = Callable[[Tensor], Tensor]
"""Logits ``[B, 1, V]`` behind tokens ``[B, 1]``."""


def main() -> None:
    """Run the benchmark and write its result after every case."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="+", default=["1B", "7B"], choices=SHAPES)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=40, help="tokens a round takes")
    parser.add_argument("--bits", default="4-8-4")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=80, help="no case begins after these")
    options = parser.parse_args()
    started, runs = time.monotonic(), []
    for shape in options.shapes:
        for run in cases(shape, options, started):
            print(run, flush=True)
            runs.append(run)
            common.save(
                f"decode-gpu-{gpu_name(options.device)}",
                {"bits": options.bits, "context": options.context, "runs": runs},
            )


def gpu_name(device: str) -> str:
    """The device as part of a file's name."""
    if torch.device(device).type != "cuda":
        return device
    return torch.cuda.get_device_name(device).lower().replace("nvidia ", "").replace(" ", "-")


def cases(shape: str, options: argparse.Namespace, started: float) -> Iterator[dict[str, Any]]:
    """What every way to decode takes, as it is measured."""
    for title, build in (("qatc", build_integers), ("transformers bf16", build_bf16)):
        begun = time.monotonic()
        case = {"shape": shape, "model": title}
        if begun - started > options.seconds:
            yield case | {"not_run": "the time is over"}
            continue
        try:
            model = build(shape, options)
            facts: dict[str, Any] = {"build_seconds": round(time.monotonic() - begun, 1)}
            if title == "qatc":
                facts |= {"bytes": vars(memory(model))}
        except Exception as error:  # the others are measured all the same
            yield case | {"failed": f"{type(error).__name__}: {error}"[:400]}
            continue
        for batch in options.batch:
            for way, steps in WAYS[title].items():
                one = case | facts | {"batch": batch, "way": way}
                if time.monotonic() - started > options.seconds:
                    yield one | {"not_run": "the time is over"}
                    continue
                try:
                    with torch.no_grad():
                        found = measure(steps(model, batch, options), batch, options)
                except Exception as error:
                    found = {"failed": f"{type(error).__name__}: {error}"[:400]}
                if way == "replayed":
                    found["runs_on"] = decoding_report(model)
                yield one | found
        del model
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def measure(step: Step, batch: int, options: argparse.Namespace) -> dict[str, Any]:
    """Tokens per second of all rows, a median of rounds, and what came before them."""
    token = torch.zeros((batch, 1), dtype=torch.long, device=options.device)
    begun = time.perf_counter()
    for _ in range(3):  # compiles, records, tunes
        token = step(token)[:, -1].argmax(-1, keepdim=True)
    wait(options.device)
    first = time.perf_counter() - begun
    rates = []
    for _ in range(ROUNDS):
        begun = time.perf_counter()
        for _ in range(options.tokens):
            token = step(token)[:, -1].argmax(-1, keepdim=True)
        wait(options.device)
        rates.append(batch * options.tokens / (time.perf_counter() - begun))
    return {
        "tokens_per_second": round(statistics.median(rates), 1),
        "rounds": [round(rate, 1) for rate in rates],
        "first_steps_seconds": round(first, 1),
    }


def wait(device: str) -> None:
    """Until the device has done what it was given."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


class RandomWeights(Mapping[str, QuantizedWeight]):
    """Codes that are made when they are asked for, on the device."""

    def __init__(self, shapes: dict[str, torch.Size], recipe: Recipe, device: str) -> None:
        self._shapes, self._spec, self._device = shapes, recipe.weights, device

    def __getitem__(self, name: str) -> QuantizedWeight:
        shape, largest = self._shapes[name], 2 ** (self._spec.bits - 1) - 1
        codes = torch.randint(-largest, largest + 1, shape, dtype=torch.int8, device=self._device)
        scale = torch.full((shape[0], 1), 0.04 / largest, device=self._device)
        return QuantizedWeight(codes, scale, self._spec)

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)


def config_of(shape: str) -> Any:
    """A LLaMA's config."""
    config: Any = LlamaConfig(**SHAPES[shape], max_position_embeddings=4096)
    config._attn_implementation = "sdpa"
    return config


def build_integers(shape: str, options: argparse.Namespace) -> Any:
    """A model of random codes, as :func:`qatc.load` makes it of an output."""
    config, recipe = config_of(shape), Recipe.from_bits(options.bits)
    with torch.device("meta"):
        parameters = dict(LlamaForCausalLM(config).named_parameters())
    inside = {n: p.shape for n, p in parameters.items() if p.dim() == 2 and "layers." in n}
    state = {
        name: torch.ones(p.shape, dtype=torch.bfloat16, device=options.device)
        if p.dim() == 1
        else torch.randn(p.shape, dtype=torch.bfloat16, device=options.device).mul_(0.02)
        for name, p in parameters.items()
        if name not in inside
    }
    weights = RandomWeights(inside, recipe, options.device)
    output = Output(config, recipe, weights, state, directory=Path("."))
    return load(output, device=options.device, dtype=torch.bfloat16, decode_program=True)


def build_bf16(shape: str, options: argparse.Namespace) -> Any:
    """transformers' own model."""
    with torch.device(options.device):
        model = LlamaForCausalLM._from_config(config_of(shape), dtype=torch.bfloat16)
    return model.eval().requires_grad_(False)


def replayed(model: Any, batch: int, options: argparse.Namespace) -> Step:
    """Steps as the model takes them."""
    cache = packed_cache(model, batch, options)
    return lambda token: model(input_ids=token, past_key_values=cache, use_cache=True).logits


def plain(model: Any, batch: int, options: argparse.Namespace) -> Step:
    """The layers' graphs one after another."""
    cache, own = packed_cache(model, batch, options), type(model).forward
    return lambda token: own(model, input_ids=token, past_key_values=cache, use_cache=True).logits


def packed_cache(model: Any, batch: int, options: argparse.Namespace) -> Any:
    """A cache that holds a context, of which nothing was computed but one token."""
    token = torch.zeros((batch, 1), dtype=torch.long, device=options.device)
    cache = DynamicCache()
    type(model).forward(model, input_ids=token, past_key_values=cache, use_cache=True)
    runtime = runtime_of(model)
    for layer, forward in zip(cache.layers, runtime.forwards, strict=True):
        template = runtime.cached.of(forward)[0]
        layer.reserve(template, batch, round_up(options.context + 1), token.device)  # type: ignore[union-attr]
        layer.length = options.context  # type: ignore[union-attr]
    return cache


def dynamic(model: Any, batch: int, options: argparse.Namespace) -> Step:
    """As ``generate`` calls a model."""
    config, cache = model.config, DynamicCache()
    width = config.hidden_size // config.num_attention_heads
    shape = (batch, config.num_key_value_heads, options.context, width)
    for number in range(config.num_hidden_layers):
        held = torch.zeros(shape, dtype=torch.bfloat16, device=options.device)
        cache.update(held, held, number)
    return lambda token: model(input_ids=token, past_key_values=cache, use_cache=True).logits


def captured(model: Any, batch: int, options: argparse.Namespace) -> Step:
    """One step over a static cache as a CUDA graph; it reads as many places as replayed ones."""
    places = bucket(options.context + (ROUNDS + 1) * options.tokens)
    cache = StaticCache(config=model.config, max_cache_len=places)
    token = torch.zeros((batch, 1), dtype=torch.long, device=options.device)
    place = torch.full((1, 1), options.context, dtype=torch.long, device=options.device)
    mask = torch.ones((batch, 1, 1, places), dtype=torch.bool, device=options.device)

    def step() -> Tensor:
        logits: Tensor = model(
            input_ids=token, position_ids=place, attention_mask=mask, past_key_values=cache
        ).logits
        return logits

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = step()

    def replay(new: Tensor) -> Tensor:
        token.copy_(new)
        graph.replay()
        return logits

    return replay


WAYS: dict[str, dict[str, Callable[[Any, int, argparse.Namespace], Step]]] = {
    "qatc": {"replayed": replayed, "plain": plain},
    "transformers bf16": {"plain": dynamic, "captured": captured},
}

if __name__ == "__main__":
    main()

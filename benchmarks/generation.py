"""How fast a corpus is generated: transformers' own ``generate`` against qatc.

    python -m benchmarks.generation --model DIR --length 256 --threads 2

Both sample in the model's compute dtype, and sequences do not end before their length, so that all
have the same. qatc generates as many sequences as it has slots, from the first token to the last,
by the very code of ``qatc generate-data``; its figure is all tokens over all of the time. At a
sixth, a half and five sixths of the length it is stopped, and each batch of transformers takes its
turn: some steps of ``generate`` behind a cache that holds that many tokens already. A step takes
longer in proportion to what the cache holds, so that the mean of the three is that of all steps.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache, StoppingCriteria, StoppingCriteriaList

from benchmarks import common, models
from qatc.data.decode import decoding
from qatc.data.slots import Plan, Slots, Vocabulary, choose_slots
from qatc.models import load_tokenizer
from qatc.models.load import load_teacher


def main() -> None:
    """Run the benchmark and write its result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--length", type=int, default=256, help="tokens per sequence")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16, 64, 128])
    parser.add_argument("--slots", type=int, help="instead of as many as qatc chooses")
    parser.add_argument("--steps", type=int, default=4, help="steps of a batch that are timed")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--name", default="generation")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    options.model = models.find(options.model)
    model = load_teacher(options.model, dtype=options.dtype, device="cpu").model
    plain = load_teacher(options.model, dtype=options.dtype, device="cpu").model
    plain.config.eos_token_id = plain.generation_config.eos_token_id = None  # nothing ends early
    found = race(model, plain, load_tokenizer(options.model), options)
    common.save(
        f"{options.name}-{options.length}",
        {
            "model": common.display_path(options.model),
            "dtype": str(model.dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
            "length": options.length,
            **found,
        },
    )


def race(model: Any, plain: Any, tokenizer: Any, options: argparse.Namespace) -> dict[str, Any]:
    """Tokens per second of qatc on ``model``, and of every batch of transformers on ``plain``."""
    length = options.length
    stops = [length // 6, length // 2, length * 5 // 6]
    known = Vocabulary.of(tokenizer, model)
    endless = Vocabulary(known.prefix, frozenset(), known.ordinary, known.closed)
    seconds: dict[int, list[list[float]]] = {batch: [] for batch in options.batch}
    own: list[float] = []
    with torch.inference_mode(), decoding(model, 1, length, compile=True) as decoder:
        count = options.slots or choose_slots(decoder, 1024, length, "cpu")
        warm = Slots(decoder, endless, 2, 8, "cpu")  # compiles, if nothing did yet
        warm.run([plan(endless, 8)] * 2, lambda *_: None)
        slots = Slots(decoder, endless, count, length, "cpu")
        started = time.perf_counter()

        def turn() -> None:
            nonlocal started
            own.append(time.perf_counter() - started)
            if slots.steps in stops:
                for batch, found in seconds.items():
                    found.append(steps_of(plain, batch, slots.steps, options.steps))
            started = time.perf_counter()

        slots.run([plan(endless, length)] * count, lambda *_: None, turn)
    figures = {
        f"transformers, batch {batch}": batch / statistics.mean(map(statistics.median, found))
        for batch, found in seconds.items()
    }
    best = max(figures.values())
    figures[f"qatc, {count} slots"] = count * len(own) / sum(own)
    print({name: round(value, 1) for name, value in figures.items()}, flush=True)
    thirds = [own[i * len(own) // 3 : (i + 1) * len(own) // 3] for i in range(3)]
    return {
        "slots": count,
        "tokens_per_second": figures,
        "times_the_best_of_transformers": figures[f"qatc, {count} slots"] / best,
        "qatc_by_third_of_the_length": [count * len(part) / sum(part) for part in thirds],
        "at_tokens": stops,
        "seconds_per_step": {"transformers": seconds, "qatc": own},
    }


def plan(vocabulary: Vocabulary, length: int) -> Plan:
    """A sequence that is sampled from its second token on."""
    prompt = [*vocabulary.prefix, vocabulary.ordinary[0]]
    return Plan(prompt, len(prompt), np.random.default_rng(0).random(length))


class _Clock(StoppingCriteria):
    """Called after every token: notes the time, and stops nothing."""

    def __init__(self) -> None:
        self.ticks: list[float] = []

    def __call__(self, ids: torch.Tensor, scores: Any, **_: Any) -> Any:
        self.ticks.append(time.perf_counter())
        return torch.zeros(len(ids), dtype=torch.bool)


def steps_of(model: Any, batch: int, held: int, steps: int) -> list[float]:
    """Seconds of single steps of ``generate`` of transformers, behind ``held`` cached tokens."""
    config, clock = model.config, _Clock()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    cache = DynamicCache(config=config)
    for layer in range(config.num_hidden_layers):
        for_one = torch.ones((batch, heads, held, width), dtype=model.dtype)
        cache.update(for_one, for_one.clone(), layer)
    model.generate(
        input_ids=torch.full((batch, held + 1), 100),
        attention_mask=torch.ones((batch, held + 1), dtype=torch.long),
        past_key_values=cache,
        do_sample=True,
        top_k=0,
        max_new_tokens=steps + 2,
        pad_token_id=0,
        stopping_criteria=StoppingCriteriaList([clock]),
    )
    # The first token and the one after it find caches of the processor and allocator cold.
    ticks = clock.ticks[1:]
    return [after - before for before, after in zip(ticks, ticks[1:], strict=False)]


if __name__ == "__main__":
    main()

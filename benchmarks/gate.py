"""Does the parity gate pass what is right, however deep the model and however long it was trained?

Makes twenty outputs of random models, two of them wide enough to move with their own rounding ties,
and more of the models that are named, and verifies every one. Planted bugs are in ``tests/``.

    python -m benchmarks.gate --threads 1 [--model DIR ...]
"""

from __future__ import annotations

import argparse
import dataclasses
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import display_path, random_output, save
from qatc.evaluation.parity import verify
from qatc.models.preparation import prepare, restore
from qatc.recipe.recipe import Recipe
from qatc.recipe.spec import QuantSpec

GROUPS = dataclasses.replace(Recipe.from_bits("4-8-4"), weights=QuantSpec(4, 16))
GROUPED_INPUTS = dataclasses.replace(Recipe.from_bits("4-8-8"), activations=QuantSpec(8, 16))

# kind, layers, width, seed, recipe, steps
OUTPUTS: tuple[tuple[str, int, int, int, str | Recipe, int], ...] = (
    ("llama", 2, 32, 0, "4-8-4", 0),
    ("llama", 2, 32, 1, "8-8-8", 300),
    ("llama", 2, 32, 2, "2-8-2", 20),
    ("llama", 4, 32, 3, "4-16-4", 100),
    ("llama", 4, 64, 4, "4-8-16", 50),
    ("llama", 8, 32, 5, "3-6-5", 100),
    ("llama", 8, 64, 6, GROUPS, 50),
    ("llama", 12, 32, 7, "4-8-8", 300),
    ("llama", 12, 32, 8, GROUPED_INPUTS, 10),
    ("llama", 16, 64, 9, "8-8-4", 50),
    ("llama", 24, 64, 0, "4-8-4", 0),
    ("llama", 24, 32, 10, "4-8-4", 300),
    ("llama", 24, 64, 11, "4-16-4", 20),
    ("llama", 32, 64, 12, "4-8-4", 100),
    ("llama", 32, 32, 13, "16-8-4", 0),
    ("llama", 32, 128, 14, "4-8-4", 0),
    ("qwen2", 24, 32, 15, "4-8-4", 50),
    ("mistral", 24, 32, 16, "4-8-4", 50),
    ("gemma3_text", 8, 32, 17, "4-8-4", 20),
    ("gpt_neox", 12, 32, 18, "4-8-4", 100),
)


def random_model(kind: str, layers: int, width: int, seed: int) -> Any:
    """A random model whose weights are large enough for its logits to have something to say."""
    import transformers

    settings: dict[str, Any] = {
        "vocab_size": 128, "hidden_size": width, "intermediate_size": 2 * width,
        "num_hidden_layers": layers, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 256, "initializer_range": 0.2, "pad_token_id": 0,
        "bos_token_id": 0, "eos_token_id": 1,
    }  # fmt: skip
    if kind in ("mistral", "gemma3_text"):
        settings |= {"sliding_window": 32}
    if kind == "gemma3_text":
        settings |= {"head_dim": 8, "layer_types": ["sliding_attention", "full_attention"] * 4}
    torch.manual_seed(seed)
    config = transformers.AutoConfig.for_model(kind, **settings)
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()


def train(model: Any, recipe: Recipe, steps: int) -> None:
    """Teach the quantized model its own float distribution on random tokens."""
    generator = torch.Generator().manual_seed(0)
    batches = torch.randint(2, model.config.vocab_size, (8, 4, 24), generator=generator)
    with torch.no_grad():
        targets = [model(input_ids=ids, use_cache=False).logits.softmax(-1) for ids in batches]
    prepare(model, recipe, compile=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4, weight_decay=0.0)
    for step in range(steps):
        number = step % len(batches)
        logits = model(input_ids=batches[number], use_cache=False).logits
        torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), targets[number].flatten(0, 1)
        ).backward()
        optimizer.step()
        optimizer.zero_grad()
    restore(model)


def figures(directory: Path) -> dict[str, Any]:
    """What the gate says of an output, and what it takes."""
    start = time.perf_counter()
    report = verify(directory, reload=False).to_dict()
    seconds = round(time.perf_counter() - start, 1)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"seconds": seconds, "peak_gib_of_process": round(peak, 2), **report}


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", action="append", default=[], help="model directory; repeatable")
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for number, (kind, layers, width, seed, bits, steps) in enumerate(OUTPUTS):
            recipe = Recipe.from_bits(bits) if isinstance(bits, str) else bits
            model = random_model(kind, layers, width, seed)
            if steps:
                train(model, recipe, steps)
            output = random_output(Path(folder) / str(number), recipe, model)
            what = {"kind": kind, "layers": layers, "width": width, "seed": seed, "steps": steps}
            found.append({**what, "recipe": recipe.to_dict(), **figures(output)})
            print(what, found[-1]["passed"], found[-1]["seconds"], flush=True)
        for number, source in enumerate(given.model):
            from transformers import AutoModelForCausalLM

            model = AutoModelForCausalLM.from_pretrained(
                source, dtype=torch.float32, attn_implementation="sdpa"
            )
            output = random_output(Path(folder) / f"m{number}", Recipe.from_bits("4-8-4"), model)
            del model
            what = {"kind": display_path(source), "steps": 0}
            recipe = Recipe.from_bits("4-8-4")
            found.append({**what, "recipe": recipe.to_dict(), **figures(output)})
            print(what, found[-1]["passed"], found[-1]["seconds"], flush=True)
    save("gate", {"threads": given.threads, "outputs": found})
    assert all(output["passed"] for output in found), "the gate refuses an output that is right"


if __name__ == "__main__":
    main()

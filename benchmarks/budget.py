"""What bits chosen for a budget gain over the same bits for all weights, without training.

    python -m benchmarks.budget MODEL CORPUS ROWS BUDGET...

Bits are chosen on the first ROWS rows of the corpus, as ``qatc quantize --budget`` does. KL to the
model in full precision (nats per token), with nothing but weights rounded to nearest, is that on
the last rows of the corpus, which are not looked at before. A budget between whole bits stands
beside the bits below it, alone and in groups of 32 with a bf16 scale each, which take half a bit
more. The result is ``results/budget-NAME.json``.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import common
from qatc.data.corpus import Corpus, Rows, pack_rows
from qatc.models import load_model
from qatc.recipe.recipe import Recipe
from qatc.sensitivity.answers import Answers
from qatc.sensitivity.budget import fit_budget
from qatc.sensitivity.weights import find_weights, rounded, with_bits

HELD_OUT_TOKENS = 8192
GROUP = 32


def compare(model: Any, rows: Rows, answers: Answers, budget: float) -> dict[str, Any]:
    """KL of weights with chosen bits, and of weights that all have the bits below the budget."""
    recipe = Recipe.from_bits("4-16-16")
    choice = fit_budget(model, rows, recipe, budget)
    weights = find_weights(model, replace(recipe, weight_bits=choice.weight_bits))
    uniform = {weight: with_bits(weight.spec, int(budget)) for weight in weights}
    forms = {"chosen": {weight: weight.spec for weight in weights}, f"{int(budget)} bits": uniform}
    if budget % 1 and not any(weight.parameter.shape[1] % GROUP for weight in weights):
        grouped = {weight: replace(spec, group_size=GROUP) for weight, spec in uniform.items()}
        forms[f"{int(budget)} bits in groups of {GROUP}"] = grouped
    found = {}
    for name, specs in forms.items():
        with rounded(specs):
            found[name] = answers.divergence()
    counts = [weight.spec.bits for weight in weights]
    return {
        "budget": budget,
        "average": choice.average,
        "estimated": choice.divergence,
        "weights by bits": {str(bits): counts.count(bits) for bits in sorted(set(counts))},
        "kl": found,
    }


def main() -> None:
    """Measure, and write the result."""
    name, data, count, *budgets = sys.argv[1:]
    model = load_model(name, dtype=torch.float32, device="cpu").model
    corpus = Corpus.open(data)
    length = int(corpus.manifest["max_length"])
    rows = pack_rows(corpus.sequences(), length, corpus.prompt_tokens)
    held_out = rows[-(HELD_OUT_TOKENS // length) :]
    answers = Answers(model, held_out, 8)
    found = []
    for budget in budgets:
        found.append(compare(model, rows[: int(count)], answers, float(budget)))
        print(found[-1], flush=True)
    result = {"rows": int(count), "length": length, "held out": answers.tokens, "budgets": found}
    where = {"model": common.display_path(name)}
    common.save(f"budget-{Path(name).resolve().name}", {**where, **result})


if __name__ == "__main__":
    main()

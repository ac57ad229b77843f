"""Quantize a model from Python: the full-precision checkpoint in, packed integers out."""

from __future__ import annotations

import sys
from pathlib import Path

from qatc import Recipe, load_codes
from qatc.data import CorpusConfig
from qatc.quantize import QuantizeConfig, quantize
from qatc.training import TrainingConfig


def main(model: str, output: str, steps: int = 300, samples: int = 1024) -> None:
    """Quantize ``model`` to 4-bit weights, 8-bit activations and a 4-bit KV cache."""
    result = quantize(
        QuantizeConfig(
            model=model,
            output=Path(output),
            recipe=Recipe.from_bits("4-8-4"),
            generation=CorpusConfig(sequences=samples, max_length=128),
            training=TrainingConfig(steps=steps),
            eval_sequences=min(256, samples // 4),
        )
    )
    for name, metrics in result.figures["generated"].items():
        print(f"{name:15} perplexity {metrics.perplexity:.3f}  KL {metrics.kl:.4f}")
    name, weight = next(iter(load_codes(result.output).items()))
    print(f"{name}: codes {tuple(weight.codes.shape)} from {int(weight.codes.min())}")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:]))

"""Train torchao's own fake quantization by distillation: its format, on the model's own text."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import torch
from torch import nn
from torchao.quantization import Int8DynamicActivationIntxWeightConfig, PerGroup, quantize_
from torchao.quantization.qat import QATConfig

from qatc.data import CorpusConfig
from qatc.data.corpus import pack_rows
from qatc.data.generate import generate_corpus
from qatc.models import load_model, load_tokenizer
from qatc.training import TrainingConfig
from qatc.training.distill import Distiller


def is_layer(module: nn.Module, name: str) -> bool:
    """Whether a module is a linear layer other than the output head."""
    return isinstance(module, nn.Linear) and name != "lm_head"


def main(model: str, output: str, steps: int = 100, samples: int = 256) -> None:
    """Train 4-bit weights in groups of 32, behind asymmetric activations of 8 bits."""
    teacher, directory = load_model(model, dtype=torch.float32), Path(output)
    texts = CorpusConfig(sequences=samples, max_length=64)
    corpus = generate_corpus(teacher, load_tokenizer(model), directory / "corpus", texts)

    base = Int8DynamicActivationIntxWeightConfig(
        weight_dtype=torch.int4,  # type: ignore[attr-defined]
        weight_granularity=PerGroup(32),
    )
    student = copy.deepcopy(teacher.model)
    quantize_(student, QATConfig(base, step="prepare"), filter_fn=is_layer)
    distiller = Distiller(
        student.train(),
        teacher.model,
        pack_rows(corpus.sequences(), texts.max_length),
        TrainingConfig(steps=steps),
        directory,
    )
    history = distiller.run()
    print(f"KL {history[0].kl:.4f} before, {history[-1].kl:.4f} at the end")

    quantize_(student.eval(), QATConfig(base, step="convert"), filter_fn=None)
    kinds = {type(parameter.data).__name__ for parameter in student.parameters()}
    print(f"converted: {', '.join(sorted(kinds))}")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:]))

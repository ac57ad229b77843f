"""How far a quantized model is from the original, by position in a long text.

    python -m benchmarks.positions OUTPUT TEACHER TEXT [TOKENS]

Errors of cached keys and values could add up with the length of a context. Every row is TOKENS
tokens of a text (2,048 by default), of which the first is at position 0. The KL divergence (nats
per token) is averaged over the rows and over the positions from one power of two to the next, for
the graph that was trained, whose keys and values are those of the cache. The result is
``results/positions-NAME.json``, with NAME that of the output.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks import common
from qatc.data.corpus import text_rows
from qatc.data.documents import read_text
from qatc.evaluation.reference import prepare_reference
from qatc.models import load_model, load_tokenizer
from qatc.output import load_reference, open_output

ROWS = 8


@torch.no_grad()
def main() -> None:
    """Measure, and write the result."""
    output, teacher_name, text, *given = sys.argv[1:]
    length = int(given[0]) if given else 2048
    rows = text_rows(read_text(Path(text)), load_tokenizer(output), length, ROWS * length)
    found = open_output(output)
    student: Any = prepare_reference(load_reference(found), found)
    teacher: Any = load_model(teacher_name, dtype=torch.float32, device="cpu").model
    total = torch.zeros(length, dtype=torch.float64)
    for number in range(len(rows)):
        ids = torch.from_numpy(rows.tokens[number : number + 1]).long()
        wanted, got = (
            model(input_ids=ids, use_cache=False).logits[0].log_softmax(-1)
            for model in (teacher, student)
        )
        total += (wanted.exp() * (wanted - got)).sum(-1).double()
    kl = total / len(rows)
    edges = [0] + [2**n for n in range(6, 32) if 2**n < length] + [length]
    parts = {f"{a} to {b}": float(kl[a:b].mean()) for a, b in zip(edges, edges[1:], strict=False)}
    for positions, value in parts.items():
        print(f"{positions:>14}  {value:.4f}")
    name = f"positions-{Path(output).resolve().name}"
    result = {"rows": len(rows), "tokens": length, "text": Path(text).name, "kl": parts}
    common.save(name, {"teacher": common.display_path(teacher_name), **result})


if __name__ == "__main__":
    main()

"""Write on from a prompt with the model beside this file: ``python generate.py "Once upon"``.

It needs executorch, torch and tokenizers, and neither qatc nor transformers.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor


class Model:
    """A ``.pte``, which holds the keys and values of what it was given itself.

    Args:
        directory: what ``qatc export`` wrote.
    """

    def __init__(self, directory: Path) -> None:
        import executorch.kernels.quantized  # noqa: F401  # the table of the embedding
        from executorch.runtime import Runtime

        told = json.loads((directory / "qatc-export.json").read_text(encoding="utf-8"))
        self.slots, self.chunk, self.ends = told["slots"], told["chunk"], set(told["ends"])
        self._program = Runtime.get().load_program(directory / "model.pte")
        self._forward = self._program.load_method("forward")
        self.held = 0

    def __call__(self, ids: list[int]) -> Tensor:
        """Logits ``[1, V]`` of the token behind ``ids``, which stand behind what is held."""
        if self.held + len(ids) > self.slots:
            raise ValueError(f"{self.held + len(ids)} tokens are more than {self.slots} slots hold")
        logits = torch.empty(0)
        for start in range(0, len(ids), self.chunk):
            part = torch.tensor([ids[start : start + self.chunk]])
            positions = torch.arange(self.held, self.held + part.shape[1])
            logits = self._forward.execute((part, positions))[0].clone()
            self.held += part.shape[1]
        return logits


def open_model(directory: Path, tokens: int) -> Model:
    """The model of a directory; its room was settled by the export, however many are wanted."""
    return Model(directory)


def main() -> None:
    """Write the most likely tokens behind a prompt."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("prompt")
    parser.add_argument("--tokens", type=int, default=64, help="write at most so many")
    given = parser.parse_args()
    directory = Path(__file__).parent
    if not (directory / "tokenizer.json").is_file():
        parser.error("no tokenizer.json is beside this file; call its Model with ids of tokens")
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    ids = tokenizer.encode(given.prompt).ids
    if not ids:
        parser.error("the prompt has no tokens; give some text")
    model = open_model(directory, len(ids) + max(given.tokens, 0))
    if len(ids) > model.slots:
        parser.error(f"the prompt has {len(ids)} tokens, and the cache holds {model.slots}")
    for _ in range(min(given.tokens, model.slots - len(ids))):
        token = int(model(ids[model.held :]).argmax())
        if token in model.ends:
            break
        ids.append(token)
    print(tokenizer.decode(ids))


if __name__ == "__main__":
    main()

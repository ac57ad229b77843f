"""Write on from a prompt with the programs beside this file: ``python generate.py "Once upon"``.

It needs torch and tokenizers, and neither qatc nor transformers.
"""

from __future__ import annotations

import argparse
import json
import operator
import typing
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg


class Model:
    """The programs of a directory, and a cache that holds what they were given.

    Args:
        directory: what ``qatc export`` wrote.
        slots: tokens that there is room for.
    """

    def __init__(self, directory: Path, slots: int) -> None:
        told = json.loads((directory / "qatc-export.json").read_text(encoding="utf-8"))
        self.prefill, self.decode = load_programs(directory, told["format"])
        self.cache = [
            torch.zeros((1, heads, slots, width), dtype=getattr(torch, dtype))
            for heads, width, dtype in told["cache"]
        ]
        self.ends = set(told["ends"])
        self.slots, self.held = slots, 0

    def __call__(self, ids: list[int]) -> Tensor:
        """Logits ``[1, V]`` of the token behind ``ids``, which stand behind what is held."""
        if self.held + len(ids) > self.slots:
            raise ValueError(f"{self.held + len(ids)} tokens are more than {self.slots} slots hold")
        positions = torch.arange(self.held, self.held + len(ids))
        program = self.decode if len(ids) == 1 else self.prefill
        with torch.no_grad():
            logits: Tensor = program(torch.tensor([ids]), positions[None], self.cache)
        self.held += len(ids)
        return logits


def load_programs(directory: Path, format: str) -> list[Any]:
    """The program for several tokens at once, and that for one.

    Each is called as ``(ids [1, T], positions [1, T], cache)``, changes the cache in place and
    gives the logits ``[1, V]`` of the next token.
    """
    names = ("prefill", "decode")
    if format == "aoti":
        from torch.export.pt2_archive._package import load_pt2

        package = load_pt2(str(directory / "model.pt2"), load_weights_from_disk=True)
        return [package.aoti_runners[name] for name in names]
    with patch.object(typing, "get_type_hints", TypeHints()):
        prefill, decode = (torch.export.load(directory / f"{name}.pt2").module() for name in names)
    unpack_weights(decode)
    return [prefill, decode]


class TypeHints(dict[type, Any]):
    """``typing.get_type_hints`` of each class once: torch.export.load asks for each node anew."""

    _look_up = staticmethod(typing.get_type_hints)

    def __call__(self, kind: type, *args: Any, **options: Any) -> Any:
        if kind not in self:
            self[kind] = self._look_up(kind, *args, **options)
        return self[kind]


def unpack_weights(program: GraphModule) -> None:
    """Compute what follows from weights alone now, and not for every token.

    The codes in float are most of it: 4 bytes a weight.
    """
    known: dict[Node, Any] = {}
    for node in program.graph.nodes:
        inputs = node.all_input_nodes
        if node.op == "get_attr":
            known[node] = operator.attrgetter(node.target)(program)
        elif node.op == "call_function" and inputs and all(own in known for own in inputs):
            args, kwargs = map_arg((node.args, node.kwargs), known.__getitem__)
            with torch.no_grad():
                known[node] = node.target(*args, **kwargs)
            for own in inputs:
                if all(user in known for user in own.users):
                    known[own] = None  # its memory
    for number, (node, value) in enumerate(known.items()):
        if node.op == "call_function" and isinstance(value, Tensor):
            program.register_buffer(f"unpacked_{number}", value)
            with program.graph.inserting_before(node):
                node.replace_all_uses_with(program.graph.get_attr(f"unpacked_{number}"))
    program.graph.eliminate_dead_code()
    program.recompile()


def open_model(directory: Path, tokens: int) -> Model:
    """The model of a directory with room for so many tokens."""
    return Model(directory, tokens)


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

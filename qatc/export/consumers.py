"""The runtime that an output was trained for, asked what it computes of the output itself.

Where it is installed, the parity gate holds it against the graph that was trained. Every one gets
the export that its users load, in a directory that is deleted with it.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from qatc.export import compressed_tensors, torchao
from qatc.export.executorch import format as executorch
from qatc.export.executorch.generate import Model as RunnerOfExecutorch
from qatc.export.gguf import card, llama_cpp
from qatc.export.gguf.architectures import head_size
from qatc.export.vllm import engine
from qatc.output import Output
from qatc.progress import Observer
from qatc.recipe.recipe import Recipe
from qatc.recipe.spec import QuantSpec


@dataclass(frozen=True)
class Consumer:
    """A runtime of others with an output in it.

    Attributes:
        name: what it calls itself.
        differences: what it computes in another way than was trained, in words; none: the same.
        slack: how much further from what was trained it may be than a form of that itself: 1, or
            more where its rule is close to that and not the same.
        logits: fp32 ``[B, T, V]`` of rows ``[B, T]``, which begin anew.
        close: ends it.
    """

    name: str
    differences: tuple[str, ...]
    logits: Callable[[Tensor], Tensor]
    close: Callable[[], None]
    slack: float = 1.0


def consumer_of(output: Output, slots: int) -> Consumer | None:
    """The runtime that a recipe names as its target, for rows of ``slots`` tokens at most.

    None where that is qatc itself, or one that is not installed or has no part here.

    Raises:
        QatcError: it cannot hold or load the output.
    """
    kind = _KINDS.get(output.recipe.target)
    if kind is None or not kind.is_installed():
        return None
    return kind.open(output, slots)


@dataclass(frozen=True)
class _Kind:
    is_installed: Callable[[], bool]
    open: Callable[[Output, int], Consumer]


def _has(*packages: str) -> bool:
    return all(importlib.util.find_spec(name) for name in packages)


def _in_llama(output: Output, slots: int) -> Consumer:
    model, _ = llama_cpp.open_in_llama(
        output.place, slots, trust_remote_code=output.trust_remote_code
    )
    found = card.differences(output.recipe, head_size(output.config))
    name = f"llama.cpp ({llama_cpp.binding()})"
    # It keeps scales of inputs, K and V in fp16, and rounds half away from zero.
    return Consumer(name, tuple(found), _asked(model), _nothing, slack=10.0)


def _in_vllm(output: Output, slots: int) -> Consumer:
    packed = output.recipe.weights.quantizes and not output.recipe.activations.quantizes
    dtype = "bfloat16" if packed else "float32"
    model, notes = engine.open_in_vllm(
        output.place, slots, dtype=dtype, trust_remote_code=output.trust_remote_code
    )
    if packed or engine.device() != "cpu":
        notes.append(f"in {dtype} on {engine.device()}")
    return Consumer("vLLM", tuple(notes), _asked(model), model.close)


def _in_executorch(output: Output, slots: int) -> Consumer:
    """Token by token: a call gives the logits of its last."""
    with ExitStack() as stack, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its interface is new
        place = Path(stack.enter_context(TemporaryDirectory(prefix="qatc-consumer-")))
        executorch.write(output, place, Observer())
        model = RunnerOfExecutorch(place)
        kept = stack.pop_all()

    def logits(ids: Tensor) -> Tensor:
        rows = []
        for row in ids.tolist():
            model.held = 0
            rows.append(torch.cat([model([token]) for token in row]))
        return torch.stack(rows)

    return Consumer("ExecuTorch", tuple(executorch.differences(output)), logits, kept.close)


def _by_transformers(
    write: Callable[[Output, Path, Observer], None], differences: Callable[[Recipe], list[str]]
) -> Callable[[Output, int], Consumer]:
    def open(output: Output, slots: int) -> Consumer:
        from transformers import AutoModelForCausalLM

        with TemporaryDirectory(prefix="qatc-consumer-") as place:
            write(output, Path(place), Observer())
            model: Any = AutoModelForCausalLM.from_pretrained(
                place, dtype=torch.float32, trust_remote_code=output.trust_remote_code
            )
        return Consumer("transformers", tuple(differences(output.recipe)), _asked(model), _nothing)

    return open


def _asked(model: Any) -> Callable[[Tensor], Tensor]:
    @torch.no_grad()
    def logits(ids: Tensor) -> Tensor:
        found: Tensor = model(input_ids=ids.cpu(), use_cache=False).logits
        return found.float()

    return logits


def _nothing() -> None:
    """What is to be done at the end of a runtime that lives in this process."""


def _in_transformers(recipe: Recipe) -> list[str]:
    """What it computes otherwise with compressed-tensors, which reads the export."""
    inputs, found = recipe.activations, list[str]()
    if recipe.kv.quantizes:
        found.append(f"K and V in float ({recipe.kv_bits} bits here)")
    if inputs.quantizes and not recipe.weights.quantizes:
        found.append(f"inputs in float ({inputs.bits} bits here)")
    elif inputs.quantizes and inputs != QuantSpec(8, range="full"):
        found.append("inputs of 8 bits scaled by max / 127.5 per token (by another rule here)")
    return found


_KINDS: Mapping[str, _Kind] = {
    "llama.cpp": _Kind(lambda: llama_cpp.binding() is not None and _has("gguf"), _in_llama),
    "vllm": _Kind(engine.is_installed, _in_vllm),
    "transformers": _Kind(
        lambda: _has("compressed_tensors"),
        _by_transformers(compressed_tensors.write, _in_transformers),
    ),
    "executorch": _Kind(lambda: _has("executorch"), _in_executorch),
    "torchao": _Kind(lambda: _has("torchao"), _by_transformers(torchao.write, torchao.differences)),
}

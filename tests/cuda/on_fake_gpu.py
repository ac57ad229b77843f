"""Parts of qatc on GPUs that are not there, each in a process of its own.

:data:`START` is what such a process runs, with the library that was built of ``guard.cpp``, the
name of the part, a folder of outputs and names of recipes as its arguments. It prints what it
found, as JSON.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from tests.cuda.fake_gpu import fake_gpus

START = """
import ctypes, os, sys
ctypes.CDLL(sys.argv[1])  # before torch looks for GPUs
from tests.cuda.on_fake_gpu import main
main(*sys.argv[2:])
sys.stdout.flush()
os._exit(0)  # torch would free what is nowhere
"""

SECOND = "cuda:1"
"""A device that is not the one that plain ``cuda`` stands for: on that, nothing may be."""


def train(folder: Path, names: list[str]) -> dict[str, Any]:
    """A training step: capture, passes, forward, loss, backward, optimizer."""
    from torch._subclasses import FakeTensorMode
    from transformers import LlamaConfig, LlamaForCausalLM

    from qatc.losses.objective import distillation_losses
    from qatc.models.preparation import prepare, prepared_state
    from tests.runtime.conftest import RECIPES

    config: Any = LlamaConfig(
        vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=2,
        num_attention_heads=8, num_key_value_heads=4,
    )  # fmt: skip
    config._attn_implementation = "sdpa"
    found = {}
    for name, on_integers in [(n, i) for n in names for i in (False, True)]:
        with fake_gpus(), FakeTensorMode():
            with torch.device(SECOND):
                student: Any = LlamaForCausalLM(config)
                teacher: Any = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
            ids = torch.zeros((2, 32), dtype=torch.long, device=SECOND)
            counted = torch.ones_like(ids, dtype=torch.bool)
            with mock.patch("qatc.models.preparation.why_not_causal", lambda *_: None):
                prepare(  # which looks at a mask's values, once
                    student, RECIPES[name], compile=False, compute_dtype=torch.bfloat16,
                    integer_forward=on_integers,
                )  # fmt: skip
            student.train()
            optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4, fused=True)
            losses, divergence = distillation_losses(
                student, teacher, ids, counted, counted,
                autocast=lambda: torch.autocast("cuda", torch.bfloat16),
            )  # fmt: skip
            losses["logits"].backward()
            norm = torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            optimizer.step()
            places = [losses["logits"], divergence, norm]
            places += [p.grad for p in student.parameters() if p.requires_grad]
            for template in prepared_state(student).templates():
                places += [n.meta.get("val") for n in template.graph_module.graph.nodes]
            found[f"{name}, {'integers' if on_integers else 'fake-quant'}"] = _devices(places)
    return found


def run(folder: Path, names: list[str]) -> dict[str, Any]:
    """A loaded model: scoring, prefill, decoding steps, one of them recorded and replayed."""
    from torch._subclasses import FakeTensorMode
    from transformers import DynamicCache

    from qatc.output import open_output
    from qatc.runtime.cuda.graphed import GraphedForward
    from qatc.runtime.forward import runtime_of

    found: dict[str, Any] = {}
    kept: list[Any] = []
    for name in names:
        output = open_output(folder / name)
        with fake_gpus(), FakeTensorMode(allow_non_fake_inputs=True) as mode:
            model = _load(mode, output, SECOND)
            mode.allow_non_fake_inputs = False
            ids = torch.zeros((2, 20), dtype=torch.long, device=SECOND)
            cache: Any = DynamicCache()
            recorder = _Again()
            graphed = GraphedForward(model, runtime_of(model), recorder)
            with torch.no_grad(), _without_values():
                outs = [model(input_ids=ids, use_cache=False).logits]
                with _noted_attention() as attended:
                    outs.append(model(input_ids=ids, past_key_values=cache, use_cache=True).logits)
                decode = {"past_key_values": cache, "use_cache": True}
                outs.append(model(input_ids=ids[:, :1], **decode).logits)
                for _ in range(4):
                    outs.append(graphed(input_ids=ids[:, :1], **decode).logits)
                mask = torch.ones((2, 26), dtype=torch.long, device=SECOND)
                mode.allow_non_fake_inputs = True
                outs.append(model(input_ids=ids[:, :1], attention_mask=mask, **decode).logits)
            stores = runtime_of(model).stores()
            templates = [template for store in stores for template in store]
            nodes = [n for t in templates for n in t.graph_module.graph.nodes]
            places = [*outs, *(t for layer in cache.layers for t in layer.tensors)]
            places += [*model.parameters(), *model.buffers()]
            places += [n.meta.get("val") for n in nodes]
            kernels = {
                n.kwargs[phase]
                for n in nodes
                if "packed_linear" in str(n.target)
                for phase in ("prefill", "decode")
            }
            kept.append((model, graphed, cache))
            found[name] = {
                "devices": _devices(places),
                "kernels": sorted(kernels),
                "shapes": [list(out.shape) for out in outs],
                "recorded": graphed.recorded,
                "replayed": graphed.replayed,
                "reason": graphed.reason,
                "prefills": attended,
            }
    return found


SHAPES: dict[str, dict[str, Any]] = {
    "LLaMA-7B": {
        "hidden_size": 4096, "intermediate_size": 11008,
        "num_attention_heads": 32, "num_key_value_heads": 32,
    },
    "Llama 3.2 1B": {
        "hidden_size": 2048, "intermediate_size": 8192,
        "num_attention_heads": 32, "num_key_value_heads": 8,
    },
}  # fmt: skip
"""Of one layer."""


def generate(folder: Path, names: list[str]) -> dict[str, Any]:
    """What a layer of a shape starts in a decoding step of some rows at 4-8-4, and its divisions.

    Args:
        folder: is not read.
        names: a shape and a number of rows, with a comma.
    """
    from torch._subclasses import FakeTensorMode
    from transformers import DynamicCache

    from qatc.graph.capture import Template
    from tests.cuda.generated import kernels_of, ptx_of, source_of

    found: dict[str, Any] = {}
    for name in names:
        shape, rows = name.split(", ")
        calls: list[tuple[Any, list[Tensor]]] = []
        own = Template.__call__

        def noted(self: Any, parameters: Any, leaves: Any, extra: Any = ()) -> Any:
            inputs = [*parameters, *(leaves[i] for i in self.inputs), *extra]
            calls.append((self.graph_module, inputs))  # noqa: B023
            return own(self, parameters, leaves, extra)  # noqa: B023

        with fake_gpus(), FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
            model = _load(mode, _without_numbers(SHAPES[shape]), "cuda")
            ids = torch.zeros((int(rows), 20), dtype=torch.long, device="cuda")
            cache: Any = DynamicCache()
            model(input_ids=ids, past_key_values=cache, use_cache=True)
            with mock.patch.object(Template, "__call__", noted):
                model(input_ids=ids[:, :1], past_key_values=cache, use_cache=True)
            source = source_of(*calls[0])
            ptx = {n: ptx_of(n, s) for n, s in kernels_of(source).items()}
        found[name] = {
            "launches": list(filter(None, map(_launched, source.splitlines()))),
            "divisions": sorted(
                {found for code in ptx.values() for found in _DIVISION.findall(code)}
            ),
        }
    return found


def _without_numbers(shape: dict[str, Any]) -> Any:
    """An output of a LLaMA of one layer, whose tensors have sizes only."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from qatc.output import Output, QuantizedWeight
    from qatc.recipe.recipe import Recipe

    config: Any = LlamaConfig(
        vocab_size=512, num_hidden_layers=1, tie_word_embeddings=False, **shape
    )
    config._attn_implementation = "sdpa"
    recipe = Recipe.from_bits("4-8-4")
    with torch.device("meta"):
        parameters = dict(LlamaForCausalLM(config).named_parameters())
    weights: dict[str, QuantizedWeight] = {}
    state: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        if parameter.dim() == 2 and "layers." in name:
            codes = torch.empty(parameter.shape, dtype=torch.int8)
            scale = torch.empty((len(codes), 1))
            weights[name] = QuantizedWeight(codes, scale, recipe.weights)
        else:
            state[name] = torch.empty(parameter.shape, dtype=torch.bfloat16)
    return Output(config, recipe, weights, state, directory=Path("."))


_DIVISION = re.compile(r"\b(?:div|rcp)\.[a-z0-9.]+")


_LAUNCH = re.compile(
    r"^\s*(?:\w+ = )?(?:(triton_\w+)\.run|torch\.ops\.qatc\.(\w+)\.\w+|(extern_kernels\.\w+))\("
)


def _launched(line: str) -> str | None:
    """What a line of Inductor's Python starts on the GPU, if it does: its own kernels by kind."""
    match = _LAUNCH.search(line)
    if match is None:
        return None
    own, op, extern = match.groups()
    return own.split("_fused")[0] if own else op or extern


def _load(mode: Any, output: Any, device: str) -> Any:
    """The model of an output whose files are real: safetensors knows no FakeTensors."""
    import qatc

    weights, state = (
        {key: _fake(mode, value) for key, value in read.items()}
        for read in (output.weights, output.state)
    )
    known = dataclasses.replace(output, weights=weights, state=state)
    return qatc.load(known, device=device, dtype=torch.bfloat16, compile=False)


class _Again:
    """Takes a recorded step anew when it is replayed."""

    def turn(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def record(self, step: Callable[[], Tensor]) -> Callable[[], Tensor]:
        step()
        return step


def _fake(mode: Any, value: Any) -> Any:
    if isinstance(value, Tensor):
        return mode.from_tensor(value)
    made = {k: mode.from_tensor(v) for k, v in vars(value).items() if isinstance(v, Tensor)}
    return dataclasses.replace(value, **made)


@contextlib.contextmanager
def _without_values() -> Iterator[None]:
    """A FakeTensor has no address, and two of them are alike if their shapes are."""
    from qatc.runtime.cuda import graphed

    def alike(logits: Tensor, wanted: Tensor, limit: float) -> bool:
        return logits.shape == wanted.shape and logits.dtype is wanted.dtype

    with (
        mock.patch.object(graphed, "_agree", alike),
        mock.patch.object(graphed.GraphedForward, "_is_what_was_recorded", lambda self: True),
    ):
        yield


@contextlib.contextmanager
def _noted_attention() -> Iterator[list[list[Any]]]:
    """Inside the block, queries and slots of SDPA over a cache are noted, and what is hidden."""
    import torch.nn.functional as F

    own, found = F.scaled_dot_product_attention, list[list[Any]]()

    def noted(query: Tensor, keys: Tensor, values: Tensor, **options: Any) -> Any:
        hidden = "by a mask" if options["attn_mask"] is not None else options["is_causal"]
        found.append([query.shape[2], keys.shape[2], hidden])
        return own(query, keys, values, **options)

    with mock.patch.object(F, "scaled_dot_product_attention", noted):
        yield found


def _devices(places: list[Any]) -> list[str]:
    return sorted({str(place.device) for place in places if isinstance(place, Tensor)})


PARTS = {"train": train, "run": run, "generate": generate}


def main(part: str, folder: str, *names: str) -> None:
    """Run a part."""
    gc.disable()  # a cycle that is freed while torch exports a graph may take the process along
    print(json.dumps(PARTS[part](Path(folder), [*names])))

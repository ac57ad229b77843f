"""What a model that runs on integers holds, and which kernels it runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qatc.graph.capture import Template
from qatc.graph.nodes import spec_of
from qatc.kernels import packed_linear
from qatc.kernels.cached_attention import quantized_attention
from qatc.kernels.gpu import attention
from qatc.kernels.site import PHASES
from qatc.kernels.table import choose
from qatc.passes.lower_linear import PACKED, SCALE
from qatc.runtime.cache import cache_attention, cache_tensors, cache_values
from qatc.runtime.cuda.graphed import GraphedForward
from qatc.runtime.forward import Runtime, runtime_of


@dataclass(frozen=True)
class Share:
    """What a quantized part of a loaded model takes.

    Attributes:
        part: what it is.
        held: bytes.
        bf16: bytes that it would take in bf16.
    """

    part: str
    held: int
    bf16: int

    @property
    def ratio(self) -> float:
        """The first of the second."""
        return self.held / self.bf16


@dataclass(frozen=True)
class Memory:
    """What a loaded model holds, in bytes.

    Attributes:
        quantized: packed codes and scales of quantized linears.
        ends: packed codes and scales of head and embedding, as far as they are quantized; those of
            a tied weight once.
        other: norms and everything else in full precision, among it a head or an embedding.
        cache_per_token: of the KV cache of all layers, for one token of one sequence.
        bf16_quantized: what the quantized linears would take in bf16.
        bf16_ends: what the quantized head and embedding would take in bf16, tied as in the model.
        bf16_cache_per_token: what the cache would take in bf16.
    """

    quantized: int
    other: int
    cache_per_token: int
    bf16_quantized: int
    bf16_cache_per_token: int
    ends: int = 0
    bf16_ends: int = 0

    def shares(self) -> tuple[Share, ...]:
        """The parts that the model has."""
        parts = (
            Share("quantized linears", self.quantized, self.bf16_quantized),
            Share("quantized head and embedding", self.ends, self.bf16_ends),
            Share("KV cache, per token", self.cache_per_token, self.bf16_cache_per_token),
        )
        return tuple(part for part in parts if part.bf16)


@dataclass(frozen=True)
class KernelUse:
    """What runs a linear of a layer kind.

    Attributes:
        layer: class of the layer.
        weight: name of the weight.
        shape: ``(N, K)``.
        phase: prefill or decode.
        kernel: its name.
        passed_over: kernels before it in the table, and why they do not run here.
    """

    layer: str
    weight: str
    shape: tuple[int, int]
    phase: str
    kernel: str
    passed_over: tuple[tuple[str, str], ...]


def memory(model: nn.Module) -> Memory:
    """Measure what a loaded model holds."""
    runtime = runtime_of(model)
    quantized = plain = other = 0
    at_ends, bf16_ends = _ends(runtime)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if id(tensor) in at_ends:
            continue
        if name.endswith((PACKED, SCALE)):
            quantized += tensor.nbytes
        else:
            other += tensor.nbytes
    for forward in runtime.forwards:
        own = dict(forward.module.named_buffers())
        shapes = {n: p.shape for n, p in forward.prototype.named_parameters()}
        plain += sum(2 * s.numel() for n, s in shapes.items() if n + PACKED in own)
    cache = cache_plain = 0
    for forward in runtime.forwards:
        template = next(iter(runtime.cached.of(forward)))
        tensors = cache_tensors(template)
        cache += sum(heads * width * dtype.itemsize for (heads, width), dtype in tensors)
        values = cache_values(template)
        cache_plain += sum(2 * int(v.shape[1]) * int(v.shape[3]) for v in values)
    ends = sum(tensor.nbytes for tensor in at_ends.values())
    return Memory(quantized, other, cache, plain, cache_plain, ends, bf16_ends)


def _ends(runtime: Runtime) -> tuple[dict[int, Tensor], int]:
    """The packed tensors of head and embedding, each once, and their bytes in bf16."""
    held: dict[int, Tensor] = {}
    plain: dict[int, int] = {}
    for forward in runtime.ends:
        packed, scale = (getattr(forward.module, f"weight{suffix}") for suffix in (PACKED, SCALE))
        held |= {id(packed): packed, id(scale): scale}
        plain[id(packed)] = 2 * forward.prototype.get_parameter("weight").numel()
    return held, sum(plain.values())


def kernel_report(model: nn.Module) -> list[KernelUse]:
    """What runs every linear of every layer kind, and why nothing faster does."""
    runtime = runtime_of(model)
    seen: dict[int, tuple[str, Template]] = {}
    for forward in runtime.forwards:
        for template in runtime.cached.of(forward):
            seen.setdefault(id(template), (type(forward.prototype).__name__, template))
    for end in runtime.ends:
        seen |= {id(template): (end.name, template) for template in end.store.of(end)}
    found = []
    for layer, template in seen.values():
        for node in template.graph_module.graph.nodes:
            if node.target is packed_linear.PACKED_LINEAR:
                found += _uses(layer, node, runtime)
    return found


def decoding_report(model: nn.Module) -> str:
    """What runs the decoding of a single row where graphs may be compiled, and why."""
    runtime = runtime_of(model)
    decode = runtime.decode
    assert decode is not None, "every loaded model has one"
    if isinstance(decode, GraphedForward):
        return decode.describe() + _reading(runtime)
    program = decode.program()
    if program is None:
        read = _reading(runtime)
        return f"the layers' graphs, one after another (no program: {decode.reason}){read}"
    return f"a program of {program.program.count} steps in C, one call for all layers"


def _reading(runtime: Runtime) -> str:
    """What reads the codes of a KV cache on a GPU, and why it is not Triton if it is not."""
    device = torch.device(runtime.device).type
    template = next(iter(runtime.cached.of(runtime.forwards[0])))
    node = cache_attention(template.graph_module.graph)
    if device != "cuda" or node.target is not quantized_attention:
        return ""
    keys, values = (int(value.shape[3]) for value in cache_values(template))
    specs = spec_of(node, "spec"), spec_of(node, "value_spec")
    why = attention.obstacle(device, *specs, (keys, values))
    return f"; attention reads codes by {'Triton' if why is None else f'Inductor: {why}'}"


def _uses(layer: str, node: torch.fx.Node, runtime: Runtime) -> list[KernelUse]:
    packed: Any = node.args[1]
    site = packed_linear.site_of(node, torch.device(runtime.device).type)
    name = packed.meta["parameter"].removesuffix(PACKED)
    uses = []
    for phase in PHASES:
        choice = choose(site, phase, runtime.kernels)
        shape = (site.outputs, site.inputs)
        uses.append(KernelUse(layer, name, shape, phase, choice.kernel.name, choice.passed_over))
    return uses

"""What would be quantized, and what it would cost, without loading any weights."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qatc.graph.capture import Template
from qatc.graph.nodes import (
    find_attentions,
    find_embeddings,
    find_linears,
    find_routers,
    is_fake_quantize,
    parameter_name,
    shape_of,
    spec_of,
)
from qatc.kernels.cached_attention import cache_shapes
from qatc.machine.device import pick_device
from qatc.models.load import load_skeleton
from qatc.models.pipelines import why_no_integer_forward
from qatc.models.preparation import prepare, prepared_state, quantized_specs
from qatc.models.support import is_convolution, owner_of
from qatc.models.vocabulary import find_ends
from qatc.passes import pass_records
from qatc.recipe.recipe import Recipe
from qatc.recipe.spec import FLOAT_BITS, QuantSpec

PAPER_LENGTH = 2048
"""Sequence length at which the paper counts operations."""


@dataclass(frozen=True)
class Quantizer:
    """One fake-quant node of a layer kind.

    Attributes:
        kind: ``weight``, ``input``, ``key``, ``value`` or ``embedding`` (rows of a table).
        where: the weight, or the weights that read the input.
        shape: sizes, with B and T for batch and sequence.
        bits: how many.
        group_size: values that share a scale; 0 for a whole row.
    """

    kind: str
    where: str
    shape: tuple[int | str, ...]
    bits: int
    group_size: int


@dataclass(frozen=True)
class LayerKind:
    """Layers that share one graph.

    Attributes:
        name: their class.
        layers: names of the layers.
        sites: fake-quant nodes, in graph order.
        passes: the pass record: name, options, matches, edits.
    """

    name: str
    layers: tuple[str, ...]
    sites: tuple[Quantizer, ...]
    passes: tuple[dict[str, Any], ...]


@dataclass(frozen=True)
class Plan:
    """What a recipe does to a model.

    Attributes:
        model: name.
        bits: weights-activations-KV.
        kinds: the layer kinds; head and embedding, where they are quantized, at the end.
        skipped: weight in full precision -> why.
        parameters: how many, tied ones once.
        size_gb: 10^9 bytes of the checkpoint: before, after.
        ends_gb: 10^9 bytes that head and embedding take of it: before, after.
        kv_bytes_per_token: bytes of KV cache per token over all layers: before, after (codes and
            fp32 scales, as the cache of :mod:`qatc.kernels.cached_attention` holds them).
        training: how the quantized linears would be computed in training on this machine.
        operations: MACs x weight bits x activation bits of one forward pass over
            ``PAPER_LENGTH`` tokens (LLM-QAT, arXiv 2305.17888, table 1): before, after. Attention
            products count activation bits (16) times KV bits; what is not quantized counts 16.
        weight_bits: bits of a quantized weight of a layer, on average.
    """

    model: str
    bits: str
    kinds: tuple[LayerKind, ...]
    skipped: dict[str, str]
    parameters: int
    size_gb: tuple[float, float]
    ends_gb: tuple[float, float]
    kv_bytes_per_token: tuple[float, float]
    operations: tuple[float, float]
    weight_bits: float
    training: str

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def inspect_model(name: str, recipe: Recipe, *, trust_remote_code: bool = False) -> Plan:
    """Capture a model without weights and say what ``recipe`` would do to it.

    Raises:
        ConfigError: there is no such model.
        CaptureError: its layers cannot be captured.
        PassError: there is nothing to quantize, or it cannot be.
    """
    skeleton = load_skeleton(name, trust_remote_code=trust_remote_code)
    model = prepare(skeleton.model, recipe, compile=False, integer_forward=False)
    prepared = prepared_state(model)
    groups: dict[int, tuple[Template, list[str]]] = {}
    for forward in prepared.forwards:
        for template in prepared.store.of(forward):
            groups.setdefault(id(template), (template, []))[1].append(forward.name)
    quantized = quantized_specs(model)
    kinds = [_kind(model, template, names) for template, names in groups.values()]
    for end, forward in prepared.ends:
        kinds += [_kind(model, template, [end.name]) for template in forward.store.of(forward)]
    width = skeleton.dtype.itemsize
    ends_gb = _end_sizes(model, recipe, width)
    return Plan(
        model=name,
        bits=recipe.bits,
        kinds=tuple(kinds),
        skipped=_skipped(model, recipe, quantized, _routers(groups)),
        parameters=sum(p.numel() for p in model.parameters()),
        size_gb=_sizes(model, quantized, width, ends_gb),
        ends_gb=ends_gb,
        kv_bytes_per_token=_kv_bytes(groups, recipe, width),
        operations=_operations(model, groups, recipe, quantized),
        weight_bits=_mean_bits(model, groups, quantized),
        training=_training(recipe),
    )


def _training(recipe: Recipe) -> str:
    obstacle = why_no_integer_forward(recipe, torch.device(pick_device("auto")))
    if obstacle is None:
        return "on int8 codes with exact int32 sums (UseIntegerForward)"
    return f"in float (no UseIntegerForward: {obstacle})"


def _kind(model: nn.Module, template: Template, layers: list[str]) -> LayerKind:
    gm = template.graph_module
    sites = []
    symbols = dict(zip((s for s in template.shapes[0] if isinstance(s, str)), "BT", strict=False))
    for node in gm.graph.nodes:
        if not is_fake_quantize(node):
            continue
        kind, where = _role(node)
        node_shape = shape_of(node)
        shape = tuple(_named(str(size), symbols) for size in node_shape)
        spec = spec_of(node)
        sites.append(Quantizer(kind, where, shape, spec.bits, spec.group_size or 0))
    order = {"input": 0, "weight": 1, "key": 2, "value": 3, "embedding": 4}
    sites.sort(key=lambda site: order[site.kind])
    records = tuple(asdict(record) for record in pass_records(gm))
    name = type(model.get_submodule(layers[0])).__name__
    return LayerKind(name, tuple(layers), tuple(sites), records)


def _named(size: str, symbols: Mapping[str, str]) -> int | str:
    """A size as a number where it is one, though export may hold it as an expression."""
    return int(size) if size.isdigit() else symbols.get(size, size)


def _role(node: torch.fx.Node) -> tuple[str, str]:
    """The kind of a fake-quant node, and which weights it belongs to."""
    gm = node.graph.owning_module
    assert gm is not None
    source = node.args[0]
    assert isinstance(source, torch.fx.Node)
    own = parameter_name(node)
    if own is not None:
        return "weight", own
    for embedding in find_embeddings(gm):
        if embedding.node is source:
            return "embedding", embedding.parameter
    readers = [linear.parameter for linear in find_linears(gm) if linear.input is node]
    if readers:
        return "input", ", ".join(reader.removesuffix(".weight") for reader in readers)
    for attention in find_attentions(gm):
        if attention.key is node:
            return "key", "scaled_dot_product_attention"
        if attention.value is node:
            return "value", "scaled_dot_product_attention"
    projection = parameter_name(source.args[1]) if len(source.args) > 1 else None  # type: ignore[arg-type]
    return "value" if _feeds_value(node) else "key", f"the output of {projection}"


def _feeds_value(node: torch.fx.Node) -> bool:
    """Whether a node at the projection site belongs to the values (K and V have equal shapes)."""
    gm = node.graph.owning_module
    assert gm is not None
    stack, seen = [a.value for a in find_attentions(gm)], set()
    while stack:
        current = stack.pop()
        if current is node:
            return True
        if current not in seen:
            seen.add(current)
            stack.extend(current.all_input_nodes)
    return False


def _skipped(
    model: nn.Module, recipe: Recipe, quantized: Collection[str], routers: set[str]
) -> dict[str, str]:
    reasons = {}
    for name, parameter in model.named_parameters():
        if name in quantized:
            continue
        if recipe.skips(name):
            pattern = next((p for p in recipe.skip if Recipe(skip=(p,)).skips(name)), None)
            reasons[name] = f"matches --skip {pattern}" if pattern else "weight_bits are 16"
        elif name in routers:
            reasons[name] = "the router of a mixture of experts"
        elif is_convolution(owner_of(model, name)):
            reasons[name] = "the weight of a convolution"
        elif parameter.dim() < 2:
            reasons[name] = "not the weight of a linear layer"
        elif not recipe.weights.quantizes:
            reasons[name] = "the recipe has 16 weight bits"
        else:
            reasons[name] = "not read by a linear inside a decoder layer"
    return reasons


def _routers(groups: dict[int, tuple[Template, list[str]]]) -> set[str]:
    """Names of the weights that choose experts."""
    return {
        f"{layer}.{router.parameter}"
        for template, layers in groups.values()
        for router in find_routers(template.graph_module)
        for layer in layers
    }


def _sizes(
    model: nn.Module,
    quantized: Mapping[str, QuantSpec],
    width: int,
    ends_gb: tuple[float, float],
) -> tuple[float, float]:
    before = after = 0.0
    ends = {id(end.module.weight) for end in find_ends(model)}
    for name, parameter in model.named_parameters():
        if id(parameter) not in ends:
            before += parameter.numel() * width
            after += _stored_bytes(parameter, quantized.get(name), width)
    return before / 1e9 + ends_gb[0], after / 1e9 + ends_gb[1]


def _end_sizes(model: nn.Module, recipe: Recipe, width: int) -> tuple[float, float]:
    """10^9 bytes of head and embedding: a tied weight once for each form that is stored of it."""
    before: dict[int, float] = {}
    after: dict[tuple[int, QuantSpec], float] = {}
    for end in find_ends(model):
        weight, spec = end.module.weight, getattr(recipe, end.role)
        before[id(weight)] = weight.numel() * width
        after[id(weight), spec] = _stored_bytes(weight, spec, width)
    return sum(before.values()) / 1e9, sum(after.values()) / 1e9


def _stored_bytes(weight: Tensor, spec: QuantSpec | None, width: int) -> float:
    """Bytes of a weight as it is written, scales included."""
    if spec is None or not spec.quantizes:
        return weight.numel() * width
    rows, columns = weight.shape
    groups = columns // (spec.group_size or columns)
    return weight.numel() * (4 if spec.bits <= 4 else 8) / 8 + rows * groups * width


def _mean_bits(
    model: nn.Module,
    groups: dict[int, tuple[Template, list[str]]],
    quantized: Mapping[str, QuantSpec],
) -> float:
    """Bits of the quantized weights of layers, on average over their numbers."""
    layers = [f"{layer}." for _, names in groups.values() for layer in names]
    own = {n: spec for n, spec in quantized.items() if n.startswith(tuple(layers))}
    numbers = {name: model.get_parameter(name).numel() for name in own}
    bits = sum(own[name].bits * numbers[name] for name in own)
    return bits / sum(numbers.values()) if own else FLOAT_BITS


def _kv_bytes(
    groups: dict[int, tuple[Template, list[str]]], recipe: Recipe, width: int
) -> tuple[float, float]:
    before = after = 0.0
    for template, layers in groups.values():
        for attention in find_attentions(template.graph_module):
            for node, spec in ((attention.key, recipe.kv), (attention.value, recipe.values)):
                heads, size = int(shape_of(node)[1]), int(shape_of(node)[3])
                before += len(layers) * heads * size * width
                if spec.quantizes and recipe.kv_site == "cache":
                    held = cache_shapes(spec, size)
                    after += len(layers) * heads * sum(n * dtype.itemsize for n, dtype in held)
                elif spec.quantizes:
                    after += len(layers) * (heads * size * spec.bits / 8 + 4)
                else:
                    after += len(layers) * heads * size * width
    return before, after


def _operations(
    model: nn.Module,
    groups: dict[int, tuple[Template, list[str]]],
    recipe: Recipe,
    quantized: Mapping[str, QuantSpec],
) -> tuple[float, float]:
    before = after = 0.0
    for template, layers in groups.values():
        for linear in find_linears(template.graph_module):
            rows, columns = (int(size) for size in shape_of(linear.weight))
            macs = len(layers) * rows * columns * PAPER_LENGTH
            name = f"{layers[0]}.{linear.parameter}"
            before += macs * 16 * 16
            weight_bits = quantized[name].bits if name in quantized else FLOAT_BITS
            input_bits = recipe.activations.bits if is_fake_quantize(linear.input) else 16
            after += macs * weight_bits * input_bits
        for attention in find_attentions(template.graph_module):
            heads, size = int(shape_of(attention.query)[1]), int(shape_of(attention.query)[3])
            macs = len(layers) * heads * size * PAPER_LENGTH * PAPER_LENGTH
            before += 2 * macs * 16 * 16
            after += macs * 16 * (recipe.kv.bits + recipe.values.bits)
    head = model.get_output_embeddings()  # type: ignore[operator]
    if head is not None:
        macs = head.weight.numel() * PAPER_LENGTH
        before += macs * 16 * 16
        input_bits = recipe.activations.bits if recipe.head.quantizes else FLOAT_BITS
        after += macs * recipe.head.bits * input_bits
    return before, after

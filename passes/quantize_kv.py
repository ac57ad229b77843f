"""Fake-quantize keys and values where a KV cache would store them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from torch.fx import GraphModule, Node

from qatc.errors import PassError
from qatc.graph.edits import add_parameter, insert_between, insert_quantizer
from qatc.graph.nodes import (
    Attention,
    as_node,
    aten,
    find_attentions,
    find_projections,
    is_fake_quantize,
    parameter_name,
    quantizer_of,
    shape_of,
)
from qatc.numerics.hadamard import HADAMARD
from qatc.passes.base import Edits, GraphPass
from qatc.passes.canonicalize import Canonicalize
from qatc.passes.quantize_linear_inputs import check_groups
from qatc.recipe.spec import QuantSpec, spec_arg

KEY_CENTER, KEY_GAIN, VALUE_GAIN = "key_center", "key_gain", "value_gain"
"""Names of what a layer holds of its keys and values: the constant that is taken off its keys
``[Hkv, 1, D]``, and the gains of their scales ``[Hkv, 1, 1]``."""


@dataclass(frozen=True)
class RotateKeys(GraphPass):
    """Turn the queries and the keys that attention reads by a Hadamard transform of every head.

    Their products stay as they are (QuaRot, arXiv 2404.00456, section 4), and a cache gets keys
    whose outliers are spread over their head.
    """

    requires = (Canonicalize,)

    def edit(self, gm: GraphModule) -> Edits:
        attentions = find_attentions(gm)
        open_ = [attention for attention in attentions if attention.query.target is not HADAMARD]
        for attention in open_:
            value = attention.value
            for source in dict.fromkeys((attention.query, attention.key)):
                insert_between(source, [attention.node], HADAMARD, (), {})
            attention.node.update_arg(2, value)  # which may be the key as well
        return Edits(matched=len(attentions), edited=len(open_))

    def nothing_matched(self) -> str:
        return "there is no aten.scaled_dot_product_attention whose keys could be rotated"


@dataclass(frozen=True)
class CenterKeys(GraphPass):
    """Take a constant vector per head off the keys that attention reads.

    Scores of a query move by one amount, its product with the constant, and softmax is blind to
    that: the graph computes what it did, and a cache has smaller keys to quantize. It holds for
    ``aten.scaled_dot_product_attention``, which neither bounds scores nor has sinks beside them.
    """

    requires = (Canonicalize,)

    def edit(self, gm: GraphModule) -> Edits:
        attentions = find_attentions(gm)
        open_ = [attention for attention in attentions if not _is_centered(attention.key)]
        for attention in open_:
            key, query = attention.key, attention.query
            heads, width = int(shape_of(key)[1]), int(shape_of(key)[3])
            name = _name(KEY_CENTER, attentions.index(attention))
            center = add_parameter(gm, name, (heads, 1, width), key)
            insert_between(key, [attention.node], aten.sub.Tensor, (center,), {})
            attention.node.update_arg(0, query)  # which may be the key as well
        return Edits(matched=len(attentions), edited=len(open_))

    def nothing_matched(self) -> str:
        return "there is no aten.scaled_dot_product_attention whose keys could be centered"


def _is_centered(key: Node) -> bool:
    quantizer = quantizer_of(key)
    source = key if quantizer is None else as_node(quantizer.args[0])
    if source.target is not aten.sub.Tensor:
        return False
    return (parameter_name(as_node(source.args[1])) or "").startswith(KEY_CENTER)


def _name(name: str, number: int) -> str:
    """Of the first attention of a layer, the name itself."""
    return name if number == 0 else f"{name}_{number}"


@dataclass(frozen=True)
class QuantizeKV(GraphPass):
    """Insert fake-quant nodes on the keys and values of every attention.

    Args:
        spec: bits, range and (optional) group size.
        site: ``"cache"``: the K and V that attention reads, so K after the rotary embedding, one
            scale per token and head. ``"projection"``: the outputs of the K and V projections, one
            scale per token over all heads (as in the code of LLM-QAT, arXiv 2305.17888).
        values: spec of the values in a cache, where it is not that of the keys.
    """

    spec: QuantSpec = field(default_factory=lambda: QuantSpec(bits=4))
    site: Literal["cache", "projection"] = "cache"
    values: QuantSpec | None = None
    requires = (Canonicalize,)

    def edit(self, gm: GraphModule) -> Edits:
        find = _cache_sites if self.site == "cache" else _projection_sites
        values = check_one_rule(self.spec, self.values)
        sites: dict[Node, tuple[QuantSpec, list[Node]]] = {}
        done = 0
        attentions = find_attentions(gm)
        queries = [attention.query for attention in attentions]
        for attention in attentions:
            for source, user, is_value in find(attention):
                spec = values if is_value else self.spec
                if is_fake_quantize(source):
                    done += 1
                    continue
                check_groups(spec, source, f"the {self.site} site of keys and values")
                known, users = sites.setdefault(source, (spec, []))
                if known != spec:
                    raise PassError(
                        f"keys and values are one tensor here, and would get {known.bits} and"
                        f" {spec.bits} bits; leave value_bits out"
                    )
                users.append(user)
        for source, (spec, users) in sites.items():
            gain = self._gain(gm, attentions, users[0], source) if spec.learned else None
            insert_quantizer(source, users, spec, snap_scale=False, gain=gain)
        for attention, query in zip(attentions, queries, strict=True):
            attention.node.update_arg(0, query)  # which may be the key as well
        return Edits(matched=len(sites) + done, edited=len(sites))

    def _gain(self, gm: GraphModule, attentions: list[Attention], user: Node, source: Node) -> Node:
        """The gains of the keys or of the values that ``user`` reads, one for each head."""
        number = next(i for i, attention in enumerate(attentions) if attention.node is user)
        name = KEY_GAIN if attentions[number].key is source else VALUE_GAIN
        return add_parameter(gm, _name(name, number), (int(shape_of(source)[1]), 1, 1), source)

    def nothing_matched(self) -> str:
        return (
            "there is no aten.scaled_dot_product_attention; load the model with"
            ' attn_implementation="sdpa" if its architecture has it, or leave K and V alone with'
            " 16 KV bits, such as 4-8-16"
        )


def check_one_rule(keys: QuantSpec, values: QuantSpec | None) -> QuantSpec:
    """The spec of values, which may differ from that of keys in its bits.

    Raises:
        PassError: it differs in something else, or one of the two is not quantized.
    """
    values = values or keys
    if replace(keys, bits=values.bits) != values or keys.quantizes != values.quantizes:
        raise PassError(
            f"values ({spec_arg(values)}) differ from keys ({spec_arg(keys)}) in more than their"
            " bits, of 2 to 8; a cache has one rule for both"
        )
    return values


def _cache_sites(attention: Attention) -> list[tuple[Node, Node, bool]]:
    return [(attention.key, attention.node, False), (attention.value, attention.node, True)]


def _projection_sites(attention: Attention) -> list[tuple[Node, Node, bool]]:
    sites = []
    for source, is_value in ((attention.key, False), (attention.value, True)):
        projections = find_projections(source)
        if len(projections) != 1:
            raise PassError(
                f"the projection site needs one linear behind each of K and V, but"
                f" {len(projections)} were found; use the cache site (--kv-site cache)"
            )
        users = list(projections[0].users)
        sites += [(*_site_after(projections[0], user), is_value) for user in users]
    if sites and sites[0][0] is sites[-1][0]:
        raise PassError(
            f"K and V come from one projection ({parameter_name_of_linear(sites[0][0])});"
            " use the cache site (--kv-site cache)"
        )
    return sites


def _site_after(projection: Node, user: Node) -> tuple[Node, Node]:
    """The edge that is to be quantized, or the fake-quant node already there."""
    return (user, user) if is_fake_quantize(user) else (projection, user)


def parameter_name_of_linear(node: Node) -> str | None:
    """Name of the weight of the linear ``node``."""
    weight = node.args[1]
    assert isinstance(weight, Node)
    return parameter_name(weight)

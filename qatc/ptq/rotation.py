"""Rotation (QuaRot, arXiv 2404.00456; SpinQuant, arXiv 2405.16406), folded into the weights.

An RMSNorm without a weight commutes with every rotation of what it normalizes. So once the weights
of the norms are folded into the linears that read them, the whole residual stream can be turned by
one orthogonal matrix R1: what writes to the stream (embedding, output and down projections) is
multiplied by it, and what reads it (all other linears and the head) by its inverse. A Hadamard
matrix spreads the few huge channels of a stream over all of them, which leaves activation
quantizers an even range. R2 does the same within each head of V, between V's projection and the
output projection.

Nothing is left to do at run time for these two. What a down projection reads is the product of two
projections, which no weight turns: it is turned at run time (R4), by the transform that
``rotate_inputs`` of a recipe puts into the graph, and :func:`rotate_inputs` turns the weight alike.
The heads of Q and K are turned behind the rotary embedding (R3) where a recipe has
``rotate_keys``: their products stay as they are, so that no weight is turned for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from qatc.errors import ConfigError
from qatc.graph.capture import capture
from qatc.graph.nodes import Linear, aten, find_linears, find_quantizable
from qatc.models.support import refuse_idle_patterns
from qatc.models.vocabulary import End, are_tied, find_ends, untie
from qatc.numerics.hadamard import hadamard, random_hadamard, turn
from qatc.passes import Canonicalize
from qatc.ptq.structure import (
    Chain,
    Gain,
    Layer,
    bias_name,
    find_chains,
    find_gains,
    layer_graphs,
    uncast,
    users_of,
)
from qatc.ptq.weights import assign, owner, scale_inputs, value
from qatc.recipe.patterns import matches
from qatc.recipe.recipe import Recipe

_OTHERWISE = "choose the method gptq or smoothquant"
_CHUNK = 4096
"""Rows of a weight that are turned at a time, in fp64."""


@torch.no_grad()
def rotate(model: Any, *, r1: bool = True, r2: bool = True, seed: int = 0) -> None:
    """Turn the residual stream (R1) and the heads of V (R2) of a model, in place.

    What it computes stays as it is, up to rounding of its weights' dtype: give fp32 masters. Head
    and embedding, if they were tied, are not afterwards: the norm between them is folded into the
    head alone.

    Args:
        model: a transformers causal LM of RMSNorms and linears that is not prepared.
        r1: rotate the residual stream, by a Hadamard matrix with random signs.
        r2: rotate each head of V, by a Hadamard matrix.
        seed: of the signs.

    Raises:
        ConfigError: a layer is built in another way, and why; nothing was changed.
        CaptureError: a layer cannot be captured.
    """
    layers = layer_graphs(model)
    values = [(layer, _value_chain(layer)) for layer in layers] if r2 else []
    if r1:
        streams = [_stream(layer) for layer in layers]
        _rotate_stream(model, streams, _outside(model, layers), seed)
    for layer, chain in values:
        _rotate_values(layer.module, chain)


@torch.no_grad()
def rotate_inputs(model: Any, recipe: Recipe) -> None:
    """Turn the weights whose linears read a rotated input by ``recipe``, in place.

    The model by itself then computes something else; prepared with the recipe, whose graph rotates
    those inputs, it computes what it did. Other methods than GPTQ go before this one.

    Args:
        model: a transformers causal LM that is not prepared.
        recipe: with ``rotate_inputs``.

    Raises:
        ConfigError: a layer has no linear whose weight that names; nothing was changed.
        CaptureError: a layer cannot be captured.
    """
    refuse_idle_patterns(model, recipe)
    for layer, linear in _rotated(layer_graphs(model), recipe):
        weight = layer.module.get_parameter(linear.parameter)
        chunks = [turn(chunk.double()) for chunk in weight.split(_CHUNK)]
        assign(layer.module, linear.parameter, torch.cat(chunks))


@contextmanager
def rotated_inputs(layers: Sequence[Layer], recipe: Recipe) -> Iterator[None]:
    """Let plain layers rotate the inputs that ``recipe`` names, as a graph would, in the block."""
    with ExitStack() as hooks:
        for layer, linear in _rotated(layers, recipe):
            module = owner(layer.module, linear.parameter)
            handle = module.register_forward_pre_hook(lambda _, args: (turn(args[0]), *args[1:]))
            hooks.callback(handle.remove)
        yield


def _rotated(layers: Sequence[Layer], recipe: Recipe) -> list[tuple[Layer, Linear]]:
    """The linears whose input ``recipe`` rotates, as :class:`qatc.passes.RotateLinearInputs`."""
    found = []
    for layer in layers:
        names = recipe.exceptions(layer.name, dict(layer.module.named_parameters())).rotated
        own = [one for one in find_quantizable(layer.graph) if matches(one.parameter, names)]
        if names and not own:
            raise ConfigError(
                f"{_title(layer)} has no linear whose input could be rotated by"
                f" rotate_inputs={list(recipe.rotate_inputs)}; name the weights of its down"
                " projections there, or leave it out"
            )
        found += [(layer, linear) for linear in own]
    return found


def untie_head(model: Any) -> None:
    """Give the head a weight of its own, if it shares that of the embedding."""
    ends = find_ends(model)
    if are_tied(ends):
        (head,) = (end.module for end in ends if end.role == "head")
        head.weight = nn.Parameter(head.weight.detach().clone(), head.weight.requires_grad)
        untie(model.config)


@dataclass(frozen=True, eq=False)
class _Stream:
    """Who writes to the residual stream within a layer, and which norms read it."""

    layer: Layer
    writers: tuple[Linear, ...]
    norms: tuple[Gain, ...]


@dataclass(frozen=True, eq=False)
class _Outside:
    """What lies around the decoder layers: embedding, head, and the norm between."""

    embedding: End
    head: End
    norm: nn.Module
    gain: Gain


def _rotate_stream(model: Any, streams: list[_Stream], outside: _Outside, seed: int) -> None:
    embedding, head = outside.embedding.module, outside.head.module
    untie_head(model)
    size = embedding.weight.shape[1]
    turn = random_hadamard(size, torch.Generator().manual_seed(seed)).to(embedding.weight.device)
    assign(embedding, "weight", _turned(embedding.weight, turn))
    for stream in streams:
        layer = stream.layer.module
        for gain in stream.norms:
            scale_inputs(layer, gain.readers, _take_gain(layer, gain))
            for linear in gain.readers:
                weight = layer.get_parameter(linear.parameter)
                assign(layer, linear.parameter, _turned(weight, turn))
        for linear in stream.writers:
            assign(layer, linear.parameter, turn.T @ value(layer, linear.parameter))
            if (bias := bias_name(linear)) is not None:
                assign(layer, bias, turn.T @ value(layer, bias))
    factors = _take_gain(outside.norm, outside.gain)
    assign(head, "weight", _turned(head.weight, factors.unsqueeze(1) * turn))


def _rotate_values(layer: nn.Module, chain: Chain) -> None:
    """Turn the outputs of V's projection head by head, and back in what reads them."""
    assert chain.heads is not None
    query, kv = chain.heads
    name = chain.source.parameter
    weight = value(layer, name)
    size = weight.shape[0] // kv
    turn = hadamard(size).to(weight.device)
    assign(layer, name, (turn.T @ weight.view(kv, size, -1)).flatten(0, 1))
    if (bias := bias_name(chain.source)) is not None:
        assign(layer, bias, (value(layer, bias).view(kv, size) @ turn).flatten())
    for linear in chain.readers:
        weight = value(layer, linear.parameter)
        assign(layer, linear.parameter, (weight.view(-1, query, size) @ turn).flatten(1))


def _turned(weight: Tensor, turn: Tensor) -> Tensor:
    """``weight @ turn``, in fp64, for a weight ``[N, K]`` that may be a whole vocabulary."""
    chunks = weight.detach().split(_CHUNK)
    return torch.cat([(chunk.double() @ turn).to(weight.dtype) for chunk in chunks])


def _take_gain(layer: nn.Module, gain: Gain) -> Tensor:
    """The factors of a norm, which has none afterwards."""
    factors = value(layer, gain.weight) + gain.offset
    assign(layer, gain.weight, torch.full_like(factors, 1 - gain.offset))
    return factors


def _value_chain(layer: Layer) -> Chain:
    chains = [chain for chain in find_chains(layer.graph) if chain.heads is not None]
    if len(chains) != 1:
        raise ConfigError(
            f"{_title(layer)} has no linear of its own for V whose heads the output projection"
            f" reads, so that R2 cannot be folded; rotate(model, r2=False), or {_OTHERWISE}"
        )
    return chains[0]


def _stream(layer: Layer) -> _Stream:
    """The residual stream of a layer, of which nothing else may be made than norms and sums."""
    linears = {linear.node: linear for linear in find_linears(layer.graph)}
    output = next(n for n in layer.graph.graph.nodes if n.op == "output")
    hidden = next(
        n for n in layer.graph.graph.nodes if n.op == "placeholder" and "parameter" not in n.meta
    )
    writers: list[Linear] = []
    sums: set[Node] = {hidden}
    waiting: list[Any] = [output.args[0][0]]
    while waiting:
        node = uncast(waiting.pop())
        if node in linears:
            writers.append(linears[node])
        elif node.target is aten.add.Tensor and all(isinstance(a, Node) for a in node.args):
            waiting.extend(node.args)
            sums.add(node)
        elif _is_scaled(node):
            waiting.append(next(a for a in node.args if isinstance(a, Node)))
        elif node is not hidden:
            raise ConfigError(
                f"{_title(layer)} adds the result of {node.target} to its residual stream, which"
                f" only linears may write to if it is to be rotated; {_OTHERWISE}"
            )
    norms = [gain for gain in find_gains(layer.graph) if gain.source in sums]
    allowed = {node for gain in norms for node in gain.inside} | sums | {output}
    for node in sums:
        for user in users_of(node):
            if user not in allowed and not _is_scaled(user) and user.target != aten.sym_size.int:
                raise ConfigError(
                    f"{_title(layer)} reads its residual stream by {user.target}, which is no"
                    f" RMSNorm, so that it cannot be rotated; {_OTHERWISE}"
                )
    unread = [gain.weight for gain in norms if not gain.readers]
    if unread or not norms:
        raise ConfigError(
            f"{_title(layer)} has no norm that linears alone read"
            f"{f' ({unread[0]} is read by others)' if unread else ''}, so that its residual stream"
            f" cannot be rotated; {_OTHERWISE}"
        )
    return _Stream(layer, tuple(writers), tuple(norms))


def _is_scaled(node: Node) -> bool:
    """Whether ``node`` is another one times a number, as Granite scales what it adds."""
    if node.op != "call_function" or node.target not in (aten.mul.Tensor, aten.mul.Scalar):
        return False
    return sum(isinstance(a, Node) for a in node.args) == 1


def _title(layer: Layer) -> str:
    return f"{layer.name} ({type(layer.module).__name__})"


def _outside(model: Any, layers: list[Layer]) -> _Outside:
    """The ends of the model, if only an RMSNorm lies between the layers and the head."""
    ends = {end.role: end for end in find_ends(model)}
    if ends.keys() != {"embedding", "head"} or not isinstance(ends["head"].module, nn.Linear):
        raise ConfigError(
            f"{type(model).__name__} has no embedding and linear head to rotate; {_OTHERWISE}"
        )
    read, written = _trace(model)
    first, last = layers[0].module, layers[-1].module
    table = ends["embedding"].module
    if not _is_multiple(read[first], written[table]):
        raise ConfigError(
            f"{type(model).__name__} does more than look up tokens before its first layer, so that"
            f" its residual stream cannot be rotated; {_OTHERWISE}"
        )
    head = ends["head"].module
    for norm, seen in read.items():
        if (
            norm not in (head, table)
            and seen.data_ptr() == written[last].data_ptr()
            and written[norm].data_ptr() == read[head].data_ptr()
            and any(True for _ in norm.parameters(recurse=False))
        ):
            graph = capture(norm, (seen,), {}, "the last norm").graph_module
            Canonicalize()(graph)
            gains = find_gains(graph)
            if len(gains) == 1 and gains[0].source is not None:
                return _Outside(ends["embedding"], ends["head"], norm, gains[0])
    raise ConfigError(
        f"{type(model).__name__} has no RMSNorm alone between its last layer and its head, so that"
        f" its residual stream cannot be rotated; {_OTHERWISE}"
    )


def _trace(model: Any) -> tuple[dict[nn.Module, Tensor], dict[nn.Module, Tensor]]:
    """What every module reads first, and gives, on a few tokens."""
    read: dict[nn.Module, Tensor] = {}
    written: dict[nn.Module, Tensor] = {}

    def note(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        given = args[0] if args else kwargs.get("hidden_states")
        result = output[0] if isinstance(output, tuple) else output
        if isinstance(given, Tensor) and isinstance(result, Tensor):
            read[module], written[module] = given, result

    table = model.get_input_embeddings()
    ids = torch.arange(16, device=table.weight.device).view(2, 8) % table.weight.shape[0]
    with ExitStack() as hooks:
        for module in model.modules():
            hooks.callback(module.register_forward_hook(note, with_kwargs=True).remove)
        model(input_ids=ids, use_cache=False)
    return read, written


def _is_multiple(one: Tensor, other: Tensor) -> bool:
    """Whether ``one`` is ``other`` times a number."""
    if one.shape != other.shape:
        return False
    one, other = one.double(), other.double()
    factor = (one * other).sum() / other.square().sum()
    return torch.allclose(one, factor * other, rtol=1e-2, atol=1e-3 * float(one.abs().max()))

"""The parity gate: what runs on integers is what was trained.

``verify`` loads an output twice, as the graph that was trained and as the graph that runs on
integers, and compares them on text that the model writes itself, in fp32 and uncompiled:

1. *stored*: codes, scales and float tensors are those of the trained model, bit for bit;
2. *local*: every quantized linear and every K/V site, given the same input in both graphs, gives
   the same codes and the same output;
3. *global*: the logits of the trained graph with its integer forward and of the lowered graph are
   the same; those of its float form have a KL divergence that is small beside that to the teacher;
4. *cached*: token by token, in chunks and in one go the lowered graph says the same, and it says
   the same bits after a reload in a new process.

A code that lies on a rounding tie falls either way with the last bit of a float sum, and moves
everything behind it a little. Where two graphs do not see the very same numbers, it is therefore
their distributions that are compared.
"""

from __future__ import annotations

import hashlib
import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Interpreter, Node

from qatc import kernels, packing
from qatc.capture import Template
from qatc.errors import ParityError
from qatc.export import load_float_state, load_reference, read_metadata, read_recipe
from qatc.export.directory import digest_of
from qatc.graph import ATTENTION, LINEAR, is_quantized, parameter_name, quantizer_of
from qatc.kv_cache import cached_attention, quantized_attention
from qatc.ops import quantize
from qatc.packed_cache import cache_tensors
from qatc.passes.lower_linear import PACKED, SCALE
from qatc.preparation import prepare, prepared_state, recipe_allows_integers
from qatc.recipe import Recipe
from qatc.runtime import LoweredForward, load, runtime_of, take_out
from qatc.templates import TemplateForward

ROWS, LENGTH = 3, 40
LOCAL_LIMIT = 1e-5
LOGITS_LIMIT = 1e-4
KL_SHARE = 0.02
WIRING_LIMIT = 0.05
STALE = 99
"""What unused cache slots are filled with: no query may see it."""


@dataclass(frozen=True)
class Check:
    """One comparison.

    Attributes:
        point: stored, local, global or cached.
        what: what was compared.
        figure: the largest difference found, in the unit that ``what`` names.
        limit: what it may be.
        where: the first place that differs by more than the limit, if one does.
    """

    point: str
    what: str
    figure: float
    limit: float
    where: str | None = None

    @property
    def passed(self) -> bool:
        """Whether the figure is within its limit."""
        return self.figure <= self.limit


@dataclass(frozen=True)
class ParityReport:
    """What :func:`verify` found."""

    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """Whether every check passed."""
        return all(check.passed for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        checks = [asdict(check) | {"passed": check.passed} for check in self.checks]
        return {"passed": self.passed, "checks": checks}

    def require(self, what: str) -> ParityReport:
        """Return the report itself.

        Raises:
            ParityError: a check failed; the message names the first place that differs.
        """
        for check in self.checks:
            if not check.passed:
                place = f" at {check.where}" if check.where else ""
                raise ParityError(
                    f"{what} does not compute what was trained: {check.what} differs{place}"
                    f" ({check.figure:.3g}, at most {check.limit:.3g}); please report this with the"
                    " model and the recipe, and do not use the output"
                )
        return self


def verify(
    directory: Path | str,
    *,
    trained: Mapping[str, Tensor] | None = None,
    device: str = "cpu",
    reload: bool = True,
) -> ParityReport:
    """Compare an output's integer model with the graph that was trained.

    Args:
        directory: an output of ``qatc quantize``.
        trained: the trained state dict, if it is at hand: the stored codes must be its codes.
        device: torch device.
        reload: load the output in a new process as well.

    Returns:
        All checks, in order. Nothing is raised for one that fails; see
        :meth:`ParityReport.require`.

    Raises:
        CheckpointError: the directory is no complete output.
        PassError: the recipe has no integer runtime.
    """
    directory = Path(directory)
    recipe, metadata = read_recipe(directory), read_metadata(directory)
    lowered = load(directory, device=device, dtype=torch.float32, compile=False)
    checks = [_stored(lowered, directory, recipe, metadata, trained)]
    reference = load_reference(directory).to(device)  # type: ignore[arg-type]
    prepare(reference, recipe, compile=False, integer_forward=False)
    ids = _write_text(lowered, device)
    with torch.no_grad():
        checks += _local(reference, lowered, recipe, ids)
        checks += _global(directory, reference, lowered, recipe, ids, _allowed_kl(metadata))
        checks += _cached(lowered, ids, _allowed_kl(metadata))
        if reload:
            checks.append(_reloaded(directory, lowered, ids, device))
    return ParityReport(tuple(checks))


def _allowed_kl(metadata: Mapping[str, Any]) -> float:
    """2 % of the KL divergence to the teacher, where it was measured."""
    figures = metadata.get("figures", {})
    measured = [models["QAT"]["kl"] for models in figures.values() if "QAT" in models]
    return KL_SHARE * max([float(kl) for kl in measured if kl], default=0.05)


def _stored(
    model: nn.Module,
    directory: Path,
    recipe: Recipe,
    metadata: Mapping[str, Any],
    trained: Mapping[str, Tensor] | None,
) -> Check:
    """What the loaded model holds, by the digests taken when it was written, or by the masters."""
    held = dict(model.state_dict(keep_vars=True)) | dict(model.named_buffers())
    wrong = []
    for name, digest in metadata["digests"].items():
        packed = held.get(name + PACKED)
        if packed is None:
            continue
        codes = packing.unpack(packed, recipe.weights.bits, _width(model, name))
        same = digest_of(codes, held[name + SCALE]) == digest
        if same and trained is not None:
            wanted, scale = quantize(trained[name].detach(), recipe.weights, snap=True)
            same = torch.equal(codes.cpu(), wanted.cpu())
            same = same and torch.equal(held[name + SCALE].cpu(), scale.cpu())
        if not same:
            wrong.append(name)
    for name, value in load_float_state(directory).items():
        if digest_of(value) != metadata["float_digests"].get(name):
            wrong.append(name)
    what = "number of stored tensors that are not the trained ones"
    return Check("stored", what, len(wrong), 0, wrong[0] if wrong else None)


def _width(model: nn.Module, name: str) -> int:
    for forward in runtime_of(model).forwards:
        shapes = {f"{forward.name}.{n}": p.shape for n, p in forward.prototype.named_parameters()}
        if name in shapes:
            return int(shapes[name][1])
    raise AssertionError(f"no layer has {name}")


@torch.no_grad()
def _write_text(model: Any, device: str) -> Tensor:
    """Rows that the model samples itself, from one token each; the same in every run."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.get_output_embeddings().weight.shape[0]
    limit = getattr(model.config, "max_position_embeddings", None) or LENGTH
    ids = torch.randint(vocabulary, (ROWS, 1), generator=generator).to(device)
    cache, new = None, ids
    for _ in range(min(LENGTH, limit - 1) - 1):
        out = model(input_ids=new, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        probabilities = out.logits[:, -1].float().softmax(-1).nan_to_num(1 / vocabulary).cpu()
        new = torch.multinomial(probabilities, 1, generator=generator).to(device)
        ids = torch.cat([ids, new], 1)
    return ids


@dataclass(frozen=True)
class _Difference:
    """How far a place in the lowered layer is from the same place in the trained one."""

    kind: str
    place: str
    figure: float


_LOCAL = {
    "linear": ("the output of a quantized linear, relative to its largest", LOCAL_LIMIT),
    "codes": ("the share of K and V codes that are not the trained ones", 0.0),
    "attention": ("the output of attention over the cache, relative to its largest", LOCAL_LIMIT),
    "wiring": ("what a node of the lowered layer reads, relative to its norm", WIRING_LIMIT),
}


def _local(reference: Any, lowered: Any, recipe: Recipe, ids: Tensor) -> list[Check]:
    found: list[_Difference] = []
    for forward, own, call in _calls(reference, lowered, ids):
        for difference in _compare(forward, own, call, recipe):
            found.append(_named(difference, own.name))
    checks = []
    for kind, (what, limit) in _LOCAL.items():
        mine = [difference for difference in found if difference.kind == kind]
        if mine:
            wrong = [d.place for d in mine if not d.figure <= limit]
            worst = max(d.figure for d in mine)
            checks.append(Check("local", what, worst, limit, wrong[0] if wrong else None))
    return checks


def _named(difference: _Difference, layer: str) -> _Difference:
    figure = difference.figure if math.isfinite(difference.figure) else math.inf
    return _Difference(difference.kind, f"{layer}, {difference.place}", figure)


def _calls(
    reference: Any, lowered: Any, ids: Tensor
) -> Iterator[tuple[TemplateForward, LoweredForward, tuple[Any, Any]]]:
    """Every layer, in both models, with the arguments that the trained model calls it with."""
    calls: list[tuple[Any, Any]] = []
    forwards = prepared_state(reference).forwards
    hooks = [
        forward.module.register_forward_pre_hook(
            lambda module, args, kwargs: calls.append((args, dict(kwargs))), with_kwargs=True
        )
        for forward in forwards
    ]
    reference(input_ids=ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    yield from zip(forwards, runtime_of(lowered).forwards, calls, strict=True)


def _run(
    forward: TemplateForward, call: tuple[Any, Any], extra: Callable[[Template], list[Any]]
) -> tuple[torch.fx.Graph, dict[Node, Any]]:
    """The graph that serves a call, and what all of its nodes compute."""
    template, leaves = forward.find(*call)
    interpreter = Interpreter(template.graph_module, garbage_collect_values=False)
    inputs = [leaves[i] for i in template.inputs]
    interpreter.run(*forward.parameters(template), *inputs, *extra(template))
    return template.graph_module.graph, interpreter.env


def _compare(
    forward: TemplateForward, own: LoweredForward, call: tuple[Any, Any], recipe: Recipe
) -> Iterator[_Difference]:
    graph, trained = _run(forward, call, lambda template: [])
    args, kwargs, _, _ = take_out(*call)
    own.store = own.runtime.cached
    batch, length = _hidden(call).shape[:2]
    positions = torch.arange(length, device=_hidden(call).device).expand(batch, length)

    def extra(template: Template) -> list[Any]:
        return [*_stale(template, batch, length, positions.device), positions]

    lowered_graph, values = _run(own, (args, kwargs), extra)
    by_name: dict[str, list[Node]] = {}
    for node in lowered_graph.nodes:
        if node.target is kernels.PACKED_LINEAR:
            name = str(parameter_name(node.args[1])).removesuffix(PACKED)
            by_name.setdefault(name, []).append(node)
    for node in graph.nodes:
        if node.target is LINEAR and is_quantized(node.args[1]):
            name = str(parameter_name(node.args[1]))
            yield from _compare_linear(name, node, by_name[name].pop(0), trained, values)
        elif node.target is ATTENTION:
            lowered = [n for n in lowered_graph.nodes if n.target in _ATTENTIONS]
            yield from _compare_attention(node, lowered[0], trained, values, recipe)


_ATTENTIONS = (cached_attention, quantized_attention)


def _hidden(call: tuple[Any, Any]) -> Tensor:
    args, kwargs = call
    hidden: Tensor = args[0] if args else kwargs["hidden_states"]
    return hidden


def _stale(template: Template, rows: int, slots: int, device: torch.device) -> list[Tensor]:
    return [
        torch.full((rows, heads, slots, width), STALE, dtype=dtype, device=device)
        for (heads, width), dtype in cache_tensors(template)
    ]


def _raw(node: Any) -> Node:
    """What is quantized before ``node`` is read, or what is read if nothing is."""
    quantizer = quantizer_of(node)
    source: Any = node if quantizer is None else quantizer.args[0]
    assert isinstance(source, Node)
    return source


def _distance(got: Tensor, wanted: Tensor) -> float:
    """Largest difference, relative to the largest value."""
    largest = float(wanted.abs().max())
    return float((got.float() - wanted.float()).abs().max()) / max(largest, 1e-30)


def _wiring(place: str, got: Tensor, wanted: Tensor) -> _Difference:
    if got.shape != wanted.shape:
        return _Difference("wiring", place, math.inf)
    norm = float(wanted.norm())
    return _Difference("wiring", place, float((got - wanted).norm()) / max(norm, 1e-30))


def _compare_linear(
    name: str, node: Node, lowered: Node, trained: dict[Node, Any], values: dict[Node, Any]
) -> Iterator[_Difference]:
    x, wanted = trained[_raw(node.args[0])], trained[node]
    read: list[Any] = [values[a] if isinstance(a, Node) else a for a in lowered.args]
    yield _wiring(name, read[0], x)
    for phase, rows in (("prefill", slice(None)), ("decode", slice(0, 1))):
        part = x[rows] if phase == "prefill" else x[rows, :1]
        aim = wanted[rows] if phase == "prefill" else wanted[rows, :1]
        got = kernels.PACKED_LINEAR(part, *read[1:], **lowered.kwargs)
        kernel = lowered.kwargs[phase]
        yield _Difference("linear", f"{name} ({phase}: {kernel})", _distance(got, aim))


def _compare_attention(
    node: Node, lowered: Node, trained: dict[Node, Any], values: dict[Node, Any], recipe: Recipe
) -> Iterator[_Difference]:
    read: list[Any] = list(node.args[:3])
    given: list[Tensor] = [trained[read[0]], trained[_raw(read[1])], trained[_raw(read[2])]]
    query, key, value = given
    mine: list[Any] = list(lowered.args[:3])
    for title, one, other in zip(("query", "key", "value"), mine, given, strict=True):
        yield _wiring(f"{title} of attention", values[one], other)
    rounded: list[Tensor] = [trained[n] for n in read[1:]]
    scale: Any = node.kwargs.get("scale")
    length = query.shape[2]
    pad = torch.zeros(len(query), 1, 1, length, dtype=torch.bool, device=query.device)
    for row in range(len(query)):
        pad[row, ..., row:] = True  # rows begin one token after another, as left padding has it
    causal = torch.ones(length, length, dtype=torch.bool, device=query.device).tril()
    itself = torch.eye(length, dtype=torch.bool, device=query.device)
    half = max(1, length // 2)
    for title, mask, chunks in (
        ("prefill", None, [length]),
        ("chunked prefill", None, [half, length - half]),
        ("decode", None, [half] + [1] * (length - half)),
        ("decode with padding", (causal & pad) | itself, [half] + [1] * (length - half)),
    ):
        wanted = trained[node]
        if mask is not None:
            wanted = F.scaled_dot_product_attention(
                query, rounded[0], rounded[1], attn_mask=mask, scale=scale, enable_gqa=True
            )
        got, caches = _attend(lowered, (query, key, value), chunks, mask)
        if recipe.kv.quantizes and title != "prefill":
            yield _Difference(
                "codes", f"KV cache after {title}", _other_codes(caches, rounded, recipe)
            )
        yield _Difference("attention", f"attention ({title})", _distance(got, wanted))


def _attend(
    lowered: Node, tensors: tuple[Tensor, ...], chunks: list[int], mask: Tensor | None
) -> tuple[Tensor, list[Tensor]]:
    """Attention as the lowered graph computes it, over a cache full of garbage."""
    query, key, value = tensors
    rows, slots = len(query), key.shape[2] + 3
    shapes = [lowered.args[i].meta["val"] for i in range(3, len(lowered.args) - 1)]  # type: ignore[union-attr]
    caches = [
        torch.full((rows, s.shape[1], slots, s.shape[3]), STALE, dtype=s.dtype, device=key.device)
        for s in shapes
    ]
    if mask is not None:
        mask = F.pad(mask.expand(rows, 1, -1, -1), (0, slots - mask.shape[-1]), value=True)
    outs, start = [], 0
    target: Any = lowered.target
    for size in chunks:
        now = slice(start, start + size)
        positions = torch.arange(start, start + size, device=key.device).expand(rows, size)
        outs.append(
            target(
                *(tensor[:, :, now] for tensor in tensors),
                *caches,
                positions,
                None if mask is None else mask[:, :, now],
                **lowered.kwargs,
            )
        )
        start += size
    return torch.cat(outs, 2), caches


def _other_codes(caches: list[Tensor], rounded: list[Tensor], recipe: Recipe) -> float:
    """Share of codes in the cache whose value is not the one that was trained with."""
    other = count = 0
    for codes, scale, values in zip(caches[::2], caches[1::2], rounded, strict=True):
        length, width = values.shape[2:]
        held = packing.unpack(codes[:, :, :length], recipe.kv.bits, width)
        other += int((held.float() * scale[:, :, :length] != values).sum())
        count += values.numel()
    return other / count


def _kl(one: Tensor, other: Tensor) -> float:
    """Mean KL(one || other) over tokens, in nats."""
    p, q = (x.double().log_softmax(-1) for x in (one, other))
    return max(0.0, float((p.exp() * (p - q)).sum(-1).mean()))


def _score(model: Any, ids: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits


def _global(
    directory: Path, reference: Any, lowered: Any, recipe: Recipe, ids: Tensor, allowed: float
) -> list[Check]:
    lowered_logits = _score(lowered, ids)
    checks = []
    if recipe_allows_integers(recipe):
        trained = load_reference(directory).to(ids.device)  # type: ignore[arg-type]
        prepare(trained, recipe, compile=False, integer_forward=True)
        figure = _distance(lowered_logits, _score(trained, ids))
        what = "the logits of the lowered graph, relative to the largest"
        checks.append(Check("global", what, figure, LOGITS_LIMIT))
    figure = _kl(_score(reference, ids), lowered_logits)
    what = "the KL divergence of the lowered graph from the trained one in float"
    return [*checks, Check("global", what, figure, allowed)]


def _cached(lowered: Any, ids: Tensor, allowed: float) -> list[Check]:
    wanted, checks = _score(lowered, ids), []
    half = ids.shape[1] // 2
    for title, chunks in (
        ("a chunked prefill", [half, ids.shape[1] - half]),
        ("token by token", [1] * ids.shape[1]),
    ):
        cache, outs, start = None, [], 0
        for size in chunks:
            new = ids[:, start : start + size]
            out = lowered(input_ids=new, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            outs.append(out.logits)
            start += size
        figure = _kl(wanted, torch.cat(outs, 1))
        what = f"the KL divergence of {title} from one forward without a cache"
        checks.append(Check("cached", what, figure, allowed))
    return checks


_RELOAD = """
import json, sys, torch
from pathlib import Path
from qatc.parity import _score, fingerprint
from qatc.runtime import load
torch.set_num_threads(int(sys.argv[3]))
model = load(Path(sys.argv[1]), device=sys.argv[4], dtype=torch.float32, compile=False)
with torch.no_grad():
    print(fingerprint(_score(model, torch.tensor(json.loads(sys.argv[2]), device=sys.argv[4]))))
"""


def _reloaded(directory: Path, lowered: Any, ids: Tensor, device: str) -> Check:
    arguments = [str(directory), json.dumps(ids.tolist()), str(torch.get_num_threads()), device]
    done = subprocess.run(
        [sys.executable, "-c", _RELOAD, *arguments], capture_output=True, text=True, check=False
    )
    printed = done.stdout.split()
    same = bool(printed) and printed[-1] == fingerprint(_score(lowered, ids))
    what = "the bits of the logits after a reload in a new process"
    last = done.stderr.strip().splitlines()[-1:] if done.returncode else []
    return Check("cached", what, 0 if same else 1, 0, last[0] if last else None)


def fingerprint(tensor: Tensor) -> str:
    """SHA-256 of a tensor's bytes."""
    return hashlib.sha256(tensor.detach().cpu().contiguous().numpy().tobytes()).hexdigest()

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
everything behind it. Where two graphs do not see the very same numbers, it is therefore their
distributions that are compared, and the median of several texts counts: one code that fell the
other way early can move a text as far as training itself did, and a bug moves them all.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qatc import packing
from qatc.end_parity import compare_ends
from qatc.errors import ParityError
from qatc.export import load_float_state, load_reference, read_metadata, read_recipe
from qatc.export.directory import digest_of, read_stored
from qatc.local_parity import compare_layers, distance
from qatc.ops import quantize
from qatc.passes.lower_linear import PACKED, SCALE
from qatc.preparation import prepare, recipe_allows_integers, restore
from qatc.recipe import Recipe
from qatc.runtime import load, runtime_of

ROWS, LENGTH = 9, 40
LOCAL_ROWS = 3
LOCAL_LIMIT = 1e-5
LOGITS_LIMIT = 1e-4
KL_SHARE = 0.02
WIRING_LIMIT = 0.05


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
        checks += _local(reference, lowered, recipe, ids[:LOCAL_ROWS])
        checks += _ends(reference, lowered, ids[:LOCAL_ROWS])
        checks += _global(reference, lowered, recipe, ids, _allowed_kl(metadata))
        restore(reference)  # a prepared model is a cycle, which would live on
        del reference
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
    specs = {name: spec for name, (spec, _) in read_stored(directory).items()}
    for name, digest in metadata["digests"].items():
        packed = held.get(name + PACKED)
        if packed is None:
            continue
        codes = packing.unpack(packed, specs[name].bits, _width(model, name))
        same = digest_of(codes, held[name + SCALE]) == digest
        if same and trained is not None:
            wanted, scale = quantize(trained[name].detach(), specs[name], snap=True)
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
    runtime = runtime_of(model)
    for forward in (*runtime.forwards, *runtime.ends):
        shapes = {f"{forward.name}.{n}": p.shape for n, p in forward.prototype.named_parameters()}
        if name in shapes:
            return int(shapes[name][1])
    raise AssertionError(f"no layer has {name}")


@torch.no_grad()
def _write_text(model: Any, device: str) -> Tensor:
    """Rows that the model samples itself, from one token each; the same in every run."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.get_text_config().vocab_size
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


_LOCAL = {
    "linear": ("the output of a quantized linear, relative to its largest", LOCAL_LIMIT),
    "codes": ("the share of K and V codes that are not the trained ones", 0.0),
    "attention": ("the output of attention over the cache, relative to its largest", LOCAL_LIMIT),
    "wiring": ("what a node of the lowered layer reads, relative to its norm", WIRING_LIMIT),
}


def _local(reference: Any, lowered: Any, recipe: Recipe, ids: Tensor) -> list[Check]:
    found = list(compare_layers(reference, lowered, recipe, ids))
    checks = []
    for kind, (what, limit) in _LOCAL.items():
        mine = [difference for difference in found if difference.kind == kind]
        if mine:
            wrong = [d.place for d in mine if not d.figure <= limit]
            worst = max(d.figure for d in mine)
            checks.append(Check("local", what, worst, limit, wrong[0] if wrong else None))
    return checks


def _ends(reference: Any, lowered: Any, ids: Tensor) -> list[Check]:
    found = list(compare_ends(reference, lowered, ids))
    if not found:
        return []
    wrong = [place for place, figure in found if not figure <= LOCAL_LIMIT]
    worst = max(figure for _, figure in found)
    what = "the output of the quantized head or embedding, relative to its largest"
    return [Check("local", what, worst, LOCAL_LIMIT, wrong[0] if wrong else None)]


def _kl(one: Tensor, other: Tensor) -> float:
    """KL(one || other) of logits ``[B, T, V]``, in nats: mean over tokens, median over rows."""
    p, q = (x.double().log_softmax(-1) for x in (one, other))
    return max(0.0, float((p.exp() * (p - q)).sum(-1).mean(-1).median()))


def _score(model: Any, ids: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits


def _global(
    reference: Any, lowered: Any, recipe: Recipe, ids: Tensor, allowed: float
) -> list[Check]:
    """Compare logits; the reference ends up with its integer forward, where it has one."""
    lowered_logits, in_float = _score(lowered, ids), _score(reference, ids)
    checks = []
    if recipe_allows_integers(recipe):
        prepare(restore(reference), recipe, compile=False, integer_forward=True)
        figure = distance(lowered_logits, _score(reference, ids))
        what = "the logits of the lowered graph, relative to the largest"
        checks.append(Check("global", what, figure, LOGITS_LIMIT))
    figure = _kl(in_float, lowered_logits)
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
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        raise ParityError(f"{directory} cannot be loaded in a new process: {last[0]}")
    printed = done.stdout.split()
    same = bool(printed) and printed[-1] == fingerprint(_score(lowered, ids))
    what = "the bits of the logits after a reload in a new process"
    return Check("cached", what, 0 if same else 1, 0)


def fingerprint(tensor: Tensor) -> str:
    """SHA-256 of a tensor's bytes."""
    return hashlib.sha256(tensor.detach().cpu().contiguous().numpy().tobytes()).hexdigest()

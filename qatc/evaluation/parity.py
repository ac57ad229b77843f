"""The parity gate: what runs on integers is what was trained.

``verify`` loads an output twice, as the graph that was trained and as the graph that runs on
integers, and compares them on text that the model writes itself, in fp32 and uncompiled:

1. *stored*: codes, scales and float tensors are those of the trained model, bit for bit;
2. *local*: the lowered model, run without a cache, in one piece, in chunks, token by token and with
   padding, computes at every linear, every K/V site and every attention what the trained graph
   computed there, when it is given what the trained graph was given
   (:mod:`qatc.evaluation.layer_parity`);
3. *global*: left to itself it is no further from the trained graph than that is from its own forms
   which sum in another order (:mod:`qatc.evaluation.global_parity`);
4. *cached*: the same in pieces, and by the decoding program
   (:mod:`qatc.runtime.decode_program`); and it says the same bits after a reload in a new process;
5. *runtime*: so is the runtime of others that it was trained for, by the export that it loads,
   where that is installed (:mod:`qatc.export.consumers`).

The verdict rests on the first two and the reload, which hold exactly at any depth. What is compared
from end to end is mostly a measure of the model: how much its own rounding ties move it.
"""

from __future__ import annotations

import copy
import hashlib
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qatc.errors import ParityError
from qatc.evaluation.checks import Check, ParityReport
from qatc.evaluation.global_parity import Texts, exact_sums, score
from qatc.evaluation.layer_parity import LIMITS, compare_in_float, compare_on_integers
from qatc.evaluation.reference import prepare_reference
from qatc.evaluation.vocabulary_parity import compare_ends
from qatc.export.consumers import consumer_of
from qatc.graph import captures
from qatc.kernels.site import Kernels
from qatc.models.pipelines import recipe_allows_integers
from qatc.models.preparation import restore
from qatc.numerics import packing
from qatc.output import Output, QuantizedWeight, load_reference
from qatc.output.directory import digest_of
from qatc.output.reading import opened
from qatc.passes.lower_linear import PACKED, SCALE
from qatc.runtime.cuda.graphed import GraphedForward
from qatc.runtime.forward import runtime_of
from qatc.runtime.model import load

ROWS, LENGTH = 9, 40
PROGRAM_ROWS, PROGRAM_STEPS = 5, 12
KL_SHARE = 0.02


@captures.shared()
def verify(
    directory: Path | str | Output,
    *,
    trained: Mapping[str, Tensor] | None = None,
    device: str = "cpu",
    reload: bool = True,
    trust_remote_code: bool = False,
    kernels: Kernels = "auto",
) -> ParityReport:
    """Compare an output's integer model with the graph that was trained.

    Args:
        directory: of an output of ``qatc quantize``, or the output itself, opened.
        trained: the trained state dict, if it is at hand: the stored codes must be its codes.
        device: torch device.
        reload: load the output in a new process as well.
        trust_remote_code: run the code that comes with the model.
        kernels: those of the integer model, see :func:`qatc.load`.

    Returns:
        All checks, in order. Nothing is raised for one that fails; see
        :meth:`ParityReport.require`.

    Raises:
        CheckpointError: the directory is no complete output.
        ConfigError: the model has code of its own, and ``trust_remote_code`` is false.
        PassError: the recipe has no integer runtime.
    """
    output = opened(directory, trust_remote_code)
    recipe = output.recipe
    plain: Any = {"dtype": torch.float32, "compile": False, "kernels": kernels}
    lowered = load(output, device=device, **plain)
    checks = [_stored(lowered, output, trained)]
    reference = load_reference(output).to(device)  # type: ignore[arg-type]
    prepare_reference(reference, output, compile=False, integer_forward=False)
    ids = _write_text(lowered, device)
    with torch.no_grad():
        texts = Texts(ids, _least_kl(output.metadata))
        checks += compare_in_float(reference, lowered, recipe, ids)
        checks += _ends(reference, lowered, ids)
        in_float, on_integers = score(reference, ids), score(lowered, ids)
        with exact_sums(reference):
            exact = score(reference, ids)
        texts.neighbour("the trained graph from itself with exact sums", in_float, exact)
        if recipe_allows_integers(recipe):
            prepare_reference(restore(reference), output, compile=False, integer_forward=True)
            checks += compare_on_integers(reference, lowered, recipe, ids)
            trained_so = score(reference, ids)
            what = "the trained graph from itself on integers"
            texts.neighbour(what, in_float, trained_so)
            what = "the lowered graph from the trained one on integers"
            texts.judge("global", what, trained_so, on_integers)
        what = "the lowered graph from the trained one in float"
        texts.judge("global", what, in_float, on_integers)
        restore(reference)  # a prepared model is a cycle, which would live on
        del reference, exact
        _consumed(output, texts, in_float)
        del in_float
        _cached(lowered, texts, on_integers)
        _programmed(lowered, texts)
        checks += texts.checks
        if reload:
            checks.append(_reloaded(output, on_integers, ids, device, kernels))
    return ParityReport(tuple(checks))


def _least_kl(metadata: Mapping[str, Any]) -> float:
    """2 % of the KL divergence to the teacher, where it was measured."""
    figures = metadata.get("figures", {})
    # The last one is the model that was written.
    measured = [[*models.values()][-1]["kl"] for models in figures.values() if models]
    return KL_SHARE * max([float(kl) for kl in measured if kl], default=0.05)


def _stored(model: nn.Module, output: Output, trained: Mapping[str, Tensor] | None) -> Check:
    """What the loaded model holds, by the digests taken when it was written, or by the masters."""
    held = dict(model.state_dict(keep_vars=True)) | dict(model.named_buffers())
    wrong = []
    for name, digest in output.metadata["digests"].items():
        packed = held.get(name + PACKED)
        if packed is None:
            continue
        spec, width = output.weights[name].spec, output.weights[name].codes.shape[1]
        codes = packing.unpack(packed, spec.bits, width)
        same = digest_of(codes, held[name + SCALE]) == digest
        if same and trained is not None:
            wanted = QuantizedWeight.from_state(trained, name, spec)
            same = torch.equal(codes.cpu(), wanted.codes.cpu())
            same = same and torch.equal(held[name + SCALE].cpu(), wanted.scale.cpu())
        if not same:
            wrong.append(name)
    for name, value in output.state.items():
        if digest_of(value) != output.metadata["float_digests"].get(name):
            wrong.append(name)
    what = "number of stored tensors that are not the trained ones"
    return Check("stored", what, len(wrong), 0, wrong[0] if wrong else None)


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


def _ends(reference: Any, lowered: Any, ids: Tensor) -> list[Check]:
    found = list(compare_ends(reference, lowered, ids))
    if not found:
        return []
    wrong = [place for place, figure in found if not figure <= LIMITS["linear"]]
    worst = max(figure for _, figure in found)
    what = "the output of the quantized head or embedding, relative to its largest"
    return [Check("local", what, worst, LIMITS["linear"], wrong[0] if wrong else None)]


def _cached(lowered: Any, texts: Texts, wanted: Tensor) -> None:
    """Feed the texts in pieces."""
    length = texts.ids.shape[1]
    half = length // 2
    for title, chunks in (
        ("a chunked prefill", [half, length - half]),
        ("token by token", [1] * length),
    ):
        cache, outs, start = None, [], 0
        for size in chunks:
            new = texts.ids[:, start : start + size]
            out = lowered(input_ids=new, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            outs.append(out.logits)
            start += size
        what = f"{title} from one forward without a cache"
        texts.judge("cached", what, wanted, torch.cat(outs, 1))


def _programmed(lowered: Any, texts: Texts) -> None:
    """Take steps by the decoding program, where there is one, each from what the graphs held.

    On a GPU they are replayed.
    """
    decode = runtime_of(lowered).decode
    if isinstance(decode, GraphedForward):
        what = "replayed steps"
    elif decode is not None and (program := decode.program()) is not None:
        assert program.applies(), "nothing else may answer for it"
        what = "the decoding program"
    else:
        return
    half = texts.ids.shape[1] // 2
    wanted, got = [], []
    for row in texts.ids[:PROGRAM_ROWS].split(1):
        cache = lowered(input_ids=row[:, :half], use_cache=True).past_key_values
        steps = []
        for new in row[:, half : half + PROGRAM_STEPS].split(1, 1):
            own = copy.deepcopy(cache)
            graphs = lowered(input_ids=new, past_key_values=cache, use_cache=True).logits
            steps.append((graphs, decode(new, past_key_values=own, use_cache=True).logits))
        wanted.append(torch.cat([graphs for graphs, _ in steps], 1))
        got.append(torch.cat([logits for _, logits in steps], 1))
    if isinstance(decode, GraphedForward) and (decode.reason or not decode.replayed):
        why = decode.reason or "the model's own steps served all of them"
        texts.checks.append(Check("cached", f"number of {what}, not judged: {why}", 0))
        return
    texts.judge(
        "cached", f"{what} from the graphs, step by step", torch.cat(wanted), torch.cat(got)
    )


def _consumed(output: Output, texts: Texts, trained: Tensor) -> None:
    """The runtime that it was trained for, where that is installed, beside the trained graph.

    It is asked where the graph ran on a CPU, in fp32, as most of them compute it there. The graph's
    own model is gone by then, so that there are no more in memory at once.
    """
    if texts.ids.device.type != "cpu":
        return
    try:
        runtime = consumer_of(output, texts.ids.shape[1])
        if runtime is None:
            return
        try:
            found = runtime.logits(texts.ids)
        finally:
            runtime.close()
        if found.shape != trained.shape:
            raise ValueError(f"logits {list(found.shape)} in place of {list(trained.shape)}")
    except Exception as error:  # a fault of another's package is no verdict on the model
        what = f"texts compared: {output.recipe.target} could not be asked ({error})"
        texts.checks.append(Check("runtime", what, 0))
        return
    what = f"{runtime.name} from the trained graph"
    if runtime.differences:
        other = "; ".join(runtime.differences)
        texts.tell("runtime", f"{what}, with other numerics ({other})", trained, found)
    else:
        texts.judge("runtime", what, trained, found, runtime.slack)


_RELOAD = """
import json, sys, torch
from pathlib import Path
from qatc.evaluation.global_parity import score
from qatc.evaluation.parity import fingerprint
from qatc.runtime.model import load
torch.set_num_threads(int(sys.argv[3]))
options = {"device": sys.argv[4], "trust_remote_code": sys.argv[5] == "trust"}
options["kernels"] = sys.argv[6]
model = load(Path(sys.argv[1]), dtype=torch.float32, compile=False, **options)
with torch.no_grad():
    print(fingerprint(score(model, torch.tensor(json.loads(sys.argv[2]), device=sys.argv[4]))))
"""


def _reloaded(output: Output, logits: Tensor, ids: Tensor, device: str, kernels: str) -> Check:
    directory = output.place
    arguments = [str(directory), json.dumps(ids.tolist()), str(torch.get_num_threads()), device]
    arguments.append("trust" if output.trust_remote_code else "")
    arguments.append(kernels)
    done = subprocess.run(
        [sys.executable, "-c", _RELOAD, *arguments], capture_output=True, text=True, check=False
    )
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        raise ParityError(f"{directory} cannot be loaded in a new process: {last[0]}")
    printed = done.stdout.split()
    same = bool(printed) and printed[-1] == fingerprint(logits)
    what = "the bits of the logits after a reload in a new process"
    return Check("cached", what, 0 if same else 1, 0)


def fingerprint(tensor: Tensor) -> str:
    """SHA-256 of a tensor's bytes."""
    return hashlib.sha256(tensor.detach().cpu().contiguous().numpy().tobytes()).hexdigest()

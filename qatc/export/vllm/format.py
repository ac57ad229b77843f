"""vLLM: the layouts of compressed-tensors whose products it really computes, in two formats.

``vllm`` stores codes of weights behind quantized inputs a byte each, whatever their bits, for its
int8 kernels; ``vllm-marlin`` keeps them at half a byte, for Marlin, which rounds inputs when the
environment says so. :mod:`qatc.output.vllm` has what runs what, and what neither can hold.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from qatc.export.base import Format, write_with_companions
from qatc.output import Output, load_codes, vllm
from qatc.output.layouts import PACKED_BITS, Form
from qatc.progress import Observer


def write(output: Output, directory: Path, observer: Observer, form: Form) -> None:
    """Write an opened output into an empty directory."""
    write_with_companions(output, directory, form)


def notes(output: Output, form: Form) -> Sequence[str]:
    """What differs in vLLM, what it costs, and where it has been run."""
    recipe, found = output.recipe, []
    vllm.refuse_unheld(recipe, form)
    if different := vllm.differences(recipe, form):
        found.append(f"vLLM runs it with {' and '.join(different)}")
    narrow = any(weight.spec.bits <= PACKED_BITS for weight in output.weights.values())
    if form == "vllm" and recipe.activations.quantizes and narrow:
        found.append(
            f"codes of up to {PACKED_BITS} bits take a byte each, twice what they take packed:"
            " vLLM's int8 kernels read them so; --format vllm-marlin keeps them packed"
        )
    if needed := vllm.needs(recipe, form):
        found.append(needed)
    return [*found, vllm.tried(form)]


def commands(output: Output, directory: Path, form: Form) -> Sequence[str]:
    """How vLLM is started with what was written."""
    trust = " --trust-remote-code" if output.trust_remote_code else ""
    return [vllm.command(str(directory), output.recipe, form) + trust]


def _format(form: Form) -> Format:
    return Format(
        form,
        "vLLM",
        partial(write, form=form),
        load_codes,
        partial(notes, form=form),
        partial(commands, form=form),
    )


VLLM = _format("vllm")
VLLM_MARLIN = _format("vllm-marlin")

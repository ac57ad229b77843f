"""A qatc output as a model that runs on integers: packed weights, a packed KV cache.

:func:`load` builds the Hugging Face model around packed codes: its quantized linears have no float
weight any more, and its decoder layers run the graph that was trained, lowered to integer kernels.
It is a transformers model like any other: ``generate``, batches, beams, streamers and whoever else
calls transformers models work with it.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import nn

from qatc.errors import CheckpointError, ConfigError
from qatc.graph.templates import dry_run
from qatc.kernels.site import Kernels
from qatc.machine.device import pick_device
from qatc.models import find_regions
from qatc.models.building import build_model
from qatc.models.preparation import can_compile
from qatc.models.scales import is_gain, of_attention
from qatc.models.vocabulary import End, are_tied, quantized_ends
from qatc.numerics import packing
from qatc.output import Output
from qatc.output.reading import opened
from qatc.output.saving import Origin, make_saveable
from qatc.passes.lower_linear import PACKED, SCALE
from qatc.runtime.float_head import flatten_head
from qatc.runtime.forward import RUNTIME, LoweredEnd, LoweredForward, Runtime

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load(
    directory: Path | str | Output,
    *,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    compile: bool | None = None,
    trust_remote_code: bool = False,
    decode_program: bool | None = None,
    kernels: Kernels = "auto",
) -> PreTrainedModel:
    """Load an output of ``qatc quantize`` as a model that runs on integers.

    Args:
        directory: of the output, or the output itself, opened.
        device: torch device, or ``auto``.
        dtype: of everything that is not quantized; ``None`` for that in which it was trained.
        compile: compile the layers with Inductor; ``None``: if this machine can.
        trust_remote_code: run the code that comes with the model.
        decode_program: decode by one call for all layers, where the model allows it: on a CPU a
            single row by a program in C (see :mod:`qatc.runtime.decode_program`), on a GPU all rows
            by a CUDA graph (see :mod:`qatc.runtime.cuda.graphed`); ``None``: unless ``compile`` is
            False, which asks for the graphs as they are.
        kernels: what runs the quantized linears. ``auto``: the fastest exact kernel, whosever it
            is; ``torchao``: torchao's wherever it has an exact one, and no decoding program;
            ``qatc``: none of torchao's. :func:`qatc.report.usage.kernel_report`, and ``qatc inspect
            OUT --kernels``, say what runs each and why.

    Returns:
        The transformers model, in eval mode, with packed weights; its KV cache is packed whoever
        makes it: ``generate`` and ``use_cache=True`` need nothing else. Several threads may call
        it at once, each with a cache of its own. It cannot be moved, cast or pickled afterwards;
        its ``save_pretrained`` writes an output like the one that was loaded.

    Raises:
        CheckpointError: the directory is no complete output of qatc.
        ConfigError: the model has code of its own, and ``trust_remote_code`` is false.
        PassError: the recipe has no integer runtime, e.g. K and V quantized before the rotary
            embedding; or torchao's kernels were asked for, and can run no linear of a layer
            or of the head.
    """
    if kernels not in get_args(Kernels):
        valid = ", ".join(get_args(Kernels))
        raise ConfigError(f"kernels must be one of {valid}; got {kernels!r}")
    output, device = opened(directory, trust_remote_code), pick_device(device)
    recipe = output.recipe
    if dtype is None:
        dtype = getattr(torch, str(output.metadata.get("compute_dtype", "float32")))
    model = build_model(
        output.config,
        dtype,
        device="parameters on meta",
        trust_remote_code=output.trust_remote_code,
    )
    compiled = can_compile(device) if compile is None else compile
    runtime = Runtime(recipe, device, dtype, compiled, kernels)
    forwards = []
    for number, (name, region) in enumerate(find_regions(model)):
        apart = recipe.exceptions(name, dict(region.named_parameters()))
        forwards.append(LoweredForward(region, name, runtime, number, own=apart))
    ends = quantized_ends(model, recipe)
    at_ends = [LoweredEnd(end, runtime) for end in ends]
    _fill(model, output, device, ends if are_tied(ends) else [])
    if (own := copy.deepcopy(output.generation_config)) is not None:
        own.cache_implementation = None  # the cache is a packed one, whatever the model asked for
        model.generation_config = own
    for forward in (*forwards, *at_ends):
        forward.install()
    flatten_head(model)
    runtime.forwards, runtime.ends = tuple(forwards), tuple(at_ends)
    setattr(model, RUNTIME, runtime)
    make_saveable(model, Origin.of(output))
    model.eval().requires_grad_(False)
    with dry_run(runtime.stores()):
        ids = torch.zeros((2, 8), dtype=torch.long, device=device)
        for use_cache in (False, True):
            model(input_ids=ids, use_cache=use_cache)
    _offer_program(
        model, runtime, compile is not False if decode_program is None else decode_program
    )
    return model


def _offer_program(model: Any, runtime: Runtime, wanted: bool) -> None:
    from qatc.runtime.cuda.graphed import GraphedForward
    from qatc.runtime.decode_program import DecodeForward  # which knows what a runtime is

    on_gpu = torch.device(runtime.device).type == "cuda"
    runtime.decode = (GraphedForward if on_gpu else DecodeForward)(model, runtime)
    if wanted:
        model.forward = runtime.decode


def _fill(model: PreTrainedModel, output: Output, device: str, tied: Sequence[End]) -> None:
    """Give the model its packed and its float tensors, and nothing else.

    The ``tied`` ends get the codes that were stored once for both.
    """
    state, dtype = output.state, model.dtype
    for name, weight in output.weights.items():
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        del module._parameters[leaf]
        packed = packing.pack(weight.codes, weight.spec.bits).to(device)
        module.register_buffer(leaf + PACKED, packed)
        module.register_buffer(leaf + SCALE, weight.scale.to(device))
    _share_codes(model, tied)
    for name in filter(of_attention, state):
        path, _, leaf = name.rpartition(".")
        model.get_submodule(path).register_buffer(leaf, state[name])
    own = {name for name, _ in [*model.named_parameters(), *model.named_buffers()]}
    floats = {
        name: value.to(device, dtype if value.is_floating_point() and not is_gain(name) else None)
        for name, value in state.items()
        if name in own
    }
    model.load_state_dict(floats, strict=False, assign=True)
    model.tie_weights(recompute_mapping=False)
    missing = _on_meta(model)
    if not missing:
        model.to(device=torch.device(device))  # type: ignore[call-arg]
    if missing or len(floats) != len(state):
        odd = missing or sorted(state.keys() - floats.keys())
        raise CheckpointError(
            f"{output.directory} does not hold the tensors of its config: {len(odd)} are missing or"
            f" left over, among them {odd[0]}; copy or write the model again"
        )


def _share_codes(model: PreTrainedModel, tied: Sequence[End]) -> None:
    """Let tied ends hold the codes that were stored for one of them, in the same memory."""
    names = ["weight" + suffix for suffix in (PACKED, SCALE)]
    holders = [end.module for end in tied if names[0] in end.module._buffers]
    for end in tied if holders else ():
        model.all_tied_weights_keys.pop(end.weight, None)
        if end.module is holders[0]:
            continue
        end.module._parameters.pop("weight", None)
        for name in names:
            held = getattr(holders[0], name)
            end.module.register_buffer(name, held, persistent=False)


def _on_meta(model: nn.Module) -> list[str]:
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return [name for name, tensor in tensors if tensor.device.type == "meta"]

"""A qatc output as a model that runs on integers: packed weights, a packed KV cache.

:func:`load` builds the Hugging Face model around packed codes: its quantized linears have no float
weight any more, and its decoder layers run the graph that was trained, lowered to integer kernels.
It is a transformers model like any other: ``generate``, batches, beams, streamers and whoever else
calls transformers models work with it.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers.cache_utils import Cache

from qatc.errors import CaptureError, CheckpointError, ConfigError
from qatc.graph.capture import Template
from qatc.graph.nodes import matches
from qatc.graph.structure import Structure
from qatc.graph.templates import TemplateForward, TemplateStore
from qatc.kernels.cached_attention import first_slots
from qatc.machine.device import pick_device
from qatc.models import find_regions
from qatc.models.load import read_generation_config
from qatc.models.preparation import (
    can_compile,
    embedding_pipeline,
    inductor,
    recipe_allows_integers,
    training_pipeline,
)
from qatc.models.remote_code import build_model
from qatc.models.vocabulary import End, are_tied, head_recipe, quantized_ends
from qatc.numerics import packing
from qatc.output import QuantizedWeight, load_codes, load_float_state, read_metadata, read_recipe
from qatc.output.directory import read_config
from qatc.output.saving import Origin, make_saveable
from qatc.passes import GraphPass, InsertKVCache, LowerEmbedding, LowerLinear, Pipeline
from qatc.passes.lower_linear import PACKED, SCALE
from qatc.recipe.recipe import Recipe
from qatc.runtime.cache import PackedLayer, packed_layer, round_up
from qatc.runtime.float_head import flatten_head

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from qatc.runtime.decode_program import DecodeForward

_RUNTIME = "_qatc_runtime"

SIGNATURES = 64
"""Ways of calling a layer whose templates are remembered."""


def load(
    directory: Path | str,
    *,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    compile: bool | None = None,
    trust_remote_code: bool = False,
    decode_program: bool | None = None,
) -> PreTrainedModel:
    """Load an output of ``qatc quantize`` as a model that runs on integers.

    Args:
        directory: the output.
        device: torch device, or ``auto``.
        dtype: of everything that is not quantized; ``None`` for that in which it was trained.
        compile: compile the layers with Inductor; ``None``: if this machine can.
        trust_remote_code: run the code that comes with the model.
        decode_program: decode a single row by a program in C, one call for all layers, where the
            model allows it (see :mod:`qatc.runtime.decode_program`); ``None``: unless ``compile``
            is False, which asks for the graphs as they are.

    Returns:
        The transformers model, in eval mode, with packed weights; its KV cache is packed whoever
        makes it: ``generate`` and ``use_cache=True`` need nothing else. Several threads may call
        it at once, each with a cache of its own. It cannot be moved, cast or pickled afterwards;
        its ``save_pretrained`` writes an output like the one that was loaded.

    Raises:
        CheckpointError: the directory is no complete output of qatc.
        ConfigError: the model has code of its own, and ``trust_remote_code`` is false.
        PassError: the recipe has no integer runtime, e.g. K and V quantized before the rotary
            embedding.
    """
    directory, device = Path(directory), pick_device(device)
    recipe, codes = read_recipe(directory), load_codes(directory)
    if dtype is None:
        named = str(read_metadata(directory).get("compute_dtype", "float32"))
        dtype = getattr(torch, named)
    model = _build(directory, dtype, trust_remote_code)
    runtime = Runtime(recipe, device, dtype, can_compile() if compile is None else compile)
    forwards = []
    for number, (name, region) in enumerate(find_regions(model)):
        prefix = f"{name}." if name else ""
        skip = tuple(n for n, _ in region.named_parameters() if recipe.skips(prefix + n))
        forwards.append(LoweredForward(region, name, runtime, skip, number))
    ends = quantized_ends(model, recipe)
    at_ends = [LoweredEnd(end, runtime) for end in ends]
    stored = _fill(model, directory, codes, device, ends if are_tied(ends) else [])
    if (own := read_generation_config(directory)) is not None:
        own.cache_implementation = None  # the cache is a packed one, whatever the model asked for
        model.generation_config = own
    for forward in (*forwards, *at_ends):
        forward.install()
    flatten_head(model)
    runtime.forwards, runtime.ends = tuple(forwards), tuple(at_ends)
    setattr(model, _RUNTIME, runtime)
    packed = {name: (weight.spec, weight.codes.shape[1]) for name, weight in codes.items()}
    metadata = read_metadata(directory)
    origin = Origin(directory, metadata, recipe, packed, stored, trust_remote_code)
    make_saveable(model, origin)
    model.eval().requires_grad_(False)
    with runtime.dry_run():
        ids = torch.zeros((2, 8), dtype=torch.long, device=device)
        for use_cache in (False, True):
            model(input_ids=ids, use_cache=use_cache)
    _offer_program(
        model, runtime, compile is not False if decode_program is None else decode_program
    )
    return model


def _offer_program(model: Any, runtime: Runtime, wanted: bool) -> None:
    from qatc.runtime.decode_program import DecodeForward  # which knows what a runtime is

    runtime.decode = DecodeForward(model, runtime)
    if wanted:
        model.forward = runtime.decode


def _build(directory: Path, dtype: torch.dtype, trust_remote_code: bool) -> PreTrainedModel:
    """The model of a directory's config, with its parameters on the meta device."""
    config = read_config(directory, trust_remote_code=trust_remote_code)
    with _parameters_on_meta():
        return build_model(
            config, dtype, trust_remote_code=trust_remote_code, attn_implementation="sdpa"
        )


_BUILDING = threading.local()
"""Whether this thread builds a model whose parameters get no storage."""


def _move_to_meta(
    module: nn.Module, name: str, parameter: nn.Parameter | None
) -> nn.Parameter | None:
    building = getattr(_BUILDING, "on_meta", False)
    if not building or parameter is None or parameter.device.type == "meta":
        return None  # which leaves the parameter as it is, tied ones one and the same
    return nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)


register_module_parameter_registration_hook(_move_to_meta)  # type: ignore[arg-type]
# Never removed: torch knows hooks for all threads only, and to change them would disturb others.


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Modules that this thread builds get parameters without storage.

    Buffers, which the config decides, are real, and other threads build theirs as ever.
    """
    _BUILDING.on_meta = True
    try:
        yield
    finally:
        _BUILDING.on_meta = False


def _fill(
    model: PreTrainedModel,
    directory: Path,
    codes: dict[str, QuantizedWeight],
    device: str,
    tied: Sequence[End],
) -> dict[str, torch.dtype]:
    """Give the model its packed and its float tensors, and nothing else.

    The ``tied`` ends get the codes that were stored once for both.

    Returns:
        The dtypes of the float tensors as they were stored.
    """
    state, dtype = load_float_state(directory), model.dtype
    for name, weight in codes.items():
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        del module._parameters[leaf]
        packed = packing.pack(weight.codes, weight.spec.bits).to(device)
        module.register_buffer(leaf + PACKED, packed)
        module.register_buffer(leaf + SCALE, weight.scale.to(device))
    _share_codes(model, tied)
    own = {name for name, _ in [*model.named_parameters(), *model.named_buffers()]}
    floats = {
        name: value.to(device, dtype if value.is_floating_point() else None)
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
            f"{directory} does not hold the tensors of its config: {len(odd)} are missing or left"
            f" over, among them {odd[0]}; copy or write the model again"
        )
    return {name: value.dtype for name, value in state.items()}


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


class Runtime:
    """The graphs of a loaded model: one store for each way in which layers are called."""

    def __init__(self, recipe: Recipe, device: str, dtype: torch.dtype, compile: bool) -> None:
        self.recipe, self.device, self.dtype, self.compile = recipe, device, dtype, compile
        self.forwards: tuple[LoweredForward, ...] = ()
        self.decode: DecodeForward | None = None
        self.ends: tuple[LoweredEnd, ...] = ()
        self.scoring = self._store(None)
        self.cached = self._store(InsertKVCache(recipe.kv))
        self.masked = self._store(InsertKVCache(recipe.kv, masked=True))
        self.head = self._end_store(lowered_head_pipeline)
        self.embedding = self._end_store(lowered_embedding_pipeline)

    def stores(self) -> tuple[TemplateStore, ...]:
        return self.scoring, self.cached, self.masked, self.head, self.embedding

    def _end_store(self, pipeline: Callable[[Recipe, str], Pipeline]) -> TemplateStore:
        def transform(gm: torch.fx.GraphModule, owner: TemplateForward) -> None:
            pipeline(self.recipe, self.device)(gm)

        return TemplateStore(transform, compile=inductor if self.compile else None)

    def _store(self, cache: InsertKVCache | None) -> TemplateStore:
        def transform(gm: torch.fx.GraphModule, owner: TemplateForward) -> None:
            lowering_pipeline(self.recipe, owner.skip, self.device, cache, _linears(owner))(gm)

        return TemplateStore(transform, compile=inductor if self.compile else None)

    @contextmanager
    def dry_run(self) -> Iterator[None]:
        """Capture what is called, compute and compile nothing."""
        compilers = [store.compile for store in self.stores()]
        for store in self.stores():
            store.compile, store.dry_run = None, True
        try:
            yield
        finally:
            for store, compiler in zip(self.stores(), compilers, strict=True):
                store.compile, store.dry_run = compiler, False
                for template in store:
                    if compiler is not None:
                        template.call = compiler(template.graph_module)

    def __deepcopy__(self, memo: dict[int, Any]) -> Runtime:
        return self


def lowering_pipeline(
    recipe: Recipe,
    skip: tuple[str, ...] = (),
    device: str = "cpu",
    cache: InsertKVCache | None = None,
    linears: bool = True,
) -> Pipeline:
    """The passes that turn a captured layer into one on integer kernels.

    They are those of the training graph and then, on the very same nodes, the lowering.

    Args:
        recipe: what the model was trained with.
        skip: patterns of parameter names, relative to the layer, that stay in full precision.
        device: type of the device.
        cache: the pass that puts a KV cache under attention; ``None`` to score without one.
        linears: whether the layer has linears that are not skipped.
    """
    integers = recipe_allows_integers(recipe)
    passes: list[Any] = list(training_pipeline(recipe, skip, linears, integers).passes)
    lowering: list[GraphPass] = []
    if linears and recipe.weights.quantizes:
        lowering.append(LowerLinear(torch.device(device).type))
    if cache is not None:
        lowering.append(cache)
    return Pipeline((*passes, *lowering))


def lowered_head_pipeline(recipe: Recipe, device: str = "cpu") -> Pipeline:
    """The passes that put the output head on integer kernels."""
    return lowering_pipeline(head_recipe(recipe), device=device)


def lowered_embedding_pipeline(recipe: Recipe, device: str = "cpu") -> Pipeline:
    """The passes that let the token embedding read packed codes."""
    return Pipeline((*embedding_pipeline(recipe).passes, LowerEmbedding()))


def _linears(owner: TemplateForward) -> bool:
    assert isinstance(owner, LoweredForward)
    weights = [n for n, p in owner.prototype.named_parameters() if p.dim() == 2]
    return any(not matches(name, owner.skip) for name in weights)


class LoweredForward(TemplateForward):
    """The forward of a decoder layer whose weights are packed.

    What is captured is a prototype: the layer as its config makes it, whose memory is reserved
    for as long as the capture takes, and never read.
    """

    def __init__(
        self,
        module: nn.Module,
        name: str,
        runtime: Runtime,
        skip: tuple[str, ...],
        number: int,
        store: TemplateStore | None = None,
    ) -> None:
        super().__init__(module, name, store or runtime.scoring, skip)
        self.runtime, self.number = runtime, number
        self.prototype = copy.deepcopy(module).eval()
        self._own_structure = super().structure()
        self._found: dict[Any, list[Template]] = {}
        self._owners: dict[int, list[tuple[nn.Module, str]]] = {}

    def structure(self) -> Structure:
        return self._own_structure

    def find(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], store: TemplateStore
    ) -> tuple[Template, list[Any]]:
        """As every other forward does, but what was found once is not looked for again.

        What decides a template besides the arguments never changes here.
        """
        signature, leaves = _signature(args, kwargs)
        if signature is None:
            return super().find(args, kwargs, store)
        if len(self._found) > SIGNATURES:  # an argument that the layer does not read may change
            self._found.clear()
        known = self._found.setdefault((id(store), signature), [])
        for template in known:
            if template.fits(leaves):
                return template, leaves
        template, leaves = super().find(args, kwargs, store)
        known.append(template)
        return template, leaves

    def owners(self, template: Template) -> list[tuple[nn.Module, str]]:
        """Looked up once: what holds packed codes stays in its place."""
        if id(template) not in self._owners:
            self._owners[id(template)] = super().owners(template)
        return self._owners[id(template)]

    def __deepcopy__(self, memo: dict[int, Any]) -> LoweredForward:
        copied = super().__deepcopy__(memo)
        assert isinstance(copied, LoweredForward)
        copied._owners = {}
        return copied

    def __reduce__(self) -> NoReturn:
        raise ConfigError(
            "a model that runs on integers cannot be pickled, as its compiled graphs belong to this"
            " process; write it with model.save_pretrained(DIRECTORY) and qatc.load that"
        )

    def twin(self) -> nn.Module:
        twin = copy.deepcopy(self.prototype)
        for child in twin.modules():
            for key, parameter in child._parameters.items():
                if parameter is not None:
                    empty = torch.empty_like(parameter, device=self.runtime.device)
                    child._parameters[key] = nn.Parameter(empty, requires_grad=False)
            for key, buffer in child._buffers.items():
                if buffer is not None:
                    child._buffers[key] = buffer.to(self.runtime.device)
        return twin

    def call(self, *args: Any, **kwargs: Any) -> Any:
        self.check_call(kwargs)
        args, kwargs, cache, mask = take_out(args, kwargs)
        hidden: Tensor = args[0] if args else kwargs["hidden_states"]
        self._refuse_moved(hidden)
        if hidden.shape[1] == 0:
            raise ConfigError("the model was called with no tokens; give it at least one")
        if cache is None:
            kwargs = kwargs if mask is None else kwargs | {"attention_mask": mask}
            return self.serve(self.runtime.scoring, args, kwargs)
        layer, store = packed_layer(cache, self.number), self.runtime.cached
        if mask is not None:
            store = self.runtime.masked
            if mask.dtype is not torch.bool:
                raise CaptureError(
                    f"{self.name} was called with a mask of {mask.dtype}; a KV cache takes a bool"
                    " mask, as attn_implementation='sdpa' gives"
                )

        def extra_inputs(template: Template) -> list[Tensor]:
            return _cache_inputs(template, layer, hidden, mask)

        result = self.serve(store, args, kwargs, extra_inputs)
        layer.advance(hidden.shape[1])
        return result

    def _refuse_moved(self, hidden: Tensor) -> None:
        """Say what is wrong where ``model.to(...)`` or an input has changed dtype or device."""
        dtype, device = self.runtime.dtype, self.runtime.device
        if hidden.dtype is not dtype or hidden.device.type != torch.device(device).type:
            raise ConfigError(
                f"{self.name} got {hidden.dtype} on {hidden.device}, and the model was loaded for"
                f" {dtype} on {device}; a model that runs on integers cannot be moved or cast:"
                " load it with qatc.load(OUT, device=..., dtype=...)"
            )


class LoweredEnd(LoweredForward):
    """The forward of an output head or a token embedding whose weight is packed.

    Its module holds the buffers ``weight_packed`` and ``weight_scale`` in place of ``weight``;
    where both ends are one weight, the very same tensors.
    """

    def __init__(self, end: End, runtime: Runtime) -> None:
        store: TemplateStore = getattr(runtime, end.role)
        super().__init__(end.module, end.name, runtime, (), 0, store)
        self.end = end

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.serve(self.store, args, kwargs)


def _cache_inputs(
    template: Template, layer: PackedLayer, hidden: Tensor, mask: Tensor | None
) -> list[Tensor]:
    """What a graph with a KV cache reads besides its arguments: the cache, positions, the mask."""
    batch, new = hidden.shape[:2]
    start, device = layer.length, hidden.device
    slots = round_up(start + new)
    layer.reserve(template, batch, slots, device)
    views = first_slots(layer.tensors, slots)
    positions = torch.arange(start, start + new, device=device).expand(batch, new).contiguous()
    torch._dynamo.maybe_mark_dynamic(positions, (0, 1))
    if mask is None:
        return [*views, positions]
    padded = nn.functional.pad(mask, (0, slots - mask.shape[-1])).expand(batch, 1, new, -1)
    padded = padded.contiguous()
    torch._dynamo.maybe_mark_dynamic(padded, (0, 2, 3))
    return [*views, positions, padded]


def _signature(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...] | None, list[Any]]:
    """What decides the template of a call, besides sizes, and the call's leaves in pytree order.

    Cheaper than a pytree; None for arguments that only a pytree can take apart.
    """
    names = sorted(kwargs)
    key: list[Any] = [len(args), *names]
    leaves: list[Any] = []
    for value in (*args, *(kwargs[name] for name in names)):
        nested = type(value) is tuple
        if nested:
            key.append(len(value))
        for leaf in value if nested else (value,):
            leaves.append(leaf)
            if isinstance(leaf, Tensor):
                key.append((leaf.dim(), leaf.dtype))
            elif leaf is None or isinstance(leaf, (bool, int, float, str)):
                key.append((type(leaf), leaf))
            else:
                return None, leaves
    return tuple(key), leaves


def take_out(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any], Cache | None, Tensor | None]:
    """The arguments without a cache and without the mask, which are handed over apart."""
    caches = [value for value in (*args, *kwargs.values()) if isinstance(value, Cache)]
    mask = kwargs.get("attention_mask")
    plain: dict[str, Any] = {k: None if isinstance(v, Cache) else v for k, v in kwargs.items()}
    if "use_cache" in plain:
        plain["use_cache"] = False
    if "attention_mask" in plain:
        plain["attention_mask"] = None
    positional = tuple(None if isinstance(value, Cache) else value for value in args)
    return positional, plain, caches[0] if caches else None, mask


def runtime_of(model: nn.Module) -> Runtime:
    """What :func:`load` put on a model."""
    runtime = getattr(model, _RUNTIME, None)
    if runtime is None:
        raise ConfigError("the model does not run on integers; load one with qatc.load")
    assert isinstance(runtime, Runtime)
    return runtime

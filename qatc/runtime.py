"""A qatc output as a model that runs on integers: packed weights, a packed KV cache.

:func:`load` builds the Hugging Face model around packed codes: its quantized linears have no float
weight any more, and its decoder layers run the graph that was trained, lowered to integer kernels.
It is a transformers model like any other: ``generate``, batches, beams, streamers and whoever else
calls transformers models work with it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer

from qatc import kernels, packing
from qatc.capture import Template
from qatc.device import pick_device
from qatc.errors import CaptureError, CheckpointError, ConfigError
from qatc.export import QuantizedWeight, load_codes, load_float_state, read_metadata, read_recipe
from qatc.export.directory import read_config
from qatc.graph import matches
from qatc.kv_cache import cache_shapes, cached_attention, quantized_attention
from qatc.models import find_regions
from qatc.passes import GraphPass, InsertKVCache, LowerLinear, Pipeline
from qatc.passes.lower_linear import PACKED, SCALE
from qatc.preparation import can_compile, inductor, recipe_allows_integers, training_pipeline
from qatc.recipe import Recipe
from qatc.spec import QuantSpec
from qatc.templates import TemplateForward, TemplateStore

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WINDOW = 64
"""Attention reads the slots in use, rounded up to this many."""

_RUNTIME = "_qatc_runtime"


@dataclass(frozen=True)
class Memory:
    """What a loaded model holds, in bytes.

    Attributes:
        quantized: packed codes and scales of quantized linears.
        other: embeddings, norms and everything else.
        cache_per_token: of the KV cache of all layers, for one token of one sequence.
        bf16_quantized: what the quantized linears would take in bf16.
        bf16_cache_per_token: what the cache would take in bf16.
    """

    quantized: int
    other: int
    cache_per_token: int
    bf16_quantized: int
    bf16_cache_per_token: int


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


def load(
    directory: Path | str,
    *,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    compile: bool | None = None,
) -> PreTrainedModel:
    """Load an output of ``qatc quantize`` as a model that runs on integers.

    Args:
        directory: the output.
        device: torch device, or ``auto``.
        dtype: of everything that is not quantized; ``None`` for that in which it was trained.
        compile: compile the layers with Inductor; ``None``: if this machine can.

    Returns:
        The transformers model, in eval mode, with packed weights; its KV cache is packed whoever
        makes it: ``generate`` and ``use_cache=True`` need nothing else.

    Raises:
        CheckpointError: the directory is no complete output of qatc.
        PassError: the recipe has no integer runtime, e.g. K and V quantized before the rotary
            embedding.
    """
    directory, device = Path(directory), pick_device(device)
    recipe, codes = read_recipe(directory), load_codes(directory)
    if dtype is None:
        named = str(read_metadata(directory).get("compute_dtype", "float32"))
        dtype = getattr(torch, named)
    model = _build(directory, dtype)
    runtime = _Runtime(recipe, device, can_compile() if compile is None else compile)
    forwards = []
    for number, (name, region) in enumerate(find_regions(model)):
        prefix = f"{name}." if name else ""
        skip = tuple(n for n, _ in region.named_parameters() if recipe.skips(prefix + n))
        forwards.append(LoweredForward(region, name, runtime, skip, number))
    _fill(model, directory, codes, device)
    for forward in forwards:
        forward.install()
    runtime.forwards = tuple(forwards)
    setattr(model, _RUNTIME, runtime)
    model.eval().requires_grad_(False)
    with runtime.dry_run():
        ids = torch.zeros((2, 8), dtype=torch.long, device=device)
        for use_cache in (False, True):
            model(input_ids=ids, use_cache=use_cache)
    return model


def _build(directory: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The model of a directory's config, with its parameters on the meta device."""
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(read_config(directory))
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with _parameters_on_meta():
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation="sdpa"
        )
    return model


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """New modules get parameters without storage; buffers, which the config decides, are real."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and parameter.device.type != "meta":
            parameter = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def _fill(
    model: PreTrainedModel, directory: Path, codes: dict[str, QuantizedWeight], device: str
) -> None:
    """Give the model its packed and its float tensors, and nothing else."""
    state, dtype = load_float_state(directory), model.dtype
    for name, weight in codes.items():
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        del module._parameters[leaf]
        packed = packing.pack(weight.codes, weight.spec.bits).to(device)
        module.register_buffer(leaf + PACKED, packed, persistent=False)
        module.register_buffer(leaf + SCALE, weight.scale.to(device), persistent=False)
    own = {name for name, _ in [*model.named_parameters(), *model.named_buffers()]}
    floats = {
        name: value.to(device, dtype if value.is_floating_point() else None)
        for name, value in state.items()
        if name in own
    }
    model.load_state_dict(floats, strict=False, assign=True)
    model.tie_weights()
    missing = _on_meta(model)
    if not missing:
        model.to(device=torch.device(device))  # type: ignore[call-arg]
    if missing or len(floats) != len(state):
        odd = missing or sorted(state.keys() - floats.keys())
        raise CheckpointError(
            f"{directory} does not hold the tensors of its config: {len(odd)} are missing or left"
            f" over, among them {odd[0]}; copy or write the model again"
        )


def _on_meta(model: nn.Module) -> list[str]:
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return [name for name, tensor in tensors if tensor.device.type == "meta"]


class _Runtime:
    """The graphs of a loaded model: one store for each way in which layers are called."""

    def __init__(self, recipe: Recipe, device: str, compile: bool) -> None:
        self.recipe, self.device, self.compile = recipe, device, compile
        self.forwards: tuple[LoweredForward, ...] = ()
        self.scoring = self._store(None)
        self.cached = self._store(InsertKVCache(recipe.kv))
        self.masked = self._store(InsertKVCache(recipe.kv, masked=True))

    def stores(self) -> tuple[TemplateStore, ...]:
        return self.scoring, self.cached, self.masked

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

    def __deepcopy__(self, memo: dict[int, Any]) -> _Runtime:
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
        self, module: nn.Module, name: str, runtime: _Runtime, skip: tuple[str, ...], number: int
    ) -> None:
        super().__init__(module, name, runtime.scoring, skip)
        self.runtime, self.number = runtime, number
        self.prototype = copy.deepcopy(module).eval()
        self._structure = super().structure()
        self._layer: PackedLayer | None = None
        self._positions = self._mask = torch.empty(0)
        self._found: dict[Any, list[Template]] = {}

    def structure(self) -> Any:
        return self._structure

    def find(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Template, list[Any]]:
        """As every other forward does, but what was found once is not looked for again.

        What decides a template besides the arguments never changes here.
        """
        signature, leaves = _signature(args, kwargs)
        if signature is None:
            return super().find(args, kwargs)
        known = self._found.setdefault((id(self.store), signature), [])
        for template in known:
            if template.fits(leaves):
                return template, leaves
        template, leaves = super().find(args, kwargs)
        known.append(template)
        return template, leaves

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

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        args, kwargs, cache, mask = take_out(args, kwargs)
        if cache is None:
            kwargs = kwargs if mask is None else kwargs | {"attention_mask": mask}
            self.store, self._layer = self.runtime.scoring, None
            return self._run(*args, **kwargs)
        hidden: Tensor = args[0] if args else kwargs["hidden_states"]
        batch, new = hidden.shape[:2]
        layer = packed_layer(cache, self.number)
        start = layer.length
        self._layer = layer
        self._positions = torch.arange(start, start + new, device=hidden.device)
        self._positions = self._positions.expand(batch, new)
        self.store = self.runtime.cached
        self._window = _round_up(start + new)
        if mask is not None:
            self.store = self.runtime.masked
            if mask.dtype is not torch.bool:
                raise CaptureError(
                    f"{self.name} was called with a mask of {mask.dtype}; a KV cache takes a bool"
                    " mask, as attn_implementation='sdpa' gives"
                )
            missing = self._window - mask.shape[-1]
            self._mask = nn.functional.pad(mask, (0, missing)).expand(batch, 1, new, -1)
        result = self._run(*args, **kwargs)
        layer.length = start + new
        return result

    def extra_inputs(self, template: Template) -> list[Tensor]:
        layer = self._layer
        if layer is None:
            return []
        batch = self._positions.shape[0]
        layer.reserve(template, batch, self._window, self._positions.device)
        views = [tensor[:, :, : self._window] for tensor in layer.tensors]
        inputs = [*views, self._positions.contiguous()]
        if self.store is self.runtime.masked:
            inputs.append(self._mask.contiguous())
            torch._dynamo.maybe_mark_dynamic(inputs[-1], (0, 2, 3))
        for view in views:
            torch._dynamo.maybe_mark_dynamic(view, (0, 2))
        torch._dynamo.maybe_mark_dynamic(inputs[len(views)], (0, 1))
        return inputs


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


def _round_up(slots: int) -> int:
    return (slots + WINDOW - 1) // WINDOW * WINDOW


_FOREIGN = "a packed KV cache is written by the layers of a model of qatc.load only"


class PackedLayer(CacheLayerMixin):
    """The KV cache of one layer: codes and scales, or floats where K and V are not quantized.

    Attributes:
        length: tokens held.
        tensors: what the layer's graph reads and writes, ``[B, Hkv, S, ...]`` each.
    """

    is_compileable = False
    is_croppable = True
    is_sliding = False

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)  # type: ignore[no-untyped-call]
        self.length = 0
        self.tensors: list[Tensor] = []

    def reserve(self, template: Template, batch: int, slots: int, device: torch.device) -> None:
        """Make room for ``slots`` slots; what is held is kept.

        One slot more than is ever read is allocated, so that what is read is never contiguous:
        Inductor would compile a second graph for that.
        """
        held = self.tensors[0].shape[2] - 1 if self.tensors else 0
        if held >= slots:
            return
        capacity = max(slots, 2 * held)
        grown = []
        for number, (shape, dtype) in enumerate(cache_tensors(template)):
            heads, width = shape
            tensor = torch.zeros((batch, heads, capacity + 1, width), dtype=dtype, device=device)
            if held:
                tensor[:, :, :held] = self.tensors[number][:, :, :held]
            grown.append(tensor)
        self.tensors, self.is_initialized = grown, True

    @property
    def nbytes(self) -> int:
        """Bytes that the tokens held take."""
        return sum(t[:, :, : self.length].numel() * t.element_size() for t in self.tensors)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise CaptureError(
            "a packed KV cache is written by the layers of a model of qatc.load only"
        )

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        raise CaptureError(
            "a packed KV cache is written by the layers of a model of qatc.load only"
        )

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1

    def offload(self) -> None:
        raise CaptureError("a packed KV cache cannot be offloaded; leave offloading out")

    def reset(self) -> None:
        self.length = 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows of the batch, in this order."""
        self.tensors = [
            tensor.index_select(0, indices.to(tensor.device)) for tensor in self.tensors
        ]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row of the batch."""
        self.tensors = [tensor.repeat_interleave(repeats, dim=0) for tensor in self.tensors]

    def crop(self, tokens_to_remove: int) -> None:
        """Forget this many tokens, given as a negative number."""
        if tokens_to_remove > 0:
            raise ValueError("crop takes the number of tokens to remove as a negative number")
        self.length = max(0, self.length + tokens_to_remove)


def packed_layer(cache: Cache, number: int) -> PackedLayer:
    """The layer of a cache, which is made a packed one while it is empty.

    Whatever cache transformers made for a call, an empty dynamic one or one of ours, ends up with
    packed layers.

    Raises:
        CaptureError: the cache is of a kind that cannot be packed, or has float tokens already.
    """
    layers: list[Any] = cache.layers
    while len(layers) <= number:
        layers.append(DynamicLayer())
    layer = layers[number]
    if isinstance(layer, PackedLayer):
        return layer
    if not isinstance(layer, DynamicLayer) or layer.is_initialized:
        raise CaptureError(
            f"a {type(cache).__name__} with {type(layer).__name__} cannot hold packed K and V;"
            " leave cache_implementation out, or pass an empty DynamicCache"
        )
    layers[number] = PackedLayer()
    packed: PackedLayer = layers[number]
    return packed


def cache_tensors(template: Template) -> list[tuple[tuple[int, int], torch.dtype]]:
    """Heads, last dimension and dtype of the cache tensors that a graph takes."""
    node = next(
        n
        for n in template.graph_module.graph.nodes
        if n.target in (cached_attention, quantized_attention)
    )
    found = []
    for source in node.args[1:3]:
        value = source.meta["val"]
        heads, width = int(value.shape[1]), int(value.shape[3])
        if node.target is cached_attention:
            found.append(((heads, width), value.dtype))
            continue
        spec = QuantSpec(node.kwargs["bits"], None, node.kwargs["range"])
        shapes = cache_shapes(spec, width)
        found += [((heads, last), dtype) for last, dtype in shapes]
    return found


def runtime_of(model: nn.Module) -> _Runtime:
    """What :func:`load` put on a model."""
    runtime = getattr(model, _RUNTIME, None)
    if runtime is None:
        raise ConfigError("the model does not run on integers; load one with qatc.load")
    assert isinstance(runtime, _Runtime)
    return runtime


def memory(model: nn.Module) -> Memory:
    """Measure what a loaded model holds."""
    runtime = runtime_of(model)
    quantized = plain = other = 0
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
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
        node = next(
            n
            for n in template.graph_module.graph.nodes
            if n.target in (cached_attention, quantized_attention)
        )
        values = [source.meta["val"] for source in node.args[1:3]]
        cache_plain += sum(2 * int(v.shape[1]) * int(v.shape[3]) for v in values)
    return Memory(quantized, other, cache, plain, cache_plain)


def kernel_report(model: nn.Module) -> list[KernelUse]:
    """What runs every linear of every layer kind, and why nothing faster does."""
    runtime = runtime_of(model)
    seen: dict[int, tuple[str, Template]] = {}
    for forward in runtime.forwards:
        for template in runtime.cached.of(forward):
            seen.setdefault(id(template), (type(forward.prototype).__name__, template))
    found = []
    for layer, template in seen.values():
        for node in template.graph_module.graph.nodes:
            if node.target is kernels.PACKED_LINEAR:
                found += _uses(layer, node, runtime)
    return found


def _uses(layer: str, node: torch.fx.Node, runtime: _Runtime) -> list[KernelUse]:
    packed: Any = node.args[1]
    inputs: Any = node.args[4]
    site = kernels.Site(
        runtime.recipe.weights,
        runtime.recipe.activations,
        int(packed.meta["val"].shape[0]),
        int(inputs),
        torch.device(runtime.device).type,
    )
    name = packed.meta["parameter"].removesuffix(PACKED)
    uses = []
    for phase in kernels.PHASES:
        choice = kernels.choose(site, phase)
        shape = (site.outputs, site.inputs)
        uses.append(KernelUse(layer, name, shape, phase, choice.kernel.name, choice.passed_over))
    return uses

"""The forward of a model on integers: its layers' graphs, lowered, with a packed cache or without.

A decoder layer, a quantized head and a quantized embedding call a graph of their kind in the place
of their own Python code. Which graphs there are is kept in the model's :class:`Runtime`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from qatc.errors import CaptureError, ConfigError
from qatc.graph.capture import Template
from qatc.graph.structure import Structure
from qatc.graph.template_forward import TemplateForward
from qatc.graph.templates import TemplateStore, same_for_all
from qatc.kernels.cached_attention import first_slots
from qatc.kernels.site import Kernels
from qatc.models.pipelines import embedding_pipeline, recipe_allows_integers, training_pipeline
from qatc.models.preparation import inductor
from qatc.models.vocabulary import End, head_recipe
from qatc.passes import (
    GraphPass,
    InsertKVCache,
    LowerEmbedding,
    LowerLinear,
    LowerToTorchao,
    Pipeline,
)
from qatc.recipe.exceptions import NONE, Exceptions
from qatc.recipe.patterns import matches
from qatc.recipe.recipe import Recipe
from qatc.runtime.cache import PackedLayer, packed_layer
from qatc.runtime.cuda.compiled import compile_for_gpu

if TYPE_CHECKING:
    from qatc.runtime.decode_program import DecodeForward

RUNTIME = "_qatc_runtime"

SIGNATURES = 64
"""Ways of calling a layer whose templates are remembered."""


class Runtime:
    """The graphs of a loaded model: one store for each way in which layers are called."""

    def __init__(
        self,
        recipe: Recipe,
        device: str,
        dtype: torch.dtype,
        compile: bool,
        kernels: Kernels = "auto",
    ) -> None:
        self.recipe, self.device, self.dtype, self.compile = recipe, device, dtype, compile
        self.kernels = kernels
        self.forwards: tuple[LoweredForward, ...] = ()
        self.decode: DecodeForward | None = None
        self.ends: tuple[LoweredEnd, ...] = ()
        self.scoring = self._store(None)
        self.cached = self._store(InsertKVCache(recipe.kv, False, recipe.values))
        self.masked = self._store(InsertKVCache(recipe.kv, True, recipe.values))
        self.head = self._end_store(
            lowering_pipeline(head_recipe(recipe), device=device, kernels=kernels)
        )
        self.embedding = self._end_store(lowered_embedding_pipeline(recipe))

    def stores(self) -> tuple[TemplateStore, ...]:
        return self.scoring, self.cached, self.masked, self.head, self.embedding

    def _end_store(self, pipeline: Pipeline) -> TemplateStore:
        return TemplateStore(same_for_all(pipeline), compile=self._compiler())

    def _store(self, cache: InsertKVCache | None) -> TemplateStore:
        def transform(gm: torch.fx.GraphModule, owner: TemplateForward) -> None:
            lowering_pipeline(
                self.recipe, owner.own, self.device, cache, _linears(owner), self.kernels
            )(gm)

        return TemplateStore(transform, compile=self._compiler())

    def _compiler(self) -> Callable[[torch.fx.GraphModule], Callable[..., Any]] | None:
        on_gpu = torch.device(self.device).type == "cuda"
        return (compile_for_gpu if on_gpu else inductor) if self.compile else None

    def __deepcopy__(self, memo: dict[int, Any]) -> Runtime:
        return self


def lowering_pipeline(
    recipe: Recipe,
    own: Exceptions = NONE,
    device: str = "cpu",
    cache: InsertKVCache | None = None,
    linears: bool = True,
    kernels: Kernels = "auto",
) -> Pipeline:
    """The passes that turn a captured layer into one on integer kernels.

    They are those of the training graph and then, on the very same nodes, the lowering.

    Args:
        recipe: what the model was trained with.
        own: what the recipe says of single parameters of the layer.
        device: type of the device.
        cache: the pass that puts a KV cache under attention; ``None`` to score without one.
        linears: whether the layer has linears that are not skipped.
        kernels: which are preferred, see :func:`qatc.kernels.table.choose`.
    """
    integers = recipe_allows_integers(recipe)
    passes: list[Any] = list(training_pipeline(recipe, own, linears, integers).passes)
    lowering: list[GraphPass] = []
    if linears and recipe.weights.quantizes:
        lower = LowerToTorchao if kernels == "torchao" else LowerLinear
        lowering.append(lower(torch.device(device).type, kernels))
    if cache is not None:
        lowering.append(cache)
    return Pipeline((*passes, *lowering))


def lowered_embedding_pipeline(recipe: Recipe) -> Pipeline:
    """The passes that let the token embedding read packed codes."""
    return Pipeline((*embedding_pipeline(recipe).passes, LowerEmbedding()))


def _linears(owner: TemplateForward) -> bool:
    assert isinstance(owner, LoweredForward)
    weights = [n for n, p in owner.prototype.named_parameters() if p.dim() == 2]
    return any(not matches(name, owner.own.skip) for name in weights)


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
        number: int,
        store: TemplateStore | None = None,
        own: Exceptions = NONE,
    ) -> None:
        super().__init__(module, name, store or runtime.scoring, own)
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
        if layer.sees_all:
            mask = None
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
        super().__init__(end.module, end.name, runtime, 0, store)
        self.end = end

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.serve(self.store, args, kwargs)


def _cache_inputs(
    template: Template, layer: PackedLayer, hidden: Tensor, mask: Tensor | None
) -> list[Tensor]:
    """What a graph with a KV cache reads besides its arguments: the cache, positions, the mask."""
    batch, new = hidden.shape[:2]
    slots = layer.slots_read(new)
    layer.reserve(template, batch, slots, hidden.device)
    if mask is None and layer.length == 0 and new > 1 and hidden.is_cuda:
        slots = new  # of a text that begins here; attention then needs no mask
    views = first_slots(layer.tensors, slots)
    positions = layer.positions(batch, new, hidden.device)
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
    # Leaves stand as TemplateForward.find flattens them: positional arguments, then the others by
    # name, in place of a tuple what is in it, such as cos and sin [B, T, D]. Of a tensor the key
    # has the number of dimensions and the dtype, as Template.fits compares the sizes; numbers,
    # strings and None are constants of a graph, and stand in the key themselves.
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
    """What :func:`qatc.load` put on a model."""
    runtime = getattr(model, RUNTIME, None)
    if runtime is None:
        raise ConfigError("the model does not run on integers; load one with qatc.load")
    assert isinstance(runtime, Runtime)
    return runtime

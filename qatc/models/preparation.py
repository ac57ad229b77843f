"""Put the transformed, compiled graph under a model's layers, and take it away again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from qatc.errors import CaptureError, ConfigError
from qatc.graph import compilation
from qatc.graph.capture import Template
from qatc.graph.causality import why_not_causal
from qatc.graph.nodes import weight_sites
from qatc.graph.template_forward import TemplateForward
from qatc.graph.templates import TemplateStore, dry_run, same_for_all
from qatc.models.pipelines import (
    embedding_pipeline,
    head_pipeline,
    recipe_allows_integers,
    training_pipeline,
    why_no_integer_forward,
)
from qatc.models.regions import find_regions, is_transformers_model, sharded_parts
from qatc.models.scales import Added, add, attention_sizes
from qatc.models.support import (
    refuse_adapters,
    refuse_idle_patterns,
    refuse_lost_scales,
    refuse_sharded,
    refuse_stacked_weights,
    refuse_turned,
    refuse_unstorable,
    refuse_unsupported,
)
from qatc.models.vocabulary import End, quantized_ends
from qatc.recipe.recipe import Recipe
from qatc.recipe.spec import QuantSpec

_PREPARED = "_qatc_prepared"


@dataclass(frozen=True)
class Prepared:
    """What :func:`prepare` put on a model.

    Attributes:
        store, forwards: templates and forwards of the decoder layers.
        ends: forwards of the quantized head and embedding, each with a store of its own.
        added: learned scales and centers of keys, which the model did not have.
    """

    recipe: Recipe
    store: TemplateStore
    forwards: tuple[TemplateForward, ...]
    use_cache: tuple[tuple[Any, Any], ...]
    integer_forward: bool
    ends: tuple[tuple[End, TemplateForward], ...] = ()
    added: tuple[Added, ...] = ()

    def stores(self) -> tuple[TemplateStore, ...]:
        """All stores of templates."""
        return (self.store, *(forward.store for _, forward in self.ends))

    def templates(self) -> Iterator[Template]:
        """The templates captured so far."""
        return (template for store in self.stores() for template in store)


def prepare(
    model: nn.Module,
    recipe: Recipe,
    *,
    compile: bool | None = None,
    compute_dtype: torch.dtype | None = None,
    integer_forward: bool | None = None,
    start_scales: Mapping[str, Tensor] | None = None,
    checkpoint_activations: bool = False,
) -> nn.Module:
    """Let the layers of ``model`` run the quantized graph, for training or evaluation.

    The decoder layers of a Hugging Face causal LM, or any other module as a whole, get a
    ``forward`` that runs a captured, transformed and compiled graph with the module's own
    parameters. Nothing else changes: the module tree, the state dict, tied weights and the hooks
    of the layers stay as they are. :func:`restore` undoes it. A recipe with learned scales or
    centered keys adds those to the modules that they are of, as parameters and buffers, which
    ``state_dict`` holds and ``save_pretrained`` of transformers does not bring back. Centers are
    0 until :func:`qatc.center_keys` has measured them. Weights whose inputs a recipe rotates have
    to be turned before, by :func:`qatc.ptq.rotate_inputs`.

    Attributes may be changed afterwards: a graph is captured for what they are now. What is added
    afterwards, such as LoRA adapters of peft, stays in full precision, around quantized weights.
    Hooks on modules inside a layer would not be called, and are refused.

    A Hugging Face model is captured at once, on a tiny batch; other arguments (a mask, say) and
    other modules when they are first met. Batch and sequence are symbols: one graph serves all
    batch sizes and lengths (Inductor makes further kernels only for a size of 1).

    Args:
        model: a transformers causal LM loaded with ``attn_implementation="sdpa"``, or any module
            that ``torch.export`` accepts.
        recipe: what is quantized and how.
        compile: whether to compile the graphs with Inductor; ``None``: if this machine can.
        compute_dtype: float dtype of the layers' computation when it is not that of the
            parameters, e.g. bf16 over fp32 masters. The layers' results have that dtype as well,
            so call the model under ``torch.autocast`` of the same dtype, for the head's sake.
        integer_forward: compute quantized linears on int8 codes with an exact product, as integer
            kernels will; ``None``: where the recipe allows it and this machine is fast at it.
        start_scales: where learned scales of weights start, fp32 ``[N, G]`` by parameter name;
            ``None``: where the squared error is least.
        checkpoint_activations: keep the inputs of layers alone for the backward pass, which
            computes each layer again; gradients are the same, bit for bit.

    Returns:
        ``model`` itself.

    Raises:
        ConfigError: the model is prepared already, a skip pattern names no parameter, the
            recipe does not allow the integer forward that was asked for, or it quantizes a head or
            an embedding that the model does not have (see
            :func:`qatc.models.vocabulary.quantized_ends`).
        CaptureError: a layer cannot be captured, or is none of a causal decoder.
        PassError: a pass found nothing to quantize.
    """
    refuse_adapters(model)
    if hasattr(model, _PREPARED):
        raise ConfigError("the model is prepared already; call qatc.restore(model) first")
    refuse_idle_patterns(model, recipe)
    if is_transformers_model(model):
        refuse_unsupported(model)
        if recipe.weights.quantizes:
            refuse_stacked_weights(model, recipe)
    refuse_lost_scales(model, recipe)
    refuse_sharded(model, recipe)
    ends = quantized_ends(model, recipe)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    obstacle = why_no_integer_forward(recipe, device)
    on_integers = obstacle is None if integer_forward is None else integer_forward
    if integer_forward and not recipe_allows_integers(recipe):
        raise ConfigError(f"no integer forward: {obstacle}; leave integer_forward to None or False")
    added = _add_scales(model, recipe, compute_dtype, start_scales)
    compiler = inductor if (can_compile(device) if compile is None else compile) else None
    store = TemplateStore(
        transform=lambda gm, owner: _transform(gm, owner, recipe, on_integers),
        compile=compiler,
        compute_dtype=compute_dtype,
        checkpoint=checkpoint_activations,
    )
    forwards = []
    for name, region in find_regions(model):
        own = recipe.exceptions(name, dict(region.named_parameters()))
        forwards.append(TemplateForward(region, name, store, own, model))
    at_ends = []
    for end in ends:
        if end.role == "head":
            pipeline = head_pipeline(recipe, on_integers)
            at_end = TemplateStore(same_for_all(pipeline), compiler, compute_dtype)
        else:  # a table is rounded from its masters, and the layers cast what they get
            at_end = TemplateStore(same_for_all(embedding_pipeline(recipe)), compiler)
        at_ends.append((end, TemplateForward(end.module, end.name, at_end, root=model)))
    for forward in (*forwards, *(forward for _, forward in at_ends)):
        forward.install()
    switched = tuple(_switch_cache_off(model))
    prepared = Prepared(
        recipe, store, tuple(forwards), switched, on_integers, tuple(at_ends), added
    )
    setattr(model, _PREPARED, prepared)
    if is_transformers_model(model):
        model.save_pretrained = partial(_save_pretrained, model)  # type: ignore[assignment]
        try:
            _capture_now(model, prepared)
            at_an_end = {end.weight for end in ends}
            refuse_unstorable(model, [n for n in quantized_parameters(model) if n not in at_an_end])
        except BaseException:
            restore(model)
            raise
    return model


def restore(model: nn.Module) -> nn.Module:
    """Give the layers of ``model`` their original forward back; the parameters stay trained.

    Learned scales and centers of keys go with the quantized graph; turned weights stay turned.
    """
    prepared = prepared_state(model)
    for forward in (*prepared.forwards, *(forward for _, forward in prepared.ends)):
        forward.remove()
    for config, value in prepared.use_cache:
        config.use_cache = value
    model.__dict__.pop("save_pretrained", None)
    delattr(model, _PREPARED)
    for added in prepared.added:
        added.remove()
    return model


def prepared_state(model: nn.Module) -> Prepared:
    """What :func:`prepare` put on ``model``."""
    prepared = getattr(model, _PREPARED, None)
    if prepared is None:
        raise ConfigError("the model is not prepared; call qatc.prepare(model, recipe) first")
    assert isinstance(prepared, Prepared)
    return prepared


def quantized_parameters(model: nn.Module) -> list[str]:
    """Names of the weights that a prepared model quantizes, see :func:`quantized_specs`."""
    return list(quantized_specs(model))


def quantized_specs(model: nn.Module) -> dict[str, QuantSpec]:
    """The weights that a prepared model quantizes by name, layers first, and how.

    Only graphs captured so far count: run the model once before. A tied weight is there under the
    name of each of its users that quantizes it.
    """
    prepared = prepared_state(model)
    found: dict[str, QuantSpec] = {}
    for forward in prepared.forwards:
        prefix = f"{forward.name}." if forward.name else ""
        for template in prepared.store.of(forward):
            for name, spec in weight_sites(template.graph_module).items():
                found[prefix + name] = spec
    for end, _ in prepared.ends:
        found[end.weight] = getattr(prepared.recipe, end.role)
    return found


def _add_scales(
    model: nn.Module,
    recipe: Recipe,
    compute_dtype: torch.dtype | None,
    start_scales: Mapping[str, Tensor] | None,
) -> tuple[Added, ...]:
    """Put on the model what the recipe has trained or taken off, as it is before training.

    Graphs say which weights are quantized and which keys are read, and what a module holds is part
    of what its graph is made from: so plain graphs, without any of it, are captured first.
    """
    if not (recipe.weights.learned or recipe.kv.learned or recipe.center_keys):
        return ()
    if not is_transformers_model(model):
        raise ConfigError(
            "learned scales and centered keys are for transformers models; leave clip and"
            " center_keys out of the recipe"
        )
    plain = replace(
        recipe,
        weights=replace(recipe.weights, clip="none"),
        kv=replace(recipe.kv, clip="none"),
        center_keys=False,
        head=QuantSpec(),
        embedding=QuantSpec(),
    )
    prepare(model, plain, compile=False, compute_dtype=compute_dtype, integer_forward=False)
    try:
        weights, attentions = quantized_specs(model), attention_sizes(prepared_state(model))
    finally:
        restore(model)
    return add(model, recipe, weights, attentions, start_scales or {})


@torch.no_grad()
def _capture_now(model: nn.Module, prepared: Prepared) -> None:
    """Run a tiny batch, so that what cannot be captured or quantized is known at once."""
    dtype = prepared.store.compute_dtype
    calls: list[tuple[TemplateForward, Any, Any]] = []

    def note(forward: TemplateForward, module: nn.Module, args: Any, kwargs: Any) -> None:
        calls.append((forward, args, dict(kwargs)))

    ids = torch.zeros((2, 8), dtype=torch.long, device=next(model.parameters()).device)
    with dry_run(prepared.stores()):
        hooks = [
            forward.module.register_forward_pre_hook(partial(note, forward), with_kwargs=True)
            for forward in prepared.forwards
        ]
        try:
            with torch.autocast(ids.device.type, dtype, dtype is not None):
                model(input_ids=ids, use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
            for part in sharded_parts(model):
                part.reshard()  # a pass without a backward leaves the root whole
        _refuse_uncacheable(model, prepared.store, calls)


def _refuse_uncacheable(
    model: nn.Module, store: TemplateStore, calls: list[tuple[TemplateForward, Any, Any]]
) -> None:
    """Raise ``CaptureError`` if a layer could not decode from a cache of keys and values."""
    looked_at: set[int] = set()
    for forward, args, kwargs in calls:
        template, leaves = forward.find(args, kwargs, store)
        if id(template) in looked_at:
            continue
        looked_at.add(id(template))
        inputs = [*forward.parameters(template), *(leaves[i] for i in template.inputs)]
        reason = why_not_causal(template.graph_module, inputs)
        if reason is not None:
            raise CaptureError(
                f"{forward.name} ({type(forward.module).__name__}) {reason}; qatc quantizes causal"
                f" language models of attention layers, and {type(model).__name__} as configured is"
                " none: choose another model"
            )


def can_compile(device: str | torch.device | None = None) -> bool:
    """Whether Inductor can build kernels for a device; :mod:`qatc.graph.compilation` knows why."""
    return compilation.obstacle("auto" if device is None else torch.device(device).type) is None


def inductor(gm: GraphModule) -> Callable[..., Any]:
    """Compile a template's graph."""
    return compilation.compile_graph(gm.forward)  # a module would be called as one


def _transform(
    gm: GraphModule, owner: TemplateForward, recipe: Recipe, integer_forward: bool
) -> None:
    own = owner.present()
    linears = any(p.dim() == 2 and n not in own.skip for n, p in owner.module.named_parameters())
    training_pipeline(recipe, own, linears, integer_forward)(gm)


def _switch_cache_off(model: nn.Module) -> Iterator[tuple[Any, Any]]:
    """Captured layers take no KV cache: generate recomputes, with the same numerics."""
    for config in (getattr(model, "config", None), getattr(model, "generation_config", None)):
        if config is not None and hasattr(config, "use_cache"):
            yield config, config.use_cache
            config.use_cache = False


def _save_pretrained(model: Any, *arguments: Any, **options: Any) -> None:
    """``save_pretrained`` of a prepared model, with its own ``use_cache`` in the saved config."""
    prepared = prepared_state(model)
    refuse_turned(prepared.recipe)
    try:
        for config, value in prepared.use_cache:
            config.use_cache = value
        type(model).save_pretrained(model, *arguments, **options)
    finally:
        for config, _ in prepared.use_cache:
            config.use_cache = False

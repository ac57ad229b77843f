"""One token in one call: a loaded model's decoding step as a program in C.

Behind a prompt, a step of batch 1 computes little and does much around it: Python for every layer,
guards, a dozen kernels each with its own threads. :class:`DecodeForward` stands in for the forward
of a loaded model. It captures what lies around the decoder layers (embedding, positions, last norm,
head) as one more graph, in which a layer is a single node, translates it and the graphs of the
layers into a :class:`qatc.runtime.program.Program`, and runs that for a call that is one token of
one row behind a packed cache, on a CPU. All other calls go to the model's own forward.
"""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.convert_frame import compile_lock
from torch.fx import Node
from torch.utils import _pytree as pytree
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from qatc.errors import CaptureError
from qatc.graph.capture import Template, capture
from qatc.graph.watch import Watch
from qatc.passes import Canonicalize
from qatc.runtime.cache import PackedLayer, packed_layer, round_up, windows_of
from qatc.runtime.forward import LoweredForward, Runtime, take_out
from qatc.runtime.program import Op, Program, Steps, obstacle, per_call
from qatc.runtime.translation import Translator
from qatc.runtime.values import CacheInput, Number, Parameter, Untranslatable, Value

_LIBRARY = torch.library.Library("qatc", "FRAGMENT")
_LIBRARY.define(
    "decoder_region(Tensor[] tensors, int number, int width, ScalarType dtype) -> Tensor"
)


def _region_shape(tensors: list[Tensor], number: int, width: int, dtype: torch.dtype) -> Tensor:
    first = tensors[0]
    return first.new_empty((*first.shape[:2], width), dtype=dtype)


torch.library.register_fake("qatc::decoder_region", _region_shape, lib=_LIBRARY)

_KNOWN_LAYERS = {"full_attention", "sliding_attention"}
"""Kinds of attention in which one new token sees all that came before, or the last of it."""

_PLAIN = {
    "attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep",
    "return_dict", "cache_position", "input_ids",
}  # fmt: skip
"""Arguments of a call that a program knows what to do with."""


class DecodeProgram:
    """The decoding step of a loaded model, ready to run.

    Args:
        model: a model of :func:`qatc.load`.
        runtime: its own.

    Raises:
        Untranslatable: something in it has no step in C; the message says what.
    """

    def __init__(self, model: Any, runtime: Runtime) -> None:
        reason = _why_not(model, runtime)
        if reason is not None:
            raise Untranslatable(reason)
        self._layers = runtime.forwards
        self._regions: list[LoweredForward] = [*runtime.forwards, *getattr(runtime, "ends", ())]
        self._templates = [_template(forward, runtime) for forward in self._regions]
        self._model = model
        self.vocabulary = int(model.get_input_embeddings().num_embeddings)
        trunk = self._capture(model)
        steps = Steps(torch.get_num_threads())
        self._translate(trunk, steps)
        self.program: Program = steps.finish()
        self._watch = Watch(model)

    def _capture(self, model: Any) -> Template:
        """The graph around the regions, in which each of those is a node."""
        memo: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers())}
        for number, forward in enumerate(self._regions):
            memo[id(forward.module)] = _Region(forward, self._templates[number], number)
        copied = copy.deepcopy(model, memo)
        copied.__dict__.pop("forward", None)
        trunk = _Logits(copied)
        ids = torch.zeros((2, 8), dtype=torch.long)
        positions = torch.arange(8).expand(2, 8).contiguous()
        try:
            template = capture(trunk, (ids, positions), {}, "the model around its layers")
        except CaptureError as error:
            raise Untranslatable(str(error)) from error
        Canonicalize()(template.graph_module)  # without asserts, the mask is dead code
        return template

    def _translate(self, trunk: Template, steps: Steps) -> None:
        translator = Translator(steps)

        def region(node: Node, inputs: list[Any]) -> Value:
            number: Any = node.args[1]
            template, forward = self._templates[number], self._regions[number]
            cached = [] if number >= len(self._layers) else [CacheInput(number)] * 8
            nodes = template.graph_module.graph.find_nodes(op="placeholder")
            given = [Parameter(p) for p in forward.parameters(template)] + inputs
            given += cached[: len(nodes) - len(given)]
            inner = Translator(steps)
            results = inner.graph(template.graph_module, given)
            if len(results) != 1:
                raise Untranslatable(f"{forward.name} has {len(results)} results")
            return inner.float(results[0])

        translator.region = region
        whole = _Logits(self._model)
        given: list[Any] = [
            Parameter(getattr(whole.get_submodule(path), leaf))
            for path, _, leaf in (name.rpartition(".") for name in trunk.parameters)
        ]
        one = torch.empty((1, 1), dtype=torch.long, device="meta")
        given += [Number(per_call(0), one), Number(per_call(1), one)]
        results = translator.graph(trunk.graph_module, given)
        logits = translator.dense(results[0])
        self._shape, self._dtype = tuple(logits.view.shape), logits.view.dtype
        steps.emit(
            Op.STORE, per_call(2), a=logits.start, cols=logits.view.numel(),
            kind=self._dtype is torch.bfloat16,
        )  # fmt: skip

    def applies(self) -> bool:
        """Whether the model is still the one that was translated, and nobody listens inside."""
        return not self._watch.overheard() and self._watch.unchanged()

    def __call__(self, token: int, position: int, cache: Cache) -> Tensor:
        """Logits ``[1, 1, V]`` of the next token, whose keys and values go into ``cache``."""
        head = (torch.tensor([token]), torch.tensor([position]))
        logits = torch.empty(self._shape, dtype=self._dtype)
        pointers = [head[0].data_ptr(), head[1].data_ptr(), logits.data_ptr()]
        layers, sizes = [], []
        for number, template in zip(range(len(self._layers)), self._templates, strict=False):
            layer = packed_layer(cache, number)
            held = layer.length
            layer.reserve(template, 1, round_up(held + 1), logits.device)
            first = 0 if layer.window is None else max(0, held + 1 - layer.window)
            sizes += [held, first, layer.tensors[0].shape[2]]
            layers.append(layer)
        numbers = torch.tensor(sizes)
        address = numbers.data_ptr()
        for number, layer in enumerate(layers):
            pointers += [tensor.data_ptr() for tensor in layer.tensors]
            pointers.append(address + 24 * number)
        self.program(pointers)
        for layer in layers:
            layer.advance(1)
        return logits


def _why_not(model: Any, runtime: Runtime) -> str | None:
    if torch.device(runtime.device).type != "cpu":
        return f"it is C for a CPU, and this is {runtime.device}"
    if not runtime.recipe.kv.quantizes:
        return "K and V are not quantized"
    kinds = set(getattr(model.config.get_text_config(), "layer_types", None) or ()) - _KNOWN_LAYERS
    if kinds:
        return f"its layers have {', '.join(sorted(kinds))}"
    return obstacle()


def _template(forward: LoweredForward, runtime: Runtime) -> Template:
    """The graph that serves a region when a token is decoded."""
    store = runtime.cached if forward in runtime.forwards else forward.store
    found = store.of(forward)
    if len(found) != 1:
        raise Untranslatable(f"{forward.name} has {len(found)} graphs, not one")
    return found[0]


class _Logits(nn.Module):
    """A model as a function of tokens and their positions."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, positions: Tensor) -> Any:
        return self.model(input_ids=ids, position_ids=positions, use_cache=False).logits


class _Region(nn.Module):
    """Stands where a layer does, while what is around the layers is captured."""

    def __init__(self, forward: LoweredForward, template: Template, number: int) -> None:
        super().__init__()
        output = next(n for n in template.graph_module.graph.nodes if n.op == "output")
        results = output.all_input_nodes
        self._found = (forward, template, number, results[0].meta["val"])

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._found[0].prototype, name)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        forward, template, number, value = self._found
        args, kwargs, _, _ = take_out(args, kwargs)
        leaves, _ = pytree.tree_flatten((args, dict(sorted(kwargs.items()))))
        tensors = [leaves[i] for i in template.inputs]
        result: Tensor = torch.ops.qatc.decoder_region(
            tensors, number, int(value.shape[-1]), value.dtype
        )
        return result


class DecodeForward:
    """The forward of a loaded model: a program for one token of one row, else the model's own.

    Attributes:
        reason: why there is no program, once that was tried; None where there is one.
    """

    def __init__(self, model: Any, runtime: Runtime) -> None:
        self.model, self.runtime = model, runtime
        self._program: DecodeProgram | None = None
        self._tried = False
        self.reason: str | None = None
        functools.update_wrapper(self, type(model).forward.__get__(model))

    @functools.cached_property
    def windows(self) -> list[int | None] | None:
        """Those of the model's layers, see :func:`qatc.runtime.cache.windows_of`."""
        return windows_of(self.model.config)

    def program(self) -> DecodeProgram | None:
        """The program, made when it is first asked for."""
        if not self._tried:
            with compile_lock:  # as templates are captured
                if not self._tried:
                    self._make()
        return self._program

    def _make(self) -> None:
        try:
            if self.runtime.kernels == "torchao":
                raise Untranslatable("its products are no kernels of torchao, which were asked for")
            with torch.inference_mode(False), torch.no_grad():
                self._program = DecodeProgram(self.model, self.runtime)
        except Untranslatable as reason:
            self.reason = str(reason)
        self._tried = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        step = _step_of(self, args, kwargs)
        if step is not None:
            program = self.program()
            if program is not None and program.applies() and step.token < program.vocabulary:
                logits = program(step.token, step.position, step.cache)
                return CausalLMOutputWithPast(logits=logits, past_key_values=step.cache)
        return type(self.model).forward(self.model, *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> DecodeForward:
        return DecodeForward(memo.get(id(self.model), self.model), self.runtime)


@dataclass(frozen=True)
class _Step:
    token: int
    position: int
    cache: Cache


def _step_of(decode: DecodeForward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Step | None:
    """The step that a call asks for, if that is one token of one row behind what a cache holds."""
    found = tokens_behind(decode, args, kwargs)
    if found is None or found[0].shape[0] != 1:
        return None
    ids, cache = found
    held = cache.get_seq_length()
    mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
    if mask is not None and (mask.shape != (1, held + 1) or not bool(mask.all())):
        return None
    if positions is not None and positions.shape != (1, 1):
        return None
    token, position = int(ids), held if positions is None else int(positions)
    return _Step(token, position, cache) if token >= 0 and position >= 0 else None


def tokens_behind(
    decode: DecodeForward, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Tensor, Cache] | None:
    """The tokens ``[B, 1]`` and the cache of a call for the logits of one new token of every row.

    Nothing of a tensor but its shape is looked at. None for any other call, and for a cache of
    other windows than the model's, which are then in the model's own mask alone.
    """
    if len(args) > 1 or (args and "input_ids" in kwargs):
        return None
    ids, cache = args[0] if args else kwargs.get("input_ids"), kwargs.get("past_key_values")
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.shape[1] != 1:
        return None
    others = (value for name, value in kwargs.items() if name not in _PLAIN)
    if any(value is not None and value is not False for value in others):
        return None
    if not isinstance(cache, Cache) or not _holds_rows(cache, ids.shape[0], decode.windows):
        return None
    return (ids, cache) if _wants_logits_alone(decode.model, kwargs, ids.device.type) else None


def _wants_logits_alone(model: Any, kwargs: dict[str, Any], device: str) -> bool:
    config = model.config
    more = config.output_attentions or config.output_hidden_states
    plain = kwargs.get("return_dict") is not False and config.return_dict
    kept = isinstance(kwargs.get("logits_to_keep", 0), int)
    caches = kwargs.get("use_cache") is not False
    return bool(plain and kept and caches and not more and not torch.is_autocast_enabled(device))


def _holds_rows(cache: Cache, rows: int, windows: list[int | None] | None) -> bool:
    layers = cache.layers
    return bool(windows and len(layers) == len(windows)) and all(
        isinstance(layer, PackedLayer) and layer.length and layer.tensors[0].shape[0] == rows
        and layer.window == window
        for layer, window in zip(layers, windows or (), strict=True)
    )  # fmt: skip

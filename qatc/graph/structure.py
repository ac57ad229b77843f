"""What of a module decides its graph, and what of it a graph would leave out."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from qatc.errors import CaptureError, ConfigError
from qatc.graph.constants import of_sharding, plain_class
from qatc.recipe.exceptions import Exceptions


class Structure:
    """What must be equal for two modules to share a graph, whatever their arguments.

    Attributes:
        constants: what Python code may branch on, see :mod:`qatc.graph.constants`.
        tensors: names, shapes, dtypes and devices of parameters and buffers, and which are one.
        own: what a recipe says of single parameters.
    """

    __slots__ = ("_hash", "constants", "own", "tensors")

    def __init__(
        self, constants: tuple[Any, ...], tensors: tuple[Any, ...], own: Exceptions
    ) -> None:
        self.constants, self.tensors, self.own = constants, tensors, own
        self._hash = hash((constants, tensors, own))

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        return (
            isinstance(other, Structure)
            and self._hash == other._hash
            and (self.constants, self.tensors, self.own)
            == (other.constants, other.tensors, other.own)
        )

    def differences(self, other: Structure) -> list[str]:
        """Names of the attributes and tensors that differ."""
        pairs = ((self.constants, other.constants), (self.tensors, other.tensors))
        changed = {
            ".".join(str(part) for part in entry[:2] if isinstance(part, str) and part)
            for mine, others in pairs
            for entry in {*mine} ^ {*others}
        }
        return sorted(changed - {""})


def every_parameter(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return module.named_parameters(remove_duplicate=False)


def every_tensor(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Parameters and buffers, of those that are tied every one."""
    return [*every_parameter(module), *module.named_buffers(remove_duplicate=False)]


def hooks_of(module: nn.Module) -> tuple[dict[int, Any], ...]:
    return (
        *(module._forward_hooks, module._forward_pre_hooks),
        *(module._backward_hooks, module._backward_pre_hooks),
    )


def hooks_inside(module: nn.Module) -> list[dict[int, Any]]:
    """The hooks of everything inside ``module``: its own are called, as ever."""
    inside = itertools.islice(module.modules(), 1, None)
    return [hooks for child in inside for hooks in hooks_of(child)]


def refuse_hooks(module: nn.Module, name: str) -> None:
    """Raise ``CaptureError`` if a submodule has hooks, which would silently not be called.

    Those that transformers puts everywhere, to collect what :meth:`TemplateForward.check_call`
    refuses to give, do nothing without being asked.
    """
    found = [
        f"{name}.{path}" if name else path
        for path, child in itertools.islice(module.named_modules(), 1, None)
        for hooks in hooks_of(child)
        if any(getattr(hook, "__module__", "") != _COLLECTING for hook in hooks.values())
    ]
    if found:
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        raise CaptureError(
            f"there are hooks on {', '.join(found[:3])}{more}, which would never be called, as"
            f" {name or 'the module'} runs as one captured graph; remove them, put them on"
            f" {name or 'the module'} itself, or call qatc.restore(model) first"
        )


_COLLECTING = "transformers.utils.output_capturing"


def copy_of(module: nn.Module) -> nn.Module:
    """The same tensors under new modules of its own classes, none of which anything is hooked to.

    ``fully_shard`` puts a class before that of a module, and with the module a state that holds
    process groups, of which no copy can be made.
    """
    memo: dict[int, Any] = {id(t): t for t in (*module.parameters(), *module.buffers())}
    sharded = [(child, type(child)) for child in module.modules()]
    sharded = [(child, kind) for child, kind in sharded if kind is not plain_class(kind)]
    for child in module.modules():
        for name, value in vars(child).items():
            if name in _HOOKS or (of_sharding(name) and isinstance(value, dict)):
                memo[id(value)] = type(value)()
    try:
        for child, kind in sharded:
            child.__class__ = plain_class(kind)
        return copy.deepcopy(module, memo)
    finally:
        for child, kind in sharded:
            child.__class__ = kind


_HOOKS = frozenset(name for name in vars(nn.Module()) if name.endswith("_hooks"))


def refuse_rounded_masters(module: nn.Module, name: str, root: nn.Module | None = None) -> None:
    """Raise ``ConfigError`` if a sharded module gets its parameters in a dtype of fewer bits.

    Its codes would be those of the rounded weights, and not those that are written in the end.

    Args:
        module: whose weights are quantized.
        name: what it is called.
        root: the model that it is a part of; the innermost that is sharded around a module decides.
    """
    around = [
        part
        for part in (root or module).modules()
        if type(part) is not plain_class(type(part))
        and any(child is module for child in part.modules())
    ]
    if not around:
        return
    sharded: Any = around[-1]
    dtype = sharded._get_fsdp_state()._mp_policy.param_dtype
    if dtype not in (None, torch.float32):
        what = (name or "the model") if sharded is module else f"what is around {name}"
        raise ConfigError(
            f"{what} is sharded with MixedPrecisionPolicy(param_dtype={dtype}),"
            " which rounds weights before they are quantized; leave the policy out, and pass"
            f" compute_dtype={dtype} to qatc.prepare"
        )

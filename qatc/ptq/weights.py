"""Reading and replacing the parameters of a layer, for methods that fold one into another."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qatc.graph.nodes import Linear


def owner(layer: nn.Module, name: str) -> nn.Module:
    """The submodule that holds the parameter ``name``."""
    return layer.get_submodule(name.rpartition(".")[0])


def value(layer: nn.Module, name: str) -> Tensor:
    """A copy of a parameter in fp64."""
    return layer.get_parameter(name).detach().double()


def assign(layer: nn.Module, name: str, new: Tensor) -> None:
    """Give a parameter other values, in memory of its own.

    Another model that shares the memory of the old ones keeps them.
    """
    parameter = layer.get_parameter(name)
    assert new.shape == parameter.shape
    parameter.data = new.to(parameter.dtype)


def scale_inputs(layer: nn.Module, linears: tuple[Linear, ...], factors: Tensor) -> None:
    """Multiply the input channels of linears, columns of their weights, by ``factors [K]``."""
    for linear in linears:
        assign(layer, linear.parameter, value(layer, linear.parameter) * factors)


def largest(values: Tensor) -> Tensor:
    """The largest magnitude of each column of ``[n, K]``."""
    return torch.as_tensor(values.abs().amax(dim=0))

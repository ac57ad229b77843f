"""The op that runs a lowered linear.

``torch.ops.qatc.packed_linear`` takes an activation and a weight stored as packed codes, and runs
the kernel of :data:`qatc.kernels.table.KERNELS` whose name it was given, one for prefill and one
for decode (a single token of every row).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.fx import Node

from qatc.kernels.site import Site
from qatc.kernels.table import KERNELS, run_added, run_joined
from qatc.recipe.spec import read_spec_arg

_BY_NAME = {kernel.name: kernel for kernel in KERNELS}

_LIBRARY = torch.library.Library("qatc", "FRAGMENT")
_LIBRARY.define(
    "packed_linear(Tensor x, Tensor packed, Tensor scale, Tensor? bias, int inputs, str x_spec,"
    " str weight_spec, *, str prefill, str decode) -> Tensor"
)


def _packed_linear(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    inputs: int,
    x_spec: str,
    weight_spec: str,
    *,
    prefill: str,
    decode: str,
) -> Tensor:
    weights, activations = read_spec_arg(weight_spec), read_spec_arg(x_spec)
    site = Site(weights, activations, packed.shape[0], inputs, x.device.type)
    kernel = _BY_NAME[decode if x.shape[-2] == 1 else prefill]
    assert kernel.run is not None, f"{kernel.name} has an obstacle everywhere"
    return kernel.run(x, packed, scale, bias, site)


_LIBRARY.impl("packed_linear", _packed_linear, "CompositeImplicitAutograd")


def site_of(node: Node, device: str) -> Site:
    """The site at a ``packed_linear`` node of a graph for ``device``."""
    _, packed, _, _, inputs, x_spec, weight_spec = node.args
    return Site(
        read_spec_arg(str(weight_spec)),
        read_spec_arg(str(x_spec)),
        int(packed.meta["val"].shape[0]),  # type: ignore[union-attr]
        inputs,  # type: ignore[arg-type]
        device,
    )


PACKED_LINEAR = torch.ops.qatc.packed_linear.default
"""``(x [..., K], packed [N, bytes], scale [N, G], bias, K, x_spec, weight_spec, *, prefill,
decode) -> [..., N]``: a linear on a weight that is stored as packed codes."""

_LIBRARY.define(
    "packed_linears(Tensor x, Tensor[] packed, Tensor[] scale, Tensor?[] bias, str x_spec,"
    " str weight_spec) -> Tensor[]"
)


def _packed_linears(
    x: Tensor,
    packed: Sequence[Tensor],
    scale: Sequence[Tensor],
    bias: Sequence[Tensor | None],
    x_spec: str,
    weight_spec: str,
) -> list[Tensor]:
    weights, activations = read_spec_arg(weight_spec), read_spec_arg(x_spec)
    return run_joined(x, packed, scale, bias, weights, activations)


_LIBRARY.impl("packed_linears", _packed_linears, "CompositeImplicitAutograd")

PACKED_LINEARS = torch.ops.qatc.packed_linears.default
"""``(x [..., K], packed, scale, bias, x_spec, weight_spec) -> [..., N] of each``: as
:data:`PACKED_LINEAR` by :data:`qatc.kernels.table.TRITON`, of several weights, in one launch. The
input is quantized once."""

_LIBRARY.define(
    "packed_linear_and(Tensor x, Tensor packed, Tensor scale, Tensor? bias, Tensor added,"
    " str x_spec, str weight_spec) -> Tensor"
)


def _packed_linear_and(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    added: Tensor,
    x_spec: str,
    weight_spec: str,
) -> Tensor:
    weights, activations = read_spec_arg(weight_spec), read_spec_arg(x_spec)
    return run_added(x, packed, scale, bias, added, weights, activations)


_LIBRARY.impl("packed_linear_and", _packed_linear_and, "CompositeImplicitAutograd")

PACKED_LINEAR_AND = torch.ops.qatc.packed_linear_and.default
"""``(x [..., K], packed, scale, bias, added [..., N], x_spec, weight_spec) -> [..., N]``: as
:data:`PACKED_LINEAR` by :data:`qatc.kernels.table.TRITON`, and added to what is of its dtype."""

"""torchao's integer product of an activation and a weight, on codes and scales that are given.

``torchao.quantization.int_scaled_matmul`` is what torchao's ``Int8Tensor`` multiplies with. Given
int8 codes it takes them as they are, whatever rule they come from: its int32 sum is exact, and its
scaling is one product in fp32 with the scale of each row. Here it stands behind an op of its own,
since ``torch.compile`` cannot look into it.

What else torchao registers for a CPU computes something else, or is not in the library that is
installed; :func:`obstacle` and :func:`da8w4_obstacle` say which.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from qatc.kernels import integer_linear

LARGEST_WIDTH = (2**31 - 1) // (255 * 128)
"""An int32 holds the sum of this many products of an unsigned and a signed byte, which is how
torchao multiplies on a CPU."""

_LIBRARY = torch.library.Library("qatc", "FRAGMENT")
_LIBRARY.define("torchao_mm(Tensor a, Tensor b, Tensor scale) -> Tensor")


def _torchao_mm(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    from torchao.quantization import int_scaled_matmul

    if a.shape[0] == 0:
        return scale.new_empty((0, b.shape[0]))
    product: Tensor = int_scaled_matmul(a.contiguous(), b.contiguous().t(), scale.contiguous())
    return product


_LIBRARY.impl("torchao_mm", _torchao_mm, "CPU")
torch.library.register_fake(
    "qatc::torchao_mm",
    lambda a, b, scale: scale.new_empty((a.shape[0], b.shape[0])),
    lib=_LIBRARY,
)


def torchao_mm(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    """``(a @ b.T) * scale`` of integer codes: an exact sum, and one product in fp32.

    Args:
        a: int8 ``[M, K]`` on a CPU, K from 2 to :data:`LARGEST_WIDTH`.
        b: int8 ``[N, K]``.
        scale: fp32 ``[M, 1]``, of the rows of ``a``.

    Returns:
        fp32 ``[M, N]``.
    """
    result: Tensor = torch.ops.qatc.torchao_mm(a, b, scale)
    return result


def obstacle(device: str) -> str | None:
    """Why torchao's integer product is not used on this type of device, or None if it is."""
    if device != "cpu":
        return f"torchao's product was not run on {device}"
    if not _is_installed():
        return "torchao is not installed, or has no int_scaled_matmul"
    return integer_linear.obstacle(device)  # it multiplies with torch's own product


@functools.cache
def _is_installed() -> bool:
    try:
        from torchao.quantization import int_scaled_matmul  # noqa: F401
    except ImportError:
        return False
    return True


@functools.cache
def da8w4_obstacle() -> str:
    """Why torchao's product of int8 activations and int4 weights does not run."""
    name = "torchao::da8w4_linear_cpu"
    try:
        import torchao  # noqa: F401

        built = torch._C._dispatch_has_kernel_for_dispatch_key(name, "CPU")
    except (ImportError, RuntimeError):
        return "this torchao does not know it"
    if not built:
        return "this torchao was built without its kernels for a CPU (USE_CPU_KERNELS=1)"
    return "it adds scaled sums of at most 128 inputs each, where one sum was trained"

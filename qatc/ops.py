"""The numerics: scales, codes, and the one fake-quant op that training graphs hold.

``torch.ops.qatc.fake_quantize`` is what the passes insert. It is registered once, as a *composite*
op: a graph shows and serialises it as a single node, while Inductor sees through it and fuses the
row maximum, the rounding and whatever stands around them into one kernel.

Rounding has no useful gradient, so training uses the straight-through estimator (Bengio et al.,
arXiv 1308.3432): forward is the rounded value, backward is the identity, and nothing is zeroed.
Written ``q.detach() + (x - x.detach())`` this is exact in every dtype: the bracket is exactly zero.
The more common ``x + (q - x).detach()`` rounds twice, and in bf16 it moves values off the grid.

All functions work on the last dimension. ``group_size`` values of it share a scale; 0 stands for
the whole row.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
import torch.compiler.config
from torch import Tensor

from qatc import spec as spec_module
from qatc.errors import ConfigError
from qatc.spec import QuantSpec, Range

MIN_WEIGHT_SCALE = 2.0**-17
"""The smallest weight scale: below it fp16, in which GGUF stores scales, loses precision."""


def compute_scale(x: Tensor, spec: QuantSpec, *, snap: bool = False) -> Tensor:
    """MinMax scale of every row or group of ``x``.

    Args:
        x: float tensor ``[..., K]``.
        spec: bits, range and group size; ``group_size`` must divide K.
        snap: round the scale to the nearest bf16 value (at least 2^-17), as weights need it: such a
            scale is exact in bf16, fp16 and fp32, so that every runtime stores the very scale
            that was trained with.

    Returns:
        fp32 tensor ``[..., K / group_size]`` (``[..., 1]`` for whole rows). A row of zeros has
        scale 1.
    """
    amax = _in_groups(x, spec.group_size or 0).float().abs().amax(dim=-1)
    scale = amax / spec.steps
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    return _round_to_bf16(scale).clamp(min=MIN_WEIGHT_SCALE) if snap else scale


def _round_to_bf16(scale: Tensor) -> Tensor:
    """The nearest bf16 values of positive fp32 numbers, ties to even, as fp32.

    Done on the bits, since Inductor leaves out a cast to bf16 and back.
    """
    bits = scale.view(torch.int32)
    odd = (bits >> 16) & 1
    return ((bits + 0x7FFF + odd) & -0x10000).view(torch.float32)


def quantize(x: Tensor, spec: QuantSpec, *, snap: bool = False) -> tuple[Tensor, Tensor]:
    """Codes and scales of ``x``.

    Returns:
        ``(codes, scale)``: int8 ``[..., K]`` and fp32 ``[..., K / group_size]``.
    """
    assert spec.quantizes, "16 bits have no codes"
    scale = compute_scale(x, spec, snap=snap)
    codes = _round_to_codes(_in_groups(x, spec.group_size or 0), scale.unsqueeze(-1), spec)
    return codes.flatten(-2).to(torch.int8), scale


def dequantize(codes: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """``code * scale``, computed in fp32 and rounded once to ``dtype``.

    Args:
        codes: integer tensor ``[..., K]``.
        scale: fp32 tensor ``[..., G]`` with G dividing K.
    """
    groups: Tensor = codes.unflatten(-1, (scale.shape[-1], -1)).float()
    return torch.flatten(groups * scale.unsqueeze(-1), -2).to(dtype)


def _in_groups(x: Tensor, group_size: int) -> Tensor:
    if group_size == 0:
        return x.unsqueeze(-2)
    width = x.shape[-1]
    if width % group_size:
        raise ConfigError(
            f"group_size {group_size} does not divide the {width} values of a row;"
            " choose a divisor, or null for one scale per row"
        )
    groups: Tensor = x.unflatten(-1, (width // group_size, group_size))
    return groups


def _round_to_codes(groups: Tensor, scale: Tensor, spec: QuantSpec) -> Tensor:
    codes = torch.round(groups.float() / scale)  # torch.round: half to even
    return codes.clamp(spec.code_min, spec.code_max)


def _tag_compiled_code() -> None:
    """Let the caches of ``torch.compile`` tell one version of the numerics from another.

    A compiled graph is found again on disk by its nodes, and a node names an op, not its body: a
    kernel of an older body would be served without a word.
    """
    bodies = ("embedding", "integer", "kernels", "kv_cache", "packing", "products")
    folder = Path(spec_module.__file__).parent
    sources = (Path(__file__), Path(spec_module.__file__), *(folder / f"{b}.py" for b in bodies))
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()
    config = torch.compiler.config
    config.cache_key_tag = f"{config.cache_key_tag}qatc-{digest[:16]};"


_tag_compiled_code()

_LIBRARY = torch.library.Library("qatc", "DEF")
_LIBRARY.define(
    "fake_quantize(Tensor x, int bits, *, int group_size=0, str range='restricted',"
    " bool snap_scale=False) -> Tensor"
)


def _fake_quantize(
    x: Tensor,
    bits: int,
    *,
    group_size: int = 0,
    range: Range = "restricted",
    snap_scale: bool = False,
) -> Tensor:
    spec = QuantSpec(bits, group_size or None, range)
    if not spec.quantizes:
        return x.clone()
    values = x.detach()
    groups = _in_groups(values, group_size)
    scale = compute_scale(values, spec, snap=snap_scale).unsqueeze(-1)
    quantized = (_round_to_codes(groups, scale, spec) * scale).flatten(-2).to(x.dtype)
    return quantized + (x - values)


_LIBRARY.impl("fake_quantize", _fake_quantize, "CompositeImplicitAutograd")

FAKE_QUANTIZE = torch.ops.qatc.fake_quantize.default
"""The op that the passes insert: ``(x, bits, *, group_size, range, snap_scale) -> x-like``."""


def fake_quantize(x: Tensor, spec: QuantSpec, *, snap_scale: bool = False) -> Tensor:
    """Quantize and dequantize ``x`` with a straight-through gradient.

    Args:
        x: float tensor ``[..., K]`` of any float dtype; the result has the same shape and dtype.
        spec: bits, range and group size; 16 bits returns ``x`` itself.
        snap_scale: round scales to bf16, as for weights (see :func:`compute_scale`).
    """
    if not spec.quantizes:
        return x
    result: Tensor = FAKE_QUANTIZE(x, spec.bits, **fake_quantize_kwargs(spec, snap_scale))
    return result


def fake_quantize_kwargs(spec: QuantSpec, snap_scale: bool) -> dict[str, int | str | bool]:
    """The keyword arguments of :data:`FAKE_QUANTIZE` for ``spec``."""
    return {"group_size": spec.group_size or 0, "range": spec.range, "snap_scale": snap_scale}

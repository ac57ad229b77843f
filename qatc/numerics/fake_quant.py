"""The one fake-quant op that training graphs hold.

``torch.ops.qatc.fake_quantize`` is what the passes insert. It is registered once, as a *composite*
op: a graph shows and serialises it as a single node, while Inductor sees through it and fuses the
row maximum, the rounding and whatever stands around them into one kernel.

Rounding has no useful gradient, so training uses the straight-through estimator (Bengio et al.,
arXiv 1308.3432): forward is the rounded value, backward is the identity, and nothing is zeroed.
Written ``q.detach() + (x - x.detach())`` this is exact in every dtype: the bracket is exactly zero.
The more common ``x + (q - x).detach()`` rounds twice, and in bf16 it moves values off the grid.
Where scales are trained, what they cut off gets no gradient: see :mod:`qatc.numerics.learned`.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
import torch.compiler.config
from torch import Tensor

from qatc.numerics import affine, asymmetric, learned, minmax
from qatc.recipe.spec import QuantSpec, read_spec_arg, spec_arg


def _tag_compiled_code(package: Path) -> None:
    """Let the caches of ``torch.compile`` tell one version of the numerics from another.

    A compiled graph is found again on disk by its nodes, and a node names an op, not its body: a
    kernel of an older body would be served without a word.
    """
    folders = ("recipe", "numerics", "kernels")
    sources = (path for folder in folders for path in sorted((package / folder).glob("*.py")))
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()
    config = torch.compiler.config
    config.cache_key_tag = f"{config.cache_key_tag}qatc-{digest[:16]};"


_tag_compiled_code(Path(__file__).parents[1])

_LIBRARY = torch.library.Library("qatc", "DEF")
_LIBRARY.define(
    "fake_quantize(Tensor x, str spec, *, bool snap_scale=False, Tensor? start=None,"
    " Tensor? gain=None) -> Tensor"
)


def _fake_quantize(
    x: Tensor,
    spec: str,
    *,
    snap_scale: bool = False,
    start: Tensor | None = None,
    gain: Tensor | None = None,
) -> Tensor:
    read = read_spec_arg(spec)
    if not read.quantizes:
        return x.clone()
    if read.asymmetric:
        return asymmetric.fake_quantize(x, read, gain)
    if read.affine:
        return affine.fake_quantize(x, read)
    values = x.detach()
    scale = minmax.compute_scale(values, read, snap=snap_scale) if start is None else start
    if gain is not None:
        scale = learned.learned_scale(scale, gain, read, snap=snap_scale)
        return learned.fake_quantize_by(x, scale, read)
    groups, scale = values.unflatten(-1, (scale.shape[-1], -1)), scale.unsqueeze(-1)
    quantized = (minmax.round_to_codes(groups, scale, read) * scale).flatten(-2).to(x.dtype)
    return quantized + (x - values)


_LIBRARY.impl("fake_quantize", _fake_quantize, "CompositeImplicitAutograd")

FAKE_QUANTIZE = torch.ops.qatc.fake_quantize.default
"""The op that the passes insert: ``(x, spec, *, snap_scale, start, gain) -> x-like``, with the spec
as :func:`qatc.recipe.spec.spec_arg` writes it. ``start`` is a fixed scale in the place of the
MinMax one, ``gain`` what is trained of it, see :mod:`qatc.numerics.learned`."""


def fake_quantize(
    x: Tensor,
    spec: QuantSpec,
    *,
    snap_scale: bool = False,
    start: Tensor | None = None,
    gain: Tensor | None = None,
) -> Tensor:
    """Quantize and dequantize ``x`` with a straight-through gradient.

    Args:
        x: float tensor ``[..., K]`` of any float dtype; the result has the same shape and dtype.
        spec: bits, range and group size; 16 bits returns ``x`` itself.
        snap_scale: round scales as those of weights are (see :func:`minmax.compute_scale`).
        start: fp32 ``[..., G]``, scales to be taken in the place of MinMax ones.
        gain: fp32, broadcast to the scales: what training has added to them, relative to them.
    """
    if not spec.quantizes:
        return x
    result: Tensor = FAKE_QUANTIZE(x, spec_arg(spec), snap_scale=snap_scale, start=start, gain=gain)
    return result

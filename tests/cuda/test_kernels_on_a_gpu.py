"""The Triton kernels on a GPU: against integers and fp64, by the table and compiled."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from qatc.kernels import cached_attention
from qatc.kernels.gpu import launch, products
from qatc.kernels.gpu.attention import choose_split, code_attention
from qatc.kernels.integer_linear import scale_sums
from qatc.kernels.packed_linear import PACKED_LINEAR
from qatc.kernels.site import PHASES, Site
from qatc.kernels.table import choose
from qatc.numerics import minmax
from qatc.numerics.packing import pack
from qatc.recipe.spec import QuantSpec, spec_arg

pytestmark = pytest.mark.skipif(
    launch.obstacle("cuda") is not None, reason=str(launch.obstacle("cuda"))
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def codes(rows: int, outputs: int, width: int, bits: int) -> Any:
    """Codes of x and of a weight, with the largest sum among them, and their scales."""
    half = 1 << (bits - 1)
    x = torch.randint(-128, 128, (rows, width), dtype=torch.int8)
    weight = torch.randint(-half, half, (outputs, width), dtype=torch.int8)
    x[0], weight[0] = -128, -half
    return x, weight, torch.rand(rows, 1), torch.rand(outputs, 1) - 0.5


ROWS = (1, 2, 3, 4, 15, 16, 17, 33, 65, 300)


@pytest.mark.parametrize(
    ("rows", "bits"),
    [
        *((rows, bits) for rows in ROWS for bits in (4, 8)),
        *((rows, bits) for rows in (1, 3, 16, 70, 300) for bits in (2, 3, 5, 6, 7)),
    ],
)
def test_products_are_exact(rows: int, bits: int) -> None:
    """Each with another dtype: every new combination is compiled."""
    torch.manual_seed(rows)
    sizes = ((37, 96), (129, 1504), (256, 11008)) if bits in (4, 8) else ((129, 1504),)
    for (outputs, width), dtype in zip(sizes, DTYPES, strict=False):
        x, weight, x_scale, scale = codes(rows, outputs, width, bits)
        sums = (x.double() @ weight.double().T).int()
        bias = None if dtype is torch.float16 else torch.randn(outputs).to(dtype)
        wanted = scale_sums(sums, x_scale, scale, bias, dtype)
        parts = (x, x_scale, pack(weight, bits), scale, bias)
        moved = [None if part is None else part.cuda() for part in parts]
        got = products.TRITON_LINEAR(*moved, bits, dtype)
        assert torch.equal(got.cpu(), wanted), (outputs, width, dtype)


@pytest.mark.parametrize("bits", (4, 8))
@pytest.mark.parametrize("rows", (1, 3, 4, 40))
def test_one_launch_for_several_weights_and_a_sum(rows: int, bits: int) -> None:
    torch.manual_seed(rows)
    x, weight, x_scale, scale = (t.cuda() for t in codes(rows, 4096 + 520 + 512, 1504, bits))
    cut = (4096, 520, 512)
    packed, scales = pack(weight, bits).split(cut), scale.split(cut)
    for dtype in DTYPES:
        parts = (x, x_scale, packed, scales, [None] * 3, bits, dtype)
        each = zip(packed, scales, strict=True)
        wanted = [products.TRITON_LINEAR(x, x_scale, *one, None, bits, dtype) for one in each]
        for got, one in zip(products.TRITON_LINEARS(*parts), wanted, strict=True):
            assert torch.equal(got, one), dtype
        added = torch.randn_like(wanted[0])
        single = (x, x_scale, packed[0], scales[0], None, bits, dtype, added)
        assert torch.equal(products.TRITON_LINEAR(*single), wanted[0] + added), dtype


@pytest.mark.parametrize("rows", (1, 16, 128))
def test_every_candidate_of_the_tuning_is_exact(rows: int) -> None:
    from benchmarks.cuda_tiles import candidates

    torch.manual_seed(0)
    x, weight, x_scale, scale = codes(rows, 256, 4096, 4)
    sums = (x.double() @ weight.double().T).int()
    wanted = scale_sums(sums, x_scale, scale, None, torch.bfloat16)
    x, packed, x_scale, scale = (t.cuda() for t in (x, pack(weight, 4), x_scale, scale))
    for tile in candidates(rows, 4096):
        parts = (x, x_scale, packed, scale, None, 4, torch.bfloat16)
        assert torch.equal(products.triton_linear(*parts, tile=tile).cpu(), wanted), tile


@pytest.mark.parametrize("bits", (4, 8))
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((1, 1, 1024), torch.float32),
        ((3, 1, 1024), torch.bfloat16),
        ((16, 1, 1024), torch.float16),
        ((2, 70, 1024), torch.bfloat16),
    ],
)
def test_through_the_table_and_compiled(
    shape: tuple[int, ...], dtype: torch.dtype, bits: int
) -> None:
    """Bit for bit what the kernels of the table compute on a CPU."""
    torch.manual_seed(0)
    site = Site(QuantSpec(bits), QuantSpec(8), 768, shape[-1], "cuda")
    names = {phase: choose(site, phase).kernel.name for phase in PHASES}
    assert set(names.values()) == {"Triton product"}
    weight, scale = minmax.quantize(torch.randn(768, shape[-1]), site.weights, snap=True)
    specs = (site.inputs, spec_arg(site.activations), spec_arg(site.weights))
    x, bias = torch.randn(shape).to(dtype), torch.randn(768).to(dtype)
    parts = (x, pack(weight, bits), scale, bias)
    on_cpu = dataclasses.replace(site, device="cpu")
    other = {phase: choose(on_cpu, phase).kernel.name for phase in PHASES}
    wanted = PACKED_LINEAR(*parts, *specs, **other)

    def linear(*tensors: Any) -> Any:
        return PACKED_LINEAR(*tensors, *specs, **names)

    moved = [part.cuda() for part in parts]
    options: Any = dict(minmax.COMPILE_OPTIONS)
    for run in (linear, torch.compile(linear, dynamic=False, options=options)):
        assert torch.equal(run(*moved).cpu(), wanted), (dtype, run)


@pytest.mark.parametrize(
    ("sizes", "key_bits", "value_bits", "masked", "tiles"),
    [
        ((32, 32, 128, 128), 4, 4, False, False),
        ((32, 32, 128, 128), 8, 8, True, False),
        ((32, 8, 128, 128), 4, 4, False, False),
        ((32, 8, 128, 128), 4, 4, False, True),
        ((32, 8, 128, 128), 8, 4, False, False),
        ((32, 8, 128, 128), 8, 4, False, True),
        ((9, 3, 64, 80), 4, 8, True, False),
        ((9, 3, 64, 80), 4, 8, True, True),
        ((40, 2, 64, 64), 8, 8, True, True),
    ],
)
def test_attention(
    sizes: tuple[int, ...], key_bits: int, value_bits: int, masked: bool, tiles: bool
) -> None:
    torch.manual_seed(0)
    heads, groups, width, deep = sizes
    for slots, last in ((64, (0, 63)), (1000, (999, 17)), (4096, (4095, 2000)), (9000, (8999, 1))):
        positions = torch.tensor(last).unsqueeze(1)
        query, split = torch.randn(2, heads, 1, width), None
        if tiles:
            query = query.bfloat16().float()
            split = choose_split(slots, heads // groups, deep, tiles)
        held: Any = []
        values: list[Any] = []
        for bits, size in ((key_bits, width), (value_bits, deep)):
            numbers, scale = minmax.quantize(torch.randn(2, groups, slots, size), QuantSpec(bits))
            values.append((numbers * scale.double()).repeat_interleave(heads // groups, 1))
            held += [pack(numbers, bits), scale]
        mask = torch.rand(2, 1, 1, slots) < 0.7 if masked else None
        every = torch.arange(slots)
        seen = every <= positions
        if mask is not None:
            seen = (seen & mask[:, 0, 0]) | (every == positions)
        scores = (query.double() @ values[0].mT).squeeze(2) * width**-0.5
        weights = scores.masked_fill(~seen.unsqueeze(1), -torch.inf).softmax(-1)
        wanted = weights.unsqueeze(2) @ values[1]
        moved: Any = [t if t is None else t.cuda() for t in (query, *held, positions, mask)]
        got = code_attention(*(*moved, key_bits, value_bits, width**-0.5, split))
        assert (got.cpu() - wanted).abs().max() < 1e-5, (slots, last)
        if tiles:
            moved[0] = moved[0].bfloat16()
            in_bf16 = code_attention(*(*moved, key_bits, value_bits, width**-0.5))
            assert torch.equal(in_bf16, got.bfloat16()), (slots, last)


@pytest.mark.parametrize("bits", (4, 8))
def test_decoding_with_a_cache_goes_to_the_kernel(bits: int) -> None:
    """Compiled, with views of a larger cache, as a lowered layer calls it."""
    torch.manual_seed(0)
    spec, slots = QuantSpec(bits), 256
    (bytes_, kind), _ = cached_attention.cache_shapes(spec, 128)
    caches = [
        tensor
        for _ in range(2)
        for tensor in (
            torch.randint(0, 100, (2, 8, slots + 64, bytes_)).to(kind),
            torch.rand(2, 8, slots + 64, 1),
        )
    ]
    new = [torch.randn(2, heads, 1, 128, dtype=torch.bfloat16) for heads in (32, 8, 8)]
    positions = torch.tensor([[200], [7]])
    names: Any = {"spec": spec_arg(spec), "value_spec": spec_arg(spec)}

    def attend(*tensors: Any) -> Any:
        return cached_attention.quantized_attention(*tensors, **names)

    def run(function: Any, device: str) -> Any:
        held = [tensor.clone().to(device) for tensor in caches]
        views = cached_attention.first_slots(held, slots)
        out = function(*(t.to(device) for t in new), *views, positions.to(device))
        return out.cpu().float(), [tensor.cpu() for tensor in held]

    wanted, wanted_caches = run(attend, "cpu")
    options: Any = dict(minmax.COMPILE_OPTIONS)
    for function in (attend, torch.compile(attend, options=options)):
        got, got_caches = run(function, "cuda")
        assert (got - wanted).abs().max() <= 2**-7 * wanted.abs().max()
        for one, other in zip(got_caches, wanted_caches, strict=True):
            assert torch.equal(one, other)


def test_a_graph_of_cuda_can_be_captured() -> None:
    """No kernel waits for the GPU, or reads what is on it, to be started."""
    x, weight, x_scale, scale = (t.cuda() for t in codes(1, 256, 512, 4))
    packed = pack(weight, 4)
    parts = (x, x_scale, packed, scale, None, 4, torch.bfloat16)
    query = torch.randn(1, 8, 1, 64, device="cuda")
    numbers, scales = minmax.quantize(torch.randn(1, 2, 128, 64, device="cuda"), QuantSpec(4))
    held: Any = (pack(numbers, 4), scales) * 2
    positions = torch.tensor([[5]], device="cuda")

    def both() -> Any:
        out = code_attention(*(query, *held, positions, None, 4, 4, 0.125))
        return products.TRITON_LINEAR(*parts), out

    wanted = [t.clone() for t in both()]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = both()
    for tensor in got:
        tensor.zero_()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))

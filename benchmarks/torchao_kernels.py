"""What torchao offers for quantized linears on a CPU: is it there, is it exact, how fast is it?

    python -m benchmarks.torchao_kernels --threads 2

Products take codes and scales that are given. Their results are compared, bit for bit, with
``float32(sum) * scale of the row * scale of the channel``, the sum in fp64 and one rounding, at 1,
2, 15, 16, 17 and 512 rows, with random and extreme codes. Times are those of SmolLM2-135M's
weights; the candidates take turns, and the figure is the median.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks import common, variants
from benchmarks.kernels import SHAPES
from qatc.kernels import integer_linear, products
from qatc.numerics import packing

ROWS = (1, 2, 15, 16, 17, 512)
SIZES = ((7, 64), (48, 576), (192, 1536), (33, 577), (16, 16384))
"""Weights ``[N, K]`` that are compared with fp64."""

OPS = (
    "da8w4_linear_cpu", "da8w4_linear_prepack_cpu", "qscaled_dot_product", "float8_linear_cpu",
    "float8_linear_prepack_cpu", "_scaled_embedding_bag", "_linear_8bit_act_4bit_weight",
    "scaled_int8_mm",
)  # fmt: skip

Candidate = Callable[[Tensor, Tensor, Tensor, Tensor, torch.dtype], Tensor]
"""``(codes of x [M, K], of the weight [N, K], scale [M, 1], scale [N, 1], dtype) -> [M, N]``."""


def main() -> None:
    """Run the benchmark and write its result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    with torch.inference_mode():
        found = {
            "threads": torch.get_num_threads(),
            "kernels_for_a_cpu": {name: has_kernel(name) for name in OPS},
            "exactness": [*(compare(name) for name in candidates()), int8_tensor()],
            "activation_rule": rule(),
            "milliseconds": [
                times(shape, rows, options.rounds)
                for shape in SHAPES["smollm2"]
                for rows in (1, 16, 512)
            ],
        }
    common.save("torchao-kernels-cpu", found)


def has_kernel(name: str) -> bool | None:
    """Whether an op of torchao has a kernel for a CPU; None if it does not exist."""
    import torchao  # noqa: F401

    try:
        return bool(torch._C._dispatch_has_kernel_for_dispatch_key(f"torchao::{name}", "CPU"))
    except RuntimeError:
        return None


def candidates() -> dict[str, tuple[Candidate, int]]:
    """What multiplies codes, and the bits of the weights that it takes."""
    from torchao.quantization import int_scaled_matmul

    def scaled(a: Tensor, b: Tensor, x: Tensor, w: Tensor, dtype: torch.dtype) -> Tensor:
        product: Tensor = int_scaled_matmul(a, b.t(), x) * w.t()
        return product.to(dtype)

    def int_mm(a: Tensor, b: Tensor, x: Tensor, w: Tensor, dtype: torch.dtype) -> Tensor:
        return (torch._int_mm(a, b.t()).float() * x * w.t()).to(dtype)

    def own(a: Tensor, b: Tensor, x: Tensor, w: Tensor, dtype: torch.dtype) -> Tensor:
        return integer_linear.scale_sums(integer_linear.int_mm(a, b), x, w, None, dtype)

    def int4pack(width: torch.dtype) -> Candidate:
        def run(a: Tensor, b: Tensor, x: Tensor, w: Tensor, dtype: torch.dtype) -> Tensor:
            codes = torch.ops.aten._convert_weight_to_int4pack_for_cpu(b.int() + 8, 1)
            group = next(g for g in (64, 32) if a.shape[1] % g == 0)
            ones = torch.zeros(a.shape[1] // group, b.shape[0], 2, dtype=width)
            ones[..., 0] = 1
            sums = torch.ops.aten._weight_int4pack_mm_for_cpu(a.to(width), codes, group, ones)
            product: Tensor = sums.float() * x * w.t()
            return product.to(dtype)

        return run

    return {
        "torchao int_scaled_matmul": (scaled, 8),
        "torch _int_mm": (int_mm, 8),
        "torch _weight_int4pack_mm_for_cpu in fp32": (int4pack(torch.float32), 4),
        "torch _weight_int4pack_mm_for_cpu in bf16": (int4pack(torch.bfloat16), 4),
        "qatc int_mm": (own, 8),
    }


def int8_tensor() -> dict[str, Any]:
    """A linear with torchao's tensor as its weight, against the codes of its input."""
    from torch.nn.functional import linear
    from torchao.quantization import Int8Tensor, MappingType, PerRow
    from torchao.quantization.quantize_.workflows.int8.int8_tensor import QuantizeTensorToInt8Kwargs

    found: dict[str, Any] = {"name": "torchao Int8Tensor as a linear's weight, uncompiled"}
    generator = torch.Generator().manual_seed(0)
    b = torch.randint(-128, 128, (192, 576), generator=generator, dtype=torch.int8)
    w = (torch.rand(192, 1, generator=generator) + 0.01).bfloat16().float()
    rounding = QuantizeTensorToInt8Kwargs(granularity=PerRow(), mapping_type=MappingType.SYMMETRIC)
    for dtype in (torch.float32, torch.bfloat16):
        weight: Any = Int8Tensor(b, w, [1, 576], dtype, act_quant_kwargs=rounding)
        wrong = total = 0
        for rows in ROWS:
            x = torch.randn(rows, 576, generator=generator).to(dtype)
            own: Any = Int8Tensor.from_hp(x, granularity=PerRow())
            sums = (own.qdata.double() @ b.double().t()).float()
            wanted = (sums * own.scale.view(-1, 1).float() * w.t()).to(dtype)
            wrong += int((linear(x, weight) != wanted).sum())
            total += wanted.numel()
        found[str(dtype).removeprefix("torch.")] = {"differ": wrong, "of": total, "refused": []}
    print(found, flush=True)
    return found


def compare(name: str) -> dict[str, Any]:
    """Results that are not those of fp64 and one rounding, of all."""
    run, bits = candidates()[name]
    found: dict[str, Any] = {"name": name, "weight_bits": bits}
    for dtype in (torch.float32, torch.bfloat16):
        wrong = total = 0
        refused: list[str] = []
        for shape in SIZES:
            for rows in ROWS:
                for kind in ("random", "least", "greatest"):
                    try:
                        differ = differences(run, bits, shape, rows, kind, dtype)
                    except (RuntimeError, StopIteration) as error:
                        refused.append(f"{shape}: {type(error).__name__}")
                        continue
                    wrong, total = wrong + int(differ.sum()), total + differ.numel()
        key = str(dtype).removeprefix("torch.")
        found[key] = {"differ": wrong, "of": total, "refused": sorted(set(refused))}
    print(found, flush=True)
    return found


def differences(
    run: Candidate, bits: int, shape: tuple[int, int], rows: int, kind: str, dtype: torch.dtype
) -> Tensor:
    """Which results are not exact."""
    generator = torch.Generator().manual_seed(rows)
    least = -(2 ** (bits - 1))

    def draw(count: int, low: int) -> Tensor:
        if kind == "random":
            return torch.randint(
                low, -low, (count, shape[1]), generator=generator, dtype=torch.int8
            )
        return torch.full((count, shape[1]), low if kind == "least" else -low - 1).to(torch.int8)

    a, b = draw(rows, -128), draw(shape[0], least)
    x = torch.rand(rows, 1, generator=generator) + 0.01
    w = (torch.rand(shape[0], 1, generator=generator) + 0.01).bfloat16().float()
    sums = (a.double() @ b.double().t()).float()
    return run(a, b, x, w, dtype) != (sums * x * w.t()).to(dtype)


def rule() -> dict[str, Any]:
    """Codes of torchao's activations that are not those of two targets, of all."""
    from torchao.quantization import Int8Tensor, PerRow

    from qatc.numerics.minmax import quantize
    from qatc.recipe.recipe import Recipe

    x = torch.randn(20_000, 576, generator=torch.Generator().manual_seed(0))
    found: dict[str, Any] = {}
    for name, values in (("fp32", x), ("bf16, uncompiled", x.bfloat16())):
        own: Any = Int8Tensor.from_hp(values, granularity=PerRow())
        found[name] = {"codes": values.numel()}
        for target in ("torchao", "transformers"):
            spec = Recipe.from_bits("8-8-16", target=target).activations
            codes, _ = quantize(values, spec)
            found[name][f"other than --target {target}"] = int((codes != own.qdata).sum())
    print(found, flush=True)
    return found


def times(shape: tuple[int, int], rows: int, rounds: int) -> dict[str, Any]:
    """Median time of a product of codes, without the quantization of its input."""
    outputs, width = shape
    a = torch.randint(-128, 128, (rows, width), dtype=torch.int8)
    b = torch.randint(-8, 8, (outputs, width), dtype=torch.int8)
    x, w = torch.rand(rows, 1), torch.rand(outputs, 1)
    packed = packing.pack(b, 4)
    steps: dict[str, Callable[[], Any]] = {
        name: lambda run=run: run(a, b, x, w, torch.float32)  # type: ignore[misc]
        for name, (run, _) in candidates().items()
        if "int4pack" not in name
    }
    steps["qatc, 8 bits"] = lambda: products.packed_mm(a, b, 8).float() * x * w.t()
    steps["qatc, 4 bits packed"] = lambda: products.packed_mm(a, packed, 4).float() * x * w.t()
    codes = torch.ops.aten._convert_weight_to_int4pack_for_cpu(b.int() + 8, 1)
    ones = torch.zeros(width // 64, outputs, 2)
    ones[..., 0] = 1
    four = torch.ops.aten._weight_int4pack_mm_for_cpu
    if rows == 1:  # a loop over scalars: minutes at 512 rows
        steps["torch _weight_int4pack_mm_for_cpu in fp32"] = lambda: (
            four(a.float(), codes, 64, ones) * x * w.t()
        )
    medians = variants.medians(variants.take_turns(steps, rounds, 5, "cpu"))
    found = {name: round(1e3 * seconds, 4) for name, seconds in medians.items()}
    print(shape, rows, found, flush=True)
    return {"shape": shape, "rows": rows, **found}


if __name__ == "__main__":
    main()

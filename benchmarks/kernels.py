"""Every kernel of the table against its alternatives, at real LLaMA shapes.

    python -m benchmarks.kernels --threads 2
    python -m benchmarks.kernels --threads 2 --shapes smollm2 --rows 1 16 512

Each kernel that can run at a site is timed there, compiled as it runs in a model, next to what
else could have been used: a bf16 linear, and torch's own int4 kernel for CPUs, with what it is off
by. The kernels take turns, round by round; the figure is the median, in microseconds. Every call
reads another copy of the weight, so that it comes from memory, as in a model, and not from a cache.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from benchmarks import common, variants
from qatc.kernels import table
from qatc.kernels.site import Phase, Site
from qatc.numerics import minmax, packing
from qatc.recipe.spec import QuantSpec

BEYOND_CACHES = 256 * 2**20
"""Bytes of weights that are read before one is read again."""

SHAPES = {
    "llama": ((768, 768), (2048, 768), (2048, 2048), (4096, 4096), (11008, 4096)),
    "smollm2": ((576, 576), (192, 576), (1536, 576), (576, 1536)),
}
"""Weights ``[N, K]`` of LLaMAs of 110M to 7B, and of SmolLM2-135M."""


def main() -> None:
    """Run the benchmark and write its result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 512])
    parser.add_argument(
        "--case", nargs="+", default=["8-8", "4-8", "3-8", "2-8", "8-16", "4-16", "4-8-64"],
        help="bits of weights, bits of activations and, if there are any, inputs per group",
    )  # fmt: skip
    parser.add_argument("--shapes", choices=SHAPES, default="llama")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    runs = [
        measure(*(int(part) for part in case.split("-")), shape=shape, rows=rows, options=options)
        for case in options.case
        for shape in SHAPES[options.shapes]
        for rows in options.rows
    ]
    which = "" if options.shapes == "llama" else f"-{options.shapes}"
    found = {"threads": torch.get_num_threads(), "runs": runs}
    common.save(f"kernels{which}-{options.device}", found)


@torch.inference_mode()
def measure(
    bits: int,
    activation_bits: int,
    group: int | None = None,
    *,
    shape: tuple[int, int],
    rows: int,
    options: argparse.Namespace,
) -> dict[str, Any]:
    """Microseconds of all that can compute a linear, and the largest error of each."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    outputs, inputs = shape
    device = options.device
    phase: Phase = "decode" if rows <= 8 else "prefill"
    specs = QuantSpec(bits, group), QuantSpec(activation_bits)
    site = Site(*specs, outputs, inputs, device)
    weight = torch.randn(shape, device=device) * inputs**-0.5
    codes, scale = minmax.quantize(weight, site.weights, snap=True)
    packed = packing.pack(codes, bits)
    sizes = (rows, 1, inputs) if phase == "decode" else (1, rows, inputs)
    x = torch.randn(sizes, device=device)
    values = x.flatten(0, 1).double()
    if site.activations.quantizes:
        x_codes, x_scale = minmax.quantize(x.flatten(0, 1), site.activations)
        values = x_codes.double() * x_scale
    groups = scale.double().repeat_interleave(inputs // scale.shape[1], 1)
    exact = values @ (codes.double() * groups).t()
    steps: dict[str, Callable[[], Any]] = {}
    for kernel in table.KERNELS:
        if phase in kernel.phases and kernel.obstacle(site) is None:
            steps[kernel.name] = over_copies(compiled(kernel, x, scale, site), packed)
    steps["bf16 linear"] = over_copies(lambda w: F.linear(x.bfloat16(), w), weight.bfloat16())
    if specs == (QuantSpec(4), QuantSpec(8)) and device == "cpu" and outputs % 16 == 0:
        steps["_weight_int4pack_mm_for_cpu"] = int4pack(x, codes, scale, site)
    for step in steps.values():
        step()
    times = variants.medians(variants.take_turns(steps, options.rounds, 3, device))
    chosen = table.choose(site, phase).kernel.name
    largest = exact.abs().max()
    errors = {
        name: float((step().flatten(0, 1) - exact).abs().max() / largest)
        for name, step in steps.items()
        if name != "bf16 linear"
    }
    microseconds = {name: round(1e6 * seconds, 1) for name, seconds in times.items()}
    print(bits, activation_bits, group, shape, rows, chosen, microseconds, flush=True)
    return {
        "weight_bits": bits,
        "activation_bits": activation_bits,
        "group": group,
        "shape": shape,
        "rows": rows,
        "phase": phase,
        "chosen": chosen,
        "microseconds": microseconds,
        "largest_error": errors,
    }


def over_copies(run: Callable[[Any], Any], weight: Any) -> Callable[[], Any]:
    """Call ``run`` on one copy of the weight after the other."""
    copies = itertools.cycle(
        [weight.clone() for _ in range(max(2, BEYOND_CACHES // weight.nbytes))]
    )
    return lambda: run(next(copies))


def compiled(kernel: table.Kernel, x: Any, scale: Any, site: Site) -> Callable[[Any], Any]:
    """A kernel as it runs in a compiled layer."""
    product = kernel.run
    assert product is not None, f"{kernel.name} runs in no layer by itself"
    run = torch.compile(lambda x, packed, scale: product(x, packed, scale, None, site))
    return lambda packed: run(x, packed, scale)


def int4pack(x: Any, codes: Any, scale: Any, site: Site) -> Callable[[], Any]:
    """torch's int4 kernel, fed raw codes with unit scales so that its products are exact."""
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int() + 8, 2)
    group = next(g for g in (256, 128, 64, 32) if site.inputs % g == 0)
    ones = torch.zeros(site.inputs // group, site.outputs, 2, dtype=torch.bfloat16)
    ones[..., 0] = 1

    def run(x: Any, packed: Any) -> Any:
        x_codes, x_scale = minmax.quantize(x.flatten(0, -2), site.activations)
        sums = torch.ops.aten._weight_int4pack_mm_for_cpu(x_codes.bfloat16(), packed, group, ones)
        return (sums.float() * x_scale * scale.t()).view(*x.shape[:-1], site.outputs)

    step = torch.compile(run)
    return over_copies(lambda packed: step(x, packed), packed)


if __name__ == "__main__":
    main()

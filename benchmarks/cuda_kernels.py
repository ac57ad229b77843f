"""Every Triton kernel compiled for GPUs that need not be there: registers and instructions.

    python -m benchmarks.cuda_kernels

It needs Triton (``pip install '.[cuda-tests]'``), whose wheel has NVIDIA's assembler, and no GPU.
"""

from __future__ import annotations

import collections
import functools
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import common
from qatc.kernels.gpu import attention, products
from qatc.recipe.spec import QuantSpec

CAPABILITIES = (80, 90)
"""An A100's and an H100's."""

WIDTH, OUTPUTS = 4096, 11008
"""Of the products: LLaMA-7B's gate_proj."""

HEAD, SLOTS = 128, 4096

STRIDES = [
    f"{of}{over}{what}" for of in "kv" for what in ("", "_scale") for over in ("b", "h", "s")
]
"""Of codes and scales of keys, and of values, over rows, heads and slots."""

DIVISIBLE = [["tt.divisibility", 16]]


@dataclass(frozen=True)
class Case:
    """One kernel, with the constants that it is compiled for.

    Attributes:
        name: what it is.
        module, kernel: where it is, in ``qatc.kernels.gpu``.
        types: of its arguments, in order.
        constants: those arguments that are compiled in.
        options: of the compiler.
        odd: arguments that are no multiples of 16.
    """

    name: str
    module: str
    kernel: str
    types: dict[str, str]
    constants: dict[str, Any]
    options: dict[str, Any]
    odd: tuple[str, ...] = ()


@dataclass(frozen=True)
class Compiled:
    """What came out.

    Attributes:
        registers: of a thread.
        shared: bytes of a program.
        spilled: instructions that write registers to memory and read them back.
        instructions: how many of each, by the first part of its name.
        ptx: the assembly that the instructions were made from.
    """

    registers: int
    shared: int
    spilled: int
    instructions: dict[str, int]
    ptx: str


def cases() -> list[Case]:
    """All kernels, with what they are started with at a LLaMA-7B's shapes."""
    found = [_product(bits, rows) for bits in (4, 8) for rows in (1, 3, 16, 32, 64, 256, 2048)]
    found += [_product(3, rows) for rows in (1, 16, 2048)]
    found += [_product(bits, rows, 3) for bits in (4, 8) for rows in (1, 16)]
    for key_bits, value_bits in ((4, 4), (8, 8), (8, 4)):
        found += [_attention(key_bits, value_bits, shared) for shared in (1, 4)]
    found += [_attention(*bits, 4, tiles=True) for bits in ((4, 4), (8, 8))]
    found += [_store(*bits) for bits in ((4, 4), (8, 4))]
    constants = {"V_WIDTH": HEAD, "BLOCK": HEAD, "AT_ONCE": attention.JOINED_AT_ONCE}
    types = {"sums": "*fp32", "tops": "*fp32", "totals": "*fp32", "out": "*bf16", "splits": "i32"}
    found.append(
        Case("join", "attention_kernels", "join", types, constants, {"num_warps": 4}, ("splits",))
    )
    return found


def _product(bits: int, rows: int, count: int = 1) -> Case:
    tile = products.choose_tile(rows, OUTPUTS * count, WIDTH, bits)
    adds = count == 1 and rows <= products.MOST_ADDED_TO
    constants = products.kernel_arguments(bits, WIDTH, True, rows, count, adds)
    options = {"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": False}
    few = rows <= products.MOST_GEMV_ROWS
    held = "*i32" if few else "*i8" if bits == 8 else "*u8"
    types = {"x": "*i32" if few else "*i8", "x_scale": "*fp32"}
    types |= {"unit": "i32"} if few else {"rows": "i32", "unit": "i32"}
    for i in range(products.MOST_JOINED):
        types |= {f"w{i}": held, f"scale{i}": "*fp32", f"bias{i}": "*bf16", f"out{i}": "*bf16"}
        types |= {f"outputs{i}": "i32"}
    types |= {"added": "*bf16"}
    constants |= {"BLOCK_N": tile.outputs, "BLOCK_W" if few else "BLOCK_B": tile.step}
    constants |= {} if few else {"BLOCK_M": tile.rows}
    name = f"W{bits}A8 {'gemv' if few else 'gemm'}, {rows} row{'s' if rows > 1 else ''}"
    name += f", {count} weights" if count > 1 else ""
    kernel = "gemv" if few else "gemm"
    return Case(name, "product_kernels", kernel, types, constants, options, ("rows",))


def _attention(key_bits: int, value_bits: int, shared: int, tiles: bool = False) -> Case:
    split = attention.choose_split(SLOTS, shared, HEAD, tiles)
    held = {4: "*u8", 8: "*i8"}
    types = {"query": "*bf16", "key_codes": held[key_bits], "key_scale": "*fp32"}
    types |= {"value_codes": held[value_bits], "value_scale": "*fp32", "positions": "*i64"}
    types |= {"mask": "*u8", "sums": "*fp32", "tops": "*fp32", "totals": "*fp32"}
    types |= dict.fromkeys(("groups", "shared", "slots", "split", *STRIDES, "mask_row"), "i32")
    constants = {
        "K_BITS": key_bits, "V_BITS": value_bits, "K_WIDTH": HEAD, "V_WIDTH": HEAD,
        "HEADS": split.heads, "BLOCK_S": split.at_once, "HAS_MASK": False,
        "BLOCK_K": HEAD * key_bits // 8, "BLOCK_V": HEAD * value_bits // 8,
        "ks_scale": 1, "vs_scale": 1,
    }  # fmt: skip
    types = {name: kind for name, kind in types.items() if name not in constants}
    types["factor"] = "fp32"
    name = f"attention, K {key_bits} and V {value_bits} bits, {shared} query heads to a key's"
    odd = ("groups", "shared", "mask_row", "factor")
    name += ", in tiles" if tiles else ""
    kernel = "attend_in_tiles" if tiles else "attend"
    options = {"num_warps": split.warps}
    return Case(name, "attention_kernels", kernel, types, constants, options, odd)


def _store(key_bits: int, value_bits: int) -> Case:
    held = {4: "*u8", 8: "*i8"}
    types = {"key": "*bf16", "value": "*bf16"}
    types |= {"key_codes": held[key_bits], "key_scale": "*fp32"}
    types |= {"value_codes": held[value_bits], "value_scale": "*fp32", "positions": "*i64"}
    types |= dict.fromkeys(("groups", "slots", *STRIDES), "i32")
    specs = QuantSpec(key_bits), QuantSpec(value_bits)
    constants = attention.store_constants(*specs, (HEAD, HEAD), torch.bfloat16)
    constants |= {"ks_scale": 1, "vs_scale": 1}
    types = {name: kind for name, kind in types.items() if name not in constants}
    name = f"write of a token, K {key_bits} and V {value_bits} bits"
    options = {"num_warps": 1, "enable_fp_fusion": False}
    return Case(name, "attention_kernels", "store", types, constants, options, ("groups", "slots"))


@functools.cache
def compile_case(name: str, capability: int) -> Compiled:
    """The case of that name, for a compute capability times ten."""
    import importlib

    from triton import compile as compile_source
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    case = next(case for case in cases() if case.name == name)
    module = importlib.import_module(f"qatc.kernels.gpu.{case.module}")
    kernel = getattr(module, case.kernel)
    order = kernel.arg_names
    types = case.types | dict.fromkeys(case.constants, "constexpr")
    even = [n for n, kind in case.types.items() if n not in case.odd]
    source = ASTSource(
        kernel,
        signature={name: types[name] for name in order},
        constexprs=case.constants,
        attrs={(order.index(name),): DIVISIBLE for name in even},
    )
    target = GPUTarget("cuda", capability, 32)
    done = compile_source(source, target=target, options=case.options)
    usage, code = (_dumped(done.asm["cubin"], flag) for flag in ("-res-usage", "-sass"))
    registers, stack = (int(re.findall(rf"{what}:(\d+)", usage)[0]) for what in ("REG", "STACK"))
    line = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)")
    counts = collections.Counter(line.findall(code))
    spilled = counts["LDL"] + counts["STL"]
    assert bool(stack) <= bool(spilled), "a stack is used by spilled registers alone"
    return Compiled(registers, done.metadata.shared, spilled, dict(counts), done.asm["ptx"])


def _dumped(cubin: bytes, flag: str) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), flag, file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


COUNTED = {"dp4a": "IDP", "mma.s8": "IMMA", "wgmma.s8": "IGMMA", "fma": "FFMA"}


def main() -> None:
    """Compile everything and write the result."""
    import triton

    rows = []
    for case in cases():
        for capability in CAPABILITIES:
            got = compile_case(case.name, capability)
            row = {"kernel": case.name, "capability": capability / 10, "warps": None} | {
                "warps": case.options["num_warps"],
                "registers": got.registers,
                "spilled": got.spilled,
                "shared_bytes": got.shared,
                "instructions": sum(got.instructions.values()),
                **{title: got.instructions.get(name, 0) for title, name in COUNTED.items()},
            }
            rows.append(row)
            print(*row.values(), flush=True)
    common.save("cuda-kernels", {"triton": triton.__version__, "kernels": rows})


if __name__ == "__main__":
    main()

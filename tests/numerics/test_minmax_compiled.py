"""The fake-quantization op in exported programs and compiled code."""

from __future__ import annotations

import io
import itertools
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code

import qatc
from qatc.models.preparation import can_compile
from qatc.numerics import minmax
from qatc.numerics.fake_quant import fake_quantize
from qatc.recipe.spec import QuantSpec


class TwoLinears(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, width)
        self.down = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        for linear in (self.up, self.down):
            quantized = fake_quantize(self.norm(x), QuantSpec(8))
            weight = fake_quantize(linear.weight, QuantSpec(4, group_size=8), snap_scale=True)
            x = nn.functional.silu(nn.functional.linear(quantized, weight, linear.bias))
        return x


def fake_quantize_nodes(program: torch.export.ExportedProgram) -> int:
    return sum(node.target is torch.ops.qatc.fake_quantize.default for node in program.graph.nodes)


def test_an_exported_program_holds_the_op_saves_and_loads() -> None:
    torch.manual_seed(0)
    model, x = TwoLinears(), torch.randn(2, 3, 16)
    exported = torch.export.export(model, (x,), strict=False)
    assert fake_quantize_nodes(exported) == 4
    file = io.BytesIO()
    torch.export.save(exported, file)
    file.seek(0)
    loaded = torch.export.load(file)
    assert fake_quantize_nodes(loaded) == 4
    assert torch.equal(loaded.module()(x), model(x))
    again = torch.export.export(loaded.module(), (x,), strict=False)
    assert fake_quantize_nodes(again) == 4


@pytest.mark.skipif(not can_compile(), reason="no C++ compiler")
def test_inductor_fuses_the_op() -> None:
    """Four fake-quant nodes, and no kernel more than without them; none of them a call."""
    torch.manual_seed(0)
    model, x = TwoLinears(), torch.randn(2, 3, 16)
    with torch.no_grad():
        _, sources = run_and_get_code(torch.compile(model), x)
    code = "\n".join(sources)
    assert "qatc" not in code.replace("Topologically Sorted", "")
    kernels = code.count("async_compile.cpp_pybinding(") + code.count("async_compile.triton(")
    # norm and quantize, (product), activate with norm and quantize, (product), activate
    assert kernels <= 4


@pytest.mark.skipif(not can_compile(), reason="no C++ compiler")
def test_compiled_is_eager_bit_for_bit() -> None:
    """Above all the bf16 rounding of weight scales, which a cast and back would not survive."""
    dtypes: list[Any] = ["bfloat16", "float16"]
    ranges: list[tuple[int, Any]] = [(4, "restricted"), (8, "full")]
    cases = [
        (QuantSpec(bits, group_size, range_, scale_dtype), snap)
        for (bits, range_), group_size, snap, scale_dtype in itertools.product(
            ranges, [None, 8], [False, True], dtypes
        )
    ]

    def everything(x: Tensor) -> list[Tensor]:
        return [fake_quantize(x, spec, snap_scale=snap) for spec, snap in cases]

    compiled = torch.compile(everything, options={**minmax.COMPILE_OPTIONS})
    x = torch.randn(64, 24, generator=torch.Generator().manual_seed(0))
    x = x * 10.0 ** torch.arange(-38, 26).unsqueeze(1)
    for one, other in zip(compiled(x), everything(x), strict=True):
        assert torch.equal(one, other)


def test_compiled_code_of_another_body_is_not_found_again(tmp_path: Path) -> None:
    """The caches of torch.compile see nodes and not the ops' bodies: the tag tells them apart."""
    assert "qatc-" in torch.compiler.config.cache_key_tag
    package = Path(qatc.__file__).parent
    same, edited = (
        Path(shutil.copytree(package, tmp_path / name / "qatc", symlinks=True))
        for name in ("same", "edited")
    )
    with (edited / "kernels" / "cached_attention.py").open("a") as file:
        file.write("# another body\n")
    program = (
        "import torch\n"
        "torch.compiler.config.cache_key_tag = 'own;'\n"
        "import qatc.numerics.fake_quant\n"
        "print(qatc.numerics.fake_quant.__file__, torch.compiler.config.cache_key_tag)"
    )
    tags = []
    for place in (same, edited):
        environment = os.environ | {"PYTHONPATH": str(place.parent)}
        command = [sys.executable, "-c", program]
        done = subprocess.run(
            command, env=environment, cwd=place.parent, capture_output=True, text=True, check=True
        )
        module, tag = done.stdout.split()
        assert Path(module).is_relative_to(place)
        tags.append(tag)
    assert "own;" + torch.compiler.config.cache_key_tag == tags[0] != tags[1]
    assert tags[1].startswith("own;qatc-")

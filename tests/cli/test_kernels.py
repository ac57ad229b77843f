"""``--kernels``: which library's kernels run a model, said by the commands that run one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qatc.kernels.torchao_linear import obstacle
from tests.cli.conftest import refused, run

pytestmark = pytest.mark.skipif(obstacle("cpu") is not None, reason=str(obstacle("cpu")))


def kernels(output: Path, prefer: str) -> set[str]:
    found = json.loads(run("inspect", output, "--kernels", "--prefer", prefer, "--json").stdout)
    return {str(use["kernel"]) for use in found["kernels"]}


def test_inspect(output: Path) -> None:
    assert kernels(output, "torchao") == {"torchao int_scaled_matmul"}
    for prefer in ("auto", "qatc"):
        assert not any("torchao" in name for name in kernels(output, prefer))
    shown = run("inspect", output, "--kernels", "--prefer", "torchao").stdout
    assert "torchao" in shown
    refused(2, "give --kernels as well", "inspect", output, "--prefer", "torchao")


def test_generate_writes_the_same(output: Path) -> None:
    common: list[Any] = ["--prompt", "The", "--max-new-tokens", "5", "--no-compile"]
    common += ["--temperature", "0", "--json"]
    texts = {
        json.loads(run("generate", output, *common, "--kernels", name).stdout)["text"]
        for name in ("torchao", "qatc")
    }
    assert len(texts) == 1
    refused(2, "auto, torchao, qatc; got 'cuda'", "generate", output, *common, "--kernels", "cuda")


@pytest.mark.usefixtures("verified_here")
def test_verify(output: Path) -> None:
    done = run("verify", output, "--kernels", "torchao", "--json")
    assert done.exit_code == 0 and json.loads(done.stdout)["passed"] is True

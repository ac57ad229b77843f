"""A model on torchao's kernels: the same bits, the same gate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import qatc
from qatc.errors import ConfigError, ParityError, PassError
from qatc.evaluation.parity import verify
from qatc.kernels import table, torchao_linear
from qatc.output import open_output
from qatc.recipe.recipe import Recipe
from qatc.report.usage import decoding_report, kernel_report
from qatc.runtime.forward import runtime_of
from tests.conftest import make_llama, make_output

pytestmark = pytest.mark.skipif(
    torchao_linear.obstacle("cpu") is not None, reason=str(torchao_linear.obstacle("cpu"))
)

IDS = torch.randint(2, 60, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", params=["8-8-8", "4-8-4"])
def output(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    recipe = Recipe.from_bits(request.param, target="torchao", head_bits=8)
    model = make_llama(tie_word_embeddings=False)
    return make_output(tmp_path_factory.mktemp("ao") / "out", recipe, model)


@torch.no_grad()
def test_the_bits_are_those_of_the_other_kernels(output: Path) -> None:
    own: Any = qatc.load(output, compile=False, kernels="torchao")
    other: Any = qatc.load(output, compile=False, kernels="qatc")
    assert torch.equal(own(input_ids=IDS).logits, other(input_ids=IDS).logits)
    greedy: Any = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(own.generate(IDS, **greedy), other.generate(IDS, **greedy))


def test_every_linear_is_on_torchao(output: Path) -> None:
    model = qatc.load(output, compile=False, kernels="torchao")
    uses = kernel_report(model)
    assert {use.kernel for use in uses} == {"torchao int_scaled_matmul"}
    assert "lm_head" in {use.layer for use in uses}
    decode = runtime_of(model).decode
    assert decode is not None and decode.program() is None
    assert "no kernels of torchao" in decoding_report(model)
    others = {use.kernel for use in kernel_report(qatc.load(output, compile=False))}
    assert not any("torchao" in name for name in others)


def test_the_gate_passes_and_sees_a_bug(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_a_new_process = open_output(output).recipe.weights.bits == 4
    assert verify(output, kernels="torchao", reload=in_a_new_process).passed
    product = torchao_linear.torchao_mm

    class Rolled:
        """Every row with the scale of the one before."""

        def torchao_mm(self, a: Any, b: Any, scale: Any) -> Any:
            return product(a, b, scale.roll(1, 0))

    monkeypatch.setattr(table, "torchao_linear", Rolled())
    assert verify(output, reload=False).passed  # which runs other kernels
    with pytest.raises(ParityError, match=r"differs at model\.layers\.0, .*q_proj\.weight"):
        verify(output, kernels="torchao", reload=False).require("it")


def test_what_torchao_cannot_run_is_an_error(tmp_path: Path) -> None:
    grouped = make_output(tmp_path / "grouped", Recipe.from_bits("4-8-4", group_size=16))
    with pytest.raises(PassError, match="groups have several scales"):
        qatc.load(grouped, compile=False, kernels="torchao")
    floats = make_output(tmp_path / "floats", Recipe.from_bits("4-16-16"))
    with pytest.raises(PassError, match="its input is not quantized"):
        qatc.load(floats, compile=False, kernels="torchao")
    with pytest.raises(ConfigError, match="auto, torchao, qatc; got 'fastest'"):
        qatc.load(floats, kernels="fastest")  # type: ignore[arg-type]

"""The parity gate passes what is right, and names the place of every numerics bug planted here."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

import qatc.evaluation.parity as parity
from qatc.errors import ParityError
from qatc.evaluation.checks import Check, ParityReport
from qatc.evaluation.global_parity import Texts, kl
from qatc.kernels import integer_linear, native, packed_linear, products, table
from qatc.machine.toolchain import compilers
from qatc.numerics import affine, minmax, packing
from qatc.recipe.recipe import Recipe
from qatc.recipe.spec import QuantSpec
from qatc.runtime.cuda.graphed import GraphedForward
from qatc.runtime.forward import runtime_of
from qatc.runtime.model import load
from tests.conftest import make_llama, make_output
from tests.evaluation.planting import LOWERED, Module, broken, rounded_scale
from tests.runtime.replaying import Again

FIRST = "model.layers.0.self_attn.q_proj.weight"


def verify(directory: Path, **options: Any) -> ParityReport:
    return parity.verify(directory, reload=False, **options)


@pytest.fixture(autouse=True)
def _short_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parity, "LENGTH", 12)


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_output(tmp_path_factory.mktemp("parity") / "o", Recipe.from_bits("4-8-4"))


@pytest.fixture
def own(output: Path, tmp_path: Path) -> Path:
    """A copy that the test may damage."""
    import shutil

    return Path(shutil.copytree(output, tmp_path / "o"))


def failed(report: ParityReport) -> list[Check]:
    return [check for check in report.checks if not check.passed]


def test_one_code_on_a_tie_is_no_bug() -> None:
    """A row that went another way does not count; a bug, which all rows have, does."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(parity.ROWS, 5, 11, generator=generator)
    other = torch.randn(logits.shape, generator=generator)
    one_row = logits.clone()
    one_row[2] = other[2]
    assert kl(logits, one_row) == 0
    assert kl(logits, other) > 0.1
    assert kl(logits, logits * math.nan) == math.inf


def test_a_new_process_that_fails_is_no_difference(
    output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing = tmp_path / "python"
    failing.write_text("#!/bin/sh\necho 'MemoryError: none left' >&2\nexit 1\n")
    failing.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(failing))
    with pytest.raises(ParityError, match="cannot be loaded in a new process: .*none left"):
        parity.verify(output)


def test_what_is_right_passes_in_a_new_process_as_well(output: Path) -> None:
    report = parity.verify(output, trained=make_llama().state_dict())
    assert report.passed and report.require("it") is report
    assert {check.point for check in report.checks} == {"stored", "local", "global", "cached"}
    exact = [c for c in report.checks if "the trained one on integers" in c.what]
    assert exact[0].figure == 0
    assert json.loads(json.dumps(report.to_dict()))["passed"] is True


@pytest.mark.parametrize("bits", ["4-8-16", "3-6-5"])
def test_other_bits_pass(bits: str, tmp_path: Path) -> None:
    assert verify(make_output(tmp_path / "o", Recipe.from_bits(bits))).passed


def change(directory: Path, name: str, edit: Callable[[Tensor], Tensor]) -> None:
    tensors = load_file(directory / "model.safetensors")
    tensors[name] = edit(tensors[name]).contiguous()
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def one_step_up(scale: Tensor) -> Tensor:
    changed = scale.clone()
    changed[3] = changed[3].bfloat16().nextafter(torch.tensor(9.0).bfloat16()).to(scale.dtype)
    return changed


STORED: dict[str, Callable[[Path], None]] = {
    "a scale off by one step": lambda d: change(d, f"{FIRST}_scale", one_step_up),
    "a code off by one": lambda d: change(d, f"{FIRST}_packed", lambda t: t ^ 1),
    "rows of another channel": lambda d: change(d, f"{FIRST}_packed", lambda t: t.roll(1, 0)),
    "a norm weight": lambda d: change(d, "model.norm.weight", lambda t: t * 1.01),
}


@pytest.mark.parametrize("bug", STORED)
def test_bugs_in_what_is_stored(own: Path, bug: str) -> None:
    STORED[bug](own)
    with pytest.raises(ParityError, match=r"stored tensors .* differs at model\."):
        verify(own).require("it")


def test_codes_of_another_range(tmp_path: Path) -> None:
    """amax / 7.5 and codes down to -8, where amax / 7 was trained with."""
    recipe = Recipe.from_bits("4-8-4")
    full = dataclasses.replace(recipe, weights=QuantSpec(4, None, "full"))
    directory = make_output(tmp_path / "o", full)
    metadata = json.loads((directory / "qatc.json").read_text())
    (directory / "qatc.json").write_text(json.dumps(metadata | {"recipe": recipe.to_dict()}))
    report = verify(directory, trained=make_llama().state_dict())
    assert str(failed(report)[0].where).startswith("model.layers.0.mlp.down_proj")


def backwards(parts: list[Tensor] | None) -> list[Tensor] | None:
    return parts and parts[::-1]


def swapped(packed: Tensor) -> Tensor:
    """The other nibble first."""
    return packed << 4 | packed >> 4


IN_C: dict[str, tuple[Any, str, Any, str]] = {
    "nibbles swapped at decode": (
        products, "native",
        Module(native, packed_product=broken(native.packed_product, packed=swapped)),
        "q_proj.weight .decode: packed product",
    ),
    "nibbles swapped at prefill": (
        products, "native", Module(native, unpack=broken(native.unpack, packed=swapped)),
        "q_proj.weight .prefill: packed product",
    ),
}  # fmt: skip

WITHOUT_C: dict[str, tuple[Any, str, Any, str]] = {
    "nibbles swapped at decode": (
        table, "packing", Module(packing, parts=broken(packing.parts, result=backwards)),
        "q_proj.weight .decode: fused unpack",
    ),
    "nibbles swapped at prefill": (
        table, "packing", Module(packing, unpack=broken(packing.unpack, packed=swapped)),
        "q_proj.weight .prefill: unpack",
    ),
}  # fmt: skip


def plant_and_find(
    output: Path, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, planted: Any, where: str
) -> None:
    """Put a bug in the place of ``owner.name``: the gate must name the layer and ``where``."""
    monkeypatch.setattr(owner, name, planted)
    with pytest.raises(ParityError, match=rf"differs at model\.layers\.0, .*{where}"):
        verify(output).require("it")


@pytest.mark.skipif(not compilers(), reason="no C compiler")
@pytest.mark.parametrize("bug", IN_C)
def test_bugs_in_c(output: Path, bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plant_and_find(output, monkeypatch, *IN_C[bug])


@pytest.mark.skipif(native.obstacle(parallel=True) is not None, reason="no C compiler with OpenMP")
def test_a_bug_in_the_product_of_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = make_output(tmp_path / "o", Recipe.from_bits("8-8-8"))
    planted = Module(native, packed_product=broken(native.packed_product, packed=torch.neg))
    where = "q_proj.weight .decode: int8 product"
    plant_and_find(output, monkeypatch, products, "native", planted, where)


@pytest.mark.parametrize("bug", WITHOUT_C)
def test_bugs_without_c(output: Path, bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "compilers", list)
    plant_and_find(output, monkeypatch, *WITHOUT_C[bug])


@pytest.mark.parametrize(
    "bug", ["bf16 activation scales", "padding that is not masked", "KV codes of another range"]
)
def test_bugs_in_the_lowered_graph(output: Path, bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plant_and_find(output, monkeypatch, *LOWERED[bug])


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_groups_in_the_wrong_order(
    tmp_path: Path, phase: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flipped(function: Callable[..., Any]) -> Any:
        return broken(function, scale=lambda scale: scale.flip(-1))

    recipe = dataclasses.replace(Recipe.from_bits("4-8-4"), weights=QuantSpec(4, 16))
    output = make_output(tmp_path / "o", recipe)
    assert verify(output).passed
    if phase == "decode" and not compilers():
        pytest.skip("no C compiler")
    if phase == "prefill":
        broken_ops = Module(minmax, dequantize=flipped(minmax.dequantize))
        monkeypatch.setattr(table, "minmax", broken_ops)
    else:
        broken_native = Module(native, scaled_product=flipped(native.scaled_product))
        monkeypatch.setattr(products, "native", broken_native)
    with pytest.raises(ParityError, match=rf"differs at .*q_proj\.weight .{phase}"):
        verify(output).require("it")


ZEROS = {
    "on integers": Recipe(QuantSpec(4), QuantSpec(8, range="affine"), QuantSpec(4)),
    "for ExecuTorch": Recipe.from_bits("4-8-16", target="executorch", head_bits=8),
}


@pytest.mark.parametrize("name", ZEROS)
def test_zero_points(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They pass, and a product that forgets them is found."""
    output = make_output(tmp_path / "o", ZEROS[name])
    report = verify(output)
    assert report.passed and len(report.checks) > 10
    broken_sums = broken(integer_linear.sums_from_zero, zero=lambda zero: None)
    monkeypatch.setattr(integer_linear, "sums_from_zero", broken_sums)
    where = "self_attn.q_proj.weight" if name == "on integers" else "the end of the model"
    with pytest.raises(ParityError, match=f"differs at .*{where}"):
        verify(output).require("it")


def test_activations_in_groups_pass(tmp_path: Path) -> None:
    recipe = dataclasses.replace(Recipe.from_bits("4-8-16"), activations=QuantSpec(8, 16))
    assert verify(make_output(tmp_path / "o", recipe)).passed


def test_a_bias_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = transformers.Qwen2Config(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    model: Any = transformers.Qwen2ForCausalLM._from_config(config, attn_implementation="sdpa")
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    output = make_output(tmp_path / "o", Recipe.from_bits("4-8-4"), model.eval())
    assert verify(output).passed
    broken_kernels = {
        name: dataclasses.replace(k, run=broken(k.run, bias=lambda bias: None))
        for name, k in packed_linear._BY_NAME.items()
        if k.run is not None
    }
    monkeypatch.setattr(packed_linear, "_BY_NAME", broken_kernels)
    with pytest.raises(ParityError, match=r"differs at .*q_proj\.weight"):
        verify(output).require("it")


def test_a_cache_that_forgets(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens at the position before their own: every layer by itself is right, the model is not."""
    from qatc.runtime.cache import PackedLayer

    lengths = PackedLayer.get_seq_length
    monkeypatch.setattr(PackedLayer, "get_seq_length", lambda self: max(0, lengths(self) - 1))
    with pytest.raises(
        ParityError, match=r"differs at model\.layers\.0, query of attention .chunked prefill"
    ):
        verify(output).require("it")


def test_a_failure_leaves_no_output(
    shared_model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qatc.quantize.run import quantize
    from tests.quantize.conftest import make

    monkeypatch.setattr(table, "affine", Module(affine, quantize_inputs=rounded_scale))
    config = make(shared_model_path, tmp_path / "out", integer_forward=False, verify=True)
    with pytest.raises(ParityError, match="do not use the output"):
        quantize(config)
    assert not config.output.exists() and config.partial.exists()
    monkeypatch.undo()
    assert load(quantize(config).output, compile=False) is not None


@torch.no_grad()
def test_steps_that_were_not_replayed_have_not_passed(tmp_path: Path) -> None:
    class Refuses(Again):
        def record(self, step: Callable[[], Tensor]) -> Callable[[], Tensor]:
            raise RuntimeError("no")

    model: Any = load(make_output(tmp_path / "o", Recipe()), dtype=torch.float32, compile=False)
    ids = torch.randint(112, (2, 16), generator=torch.Generator().manual_seed(0))
    for recorder, judged, says in (
        (Again(), True, "replayed steps from the graphs"),
        (Refuses(), False, "number of replayed steps, not judged: recording LlamaForCausalLM"),
    ):
        runtime_of(model).decode = GraphedForward(model, runtime_of(model), recorder)
        texts = Texts(ids, 0.05)
        parity._programmed(model, texts)
        (check,) = texts.checks
        assert says in check.what and (check.limit is not None) is judged, check

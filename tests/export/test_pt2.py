"""Programs of torch: the numbers of qatc.load, without qatc, and the codes that were trained."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import typing
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qatc.errors import CaptureError, ConfigError
from qatc.export import FORMATS, export
from qatc.export.pt2 import format, portable
from qatc.export.pt2.capture import PHASES, CacheTensor, Steps
from qatc.export.pt2.generate import Model, TypeHints, load_programs
from qatc.export.pt2.tidy import tidy
from qatc.graph import compilation
from qatc.numerics import minmax, packing
from qatc.output import Output, load_codes, open_output
from qatc.recipe.recipe import Recipe
from qatc.recipe.spec import QuantSpec, spec_arg
from qatc.runtime.model import load
from qatc.storage.directories import EXPORT_FILE
from tests.conftest import make_llama, make_output, make_small
from tests.export.conftest import WINDOWS

SLOTS = 64
"""As many as qatc reads for so few tokens: sums over more of them may round otherwise."""

RECIPES = {
    "several bits": Recipe.from_bits("8-8-8", weight_bits=(("*down_proj*", 3), ("*k_proj*", 6))),
    "float products": Recipe.from_bits("4-16-16", group_size=16),
    "zero points": Recipe(
        *(QuantSpec(4), QuantSpec(8, range="affine"), QuantSpec(8)), head=QuantSpec(4, 16)
    ),
}

PACK = "torch._inductor.package.package.package_aoti"

LAYERS = {"several bits": 2}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """An output, ``source``, and its export, ``out``, in a directory."""
    root, recipe = (
        tmp_path_factory.mktemp("pt2"),
        Recipe.from_bits("4-8-4", head_bits=8, embedding_bits=8),
    )
    make_output(
        root / "source", recipe, make_llama(num_hidden_layers=1, attention_bias=True), tokenizer
    )
    export(root / "source", root / "out", format="pt2")
    return root


def in_parts(ask: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """Logits ``[1, V]`` behind a prompt, single tokens, and several once more."""
    ids = torch.randint(0, 112, (1, 18), generator=torch.Generator().manual_seed(1))
    return [ask(part) for part in ids.split([9, 1, 1, 1, 1, 5], 1)]


def by_qatc(source: Path) -> list[Tensor]:
    """What the uncompiled model of ``qatc.load`` gives."""
    from transformers import DynamicCache

    model, cache = load(source, compile=False), DynamicCache()

    def ask(ids: Tensor) -> Tensor:
        with torch.no_grad():
            return model(input_ids=ids, past_key_values=cache, logits_to_keep=1).logits[:, -1]

    return in_parts(ask)


def test_it_computes_what_qatc_does(exported: Path) -> None:
    """Bit for bit, as all products are of integers."""
    model = Model(exported / "out", SLOTS)
    found = in_parts(lambda ids: model(ids[0].tolist()))
    for mine, wanted in zip(found, by_qatc(exported / "source"), strict=True):
        assert torch.equal(mine, wanted)
    with pytest.raises(ValueError, match="65 tokens are more than 64 slots hold"):
        model([0] * 47)


@pytest.mark.parametrize("name", RECIPES)
def test_as_programs_recipes_compute_what_qatc_does(name: str, tmp_path: Path) -> None:
    """But for floats, which qatc sums in C, in another order."""
    source = make_output(
        tmp_path / "source", RECIPES[name], make_llama(num_hidden_layers=LAYERS.get(name, 1))
    )
    steps = Steps(open_output(source))
    programs = [steps.program(phase).module() for phase in PHASES]
    cache, held = [own.empty(SLOTS) for own in steps.cache], 0

    def ask(ids: Tensor) -> Tensor:
        nonlocal held
        positions = torch.arange(held, held := held + ids.shape[1])[None]
        return programs[ids.shape[1] == 1](ids, positions, cache)

    for mine, wanted in zip(in_parts(ask), by_qatc(source), strict=True):
        torch.testing.assert_close(mine, wanted, rtol=0, atol=2e-6)


def test_the_codes_come_back(exported: Path) -> None:
    wanted, found = load_codes(exported / "source"), FORMATS["pt2"].read(exported / "out")
    assert found.keys() == wanted.keys() and len(found) == 8
    for weight, own in wanted.items():
        assert torch.equal(found[weight].codes, own.codes)
        assert torch.equal(found[weight].scale, own.scale) and found[weight].spec == own.spec


def test_torch_alone_writes_the_same_text(exported: Path, tokenizer: Any) -> None:
    """In a process that has neither qatc nor transformers."""
    prompt = "The old fox"
    code = (
        "import runpy, sys; del sys.argv[0]; runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "assert not {'qatc', 'transformers', 'torchao'} & sys.modules.keys()"
    )
    script = str(exported / "out" / "generate.py")
    command = [sys.executable, "-c", code, script, prompt, "--tokens", "8"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=exported)
    assert done.returncode == 0, done.stderr
    model: Any = load(exported / "source", compile=False)
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    ids = model.generate(ids, max_new_tokens=8, do_sample=False)[0].tolist()
    assert done.stdout == tokenizer.decode(ids, skip_special_tokens=True) + "\n"


def test_weights_are_unpacked_once(exported: Path) -> None:
    """What a token runs has codes in float, and shifts those of the cache alone."""
    _, ready = load_programs(exported / "out", "pt2")
    of_packed = torch.export.load(exported / "out" / "decode.pt2")
    shifts = [
        [n.target for n in own.graph.nodes].count(torch.ops.aten.__rshift__.Scalar)
        for own in (of_packed, ready)
    ]
    assert shifts[0] - shifts[1] == 2 * 7  # each weight of 4 bits has two codes in a byte
    products = [n for n in ready.graph.nodes if n.target is torch.ops.aten.matmul.default]
    assert len(products) == 8 and all(n.args[1].op == "get_attr" for n in products)


def test_types_are_looked_up_once(monkeypatch: pytest.MonkeyPatch) -> None:
    hints, wanted = TypeHints(), typing.get_type_hints(CacheTensor)
    assert hints(CacheTensor, localns={}) == wanted
    monkeypatch.setattr(hints, "_look_up", lambda kind: pytest.fail("asked again"))
    assert hints(CacheTensor) == wanted


def test_programs_hold_nothing_twice(exported: Path) -> None:
    """No asserts, no casts to the same dtype, and what three layers read is quantized once."""
    graph = torch.export.load(exported / "out" / "decode.pt2").graph
    targets = [n.target for n in graph.nodes]
    assert torch.ops.aten._assert_tensor_metadata.default not in targets
    casts = [n for n in graph.nodes if n.target is torch.ops.aten.to.dtype]
    assert all(n.args[0].meta["val"].dtype is not n.args[1] for n in casts) and casts
    # Queries, keys and values; the output; gate and up; down; the head; and K and V of the cache.
    assert targets.count(torch.ops.aten.amax.default) == 5 + 2


class Written(nn.Module):
    """Reads, through a view and without one, what it writes in between."""

    def forward(self, cache: Tensor, x: Tensor) -> Tensor:
        before, view = cache + 1, cache.view(-1)
        of_view, twice = view * 2, (x.to(torch.float32) * 3) + (x * 3)
        cache.index_put_((torch.tensor([0]),), x)
        return before * (cache + 1) + of_view.view(2, 2) * (view * 2).view(2, 2) + twice


def test_what_is_written_in_between_is_read_again() -> None:
    exported = torch.export.export(Written(), (torch.ones(2, 2), torch.ones(1, 2)))
    wanted = exported.module()(torch.arange(4.0).view(2, 2), torch.full((1, 2), 7.0))
    count = len(exported.graph.nodes)
    tidy(exported)
    found = exported.module()(torch.arange(4.0).view(2, 2), torch.full((1, 2), 7.0))
    assert torch.equal(found, wanted) and len(exported.graph.nodes) < count
    targets = [str(n.target) for n in exported.graph.nodes]
    assert targets.count("aten.mul.Tensor") == 2 + 2 + 1  # x * 3 once


@pytest.mark.parametrize("width", [5003, 5004])
@pytest.mark.parametrize("rows", [1, 2, 15, 16, 17])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_products_are_exact(bits: int, rows: int, width: int) -> None:
    """At sizes whose sums fp32 would round, of the largest codes."""
    outputs = 7
    spec, inputs = QuantSpec(bits, range="full"), QuantSpec(8, range="full")
    generator = torch.Generator().manual_seed(bits)
    least, most = spec.code_min, spec.code_max
    codes = torch.randint(least, most + 1, (outputs, width), generator=generator).to(torch.int8)
    codes[0] = most  # whose products are odd: fp32 sums of them are not exact
    x = torch.randn(rows, width, generator=generator)
    x[0] = 1.0
    scale = torch.rand(outputs, 1, generator=generator)
    args = (width, spec_arg(inputs), spec_arg(spec))
    found = [
        portable.linear(x, packing.pack(codes, bits), scale, None, *args, to_compile=to_compile)
        for to_compile in (False, True)
    ]
    x_codes, x_scale = minmax.quantize(x, inputs)
    sums = x_codes.numpy().astype(np.int64) @ codes.numpy().astype(np.int64).T
    wanted = sums.astype(np.float32) * x_scale.numpy() * scale.numpy().T
    assert np.abs(sums).max() > (2**24 if bits == 8 else 2**19)
    assert all(torch.equal(own, torch.from_numpy(wanted)) for own in found)


def test_compiled_a_single_row_is_exact() -> None:
    """Inductor compiles ``torch._int_mm`` to wrong results there."""
    x = torch.randn(1, 1, 70)
    codes = torch.randint(-7, 8, (33, 70), dtype=torch.int8)
    scale = torch.rand(33, 1)

    def both(x: Tensor) -> list[Tensor]:
        return [
            portable.linear(
                *(x, packing.pack(codes, b), scale, None, 70, "int8", f"int{b}"), to_compile=True
            )
            for b in (4, 8)
        ]

    for mine, wanted in zip(torch.compile(both)(x), both(x), strict=True):
        torch.testing.assert_close(mine, wanted, rtol=2e-7, atol=0)


@pytest.mark.skipif(
    "QATC_TEST_RUNTIMES" not in os.environ,
    reason="AOTInductor compiles for a minute; make test-runtimes lets it",
)
def test_compiled_it_computes_what_qatc_does(tmp_path: Path) -> None:
    recipe = Recipe.from_bits(
        "4-8-4",
        weight_bits=(("*down_proj*", 8), ("*k_proj*", 3)),
        head_bits=8,
        embedding_bits=8,
    )
    source = make_output(tmp_path / "source", recipe, make_llama(num_hidden_layers=1))
    model = Model(export(source, tmp_path / "out", format="aoti"), SLOTS)
    found = in_parts(lambda ids: model(ids[0].tolist()))
    for mine, wanted in zip(found, by_qatc(source), strict=True):
        torch.testing.assert_close(mine, wanted, rtol=0, atol=2e-6)
    codes, back = load_codes(source), FORMATS["aoti"].read(tmp_path / "out")
    assert codes.keys() == back.keys()
    assert all(torch.equal(own.codes, back[name].codes) for name, own in codes.items())
    assert all(torch.equal(own.scale, back[name].scale) for name, own in codes.items())


def test_what_is_tied_has_one_name_in_a_package(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = torch.export.load(exported / "out" / "decode.pt2").state_dict
    own = {name: value for name, value in state.items() if "embed_tokens" not in name}
    assert len(own) == len(state) - 2
    monkeypatch.setattr(format, "_of_package", lambda path: own)
    told = json.loads((exported / "out" / EXPORT_FILE).read_text()) | {"format": "aoti"}
    (tmp_path / EXPORT_FILE).write_text(json.dumps(told))
    wanted, found = load_codes(exported / "source"), FORMATS["aoti"].read(tmp_path)
    assert found.keys() == wanted.keys() >= {"model.embed_tokens.weight"}
    assert all(torch.equal(found[name].codes, own.codes) for name, own in wanted.items())


@pytest.mark.parametrize("kind", WINDOWS)
def test_windows_are_refused(kind: str, tmp_path: Path) -> None:
    made = make_output(
        tmp_path / "source", Recipe.from_bits("4-8-4"), make_small(kind, **WINDOWS[kind])
    )
    with pytest.raises(ConfigError, match="caches that hold every token for torch"):
        export(made, tmp_path / "out", format="pt2")
    assert not (tmp_path / "out").exists()


def test_windows_that_no_text_reaches_are_none(tmp_path: Path) -> None:
    model = make_small("mistral", sliding_window=64)  # as many tokens as its longest text
    made = make_output(tmp_path / "source", Recipe.from_bits("4-8-4"), model)
    assert FORMATS["pt2"].notes(open_output(made))


def test_what_it_cannot_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rotated = Recipe.from_bits("4-8-4", rotate_inputs=("*.down_proj.weight",))
    with pytest.raises(ConfigError, match="rotates inputs"):
        FORMATS["pt2"].notes(open_output(make_output(tmp_path / "rotated", rotated)))
    obstacles = {"cpu": "there is no compiler", "auto": None}  # as where there is a GPU
    monkeypatch.setattr(compilation, "obstacle", lambda kind="auto": obstacles[kind])
    monkeypatch.setattr(format, "Steps", lambda output: pytest.fail("it was captured"))
    plain = make_output(tmp_path / "plain", Recipe.from_bits("4-8-4"))
    with pytest.raises(ConfigError, match="there is no compiler; --format pt2 takes none"):
        export(plain, tmp_path / "out", format="aoti")


class NoSteps:
    """Programs that only what replaces the compiler is given."""

    cache: ClassVar[list[Any]] = []
    same: ClassVar[dict[str, str]] = {}

    def __init__(self, output: Output, **options: Any) -> None: ...

    def program(self, phase: str) -> Any:
        return SimpleNamespace(example_inputs=(), module=lambda: None)


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """AOTInductor, which compiles nothing and packs it."""
    monkeypatch.setattr(compilation, "obstacle", lambda kind="auto": None)
    monkeypatch.setattr(format, "Steps", NoSteps)
    monkeypatch.setattr("torch._inductor.aot_compile", lambda *args, **options: [])
    monkeypatch.setattr(PACK, lambda path, files: Path(path).touch())
    return monkeypatch


@pytest.mark.parametrize("broken", ["torch._inductor.aot_compile", PACK])
def test_what_cannot_be_compiled_is_said(
    broken: str, compiler: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(*args: Any, **options: Any) -> None:
        raise RuntimeError("no headers")

    compiler.setattr(broken, fail)
    made = make_output(tmp_path / "source", Recipe.from_bits("4-8-4"))
    with pytest.raises(CaptureError, match="cannot compile the model: RuntimeError: no headers; -"):
        export(made, tmp_path / "out", format="aoti")
    assert not (tmp_path / "out").exists()


def test_a_compiled_package_is_for_one_torch(
    compiler: pytest.MonkeyPatch, tmp_path: Path, tokenizer: Any
) -> None:
    made = make_output(tmp_path / "source", Recipe.from_bits("4-8-4"), tokenizer=tokenizer)
    card = (export(made, tmp_path / "out", format="aoti") / "README.md").read_text()
    version = torch.__version__.partition("+")[0]
    assert f"\npip install torch=={version} tokenizers\n" in card

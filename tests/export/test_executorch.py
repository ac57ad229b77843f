"""ExecuTorch itself runs what is exported, by its own rule, with the codes that were trained.

Skipped where it is not installed; ``make test-runtimes`` installs it.
"""

from __future__ import annotations

import importlib.util
import runpy
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from qatc.errors import CaptureError, CheckpointError, ConfigError
from qatc.evaluation import parity
from qatc.evaluation.reference import prepare_reference
from qatc.export import FORMATS, export
from qatc.export.consumers import consumer_of
from qatc.export.executorch import format, shortcuts
from qatc.export.executorch.generate import Model
from qatc.export.executorch.lowering import lower
from qatc.export.executorch.modules import QuantizedLinear, Step, quantized_step
from qatc.numerics.fake_quant import fake_quantize
from qatc.output import Output, QuantizedWeight, load_codes, load_reference, open_output
from qatc.output.directory import with_tied
from qatc.progress import Observer
from qatc.quantize.run import quantize
from qatc.recipe.recipe import Recipe
from qatc.recipe.spec import QuantSpec
from qatc.runtime.model import load
from tests.conftest import make_llama, make_output, make_small, save
from tests.export.conftest import WINDOWS
from tests.numerics.test_affine import by_xnnpack, on_ties, random, with_zero_on_a_tie
from tests.quantize.conftest import make

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("executorch") is None,
    reason="executorch is not installed; make test-runtimes installs it",
)

RECIPES = {
    "groups": Recipe.from_bits("4-8-16", group_size=32),
    "channels": Recipe.from_bits(
        "4-8-4", head_bits=8, embedding_bits=8, weight_bits=(("*v_proj*", 8), ("*k_proj*", 3))
    ),
}

FOR_IT = Recipe.from_bits("4-8-16", target="executorch", head_bits=8)
"""Codes of an embedding would put inputs of the first layer on ties, as quotients of integers."""


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Callable[[str], Path]:
    """Makes, once, the output of a recipe, ``source``, and its export, ``out``, in a directory."""
    root, done = tmp_path_factory.mktemp("executorch"), set[str]()

    def make(name: str) -> Path:
        if name not in done:
            model = make_llama(
                hidden_size=64,
                intermediate_size=96 if name == "groups" else 72,
                num_hidden_layers=1,
                attention_bias=True,
            )
            make_output(root / name / "source", RECIPES[name], model, tokenizer)
            export(root / name / "source", root / name / "out", format="executorch")
            done.add(name)
        return root / name

    return make


def linear_of_xnnpack(x: Tensor, weight: QuantizedWeight, bias: Tensor | None) -> Tensor:
    """A linear layer with its inputs rounded to 8 bits, a scale and a zero point per token."""
    codes, scale, zero = by_xnnpack(x.numpy().reshape(-1, x.shape[-1]))
    values = torch.from_numpy((codes - zero) * scale).reshape(x.shape)
    return F.linear(values, weight.dequantize(), bias)


def expected(source: Path, ids: Tensor) -> Tensor:
    """Log-probabilities ``[T, V]`` of the model under XNNPACK's rule."""
    reference: Any = load_reference(source)
    codes = with_tied(load_codes(source), reference.all_tied_weights_keys)
    for name, weight in codes.items():
        layer = reference.get_submodule(name.removesuffix(".weight"))
        if isinstance(layer, torch.nn.Linear):
            run = partial(linear_of_xnnpack, weight=weight, bias=layer.bias)
            object.__setattr__(layer, "forward", run)
    with torch.no_grad():
        return reference(ids).logits[0].log_softmax(-1)


@pytest.mark.parametrize("name", RECIPES)
def test_it_computes_the_model_by_its_own_rule(name: str, exported: Callable[[str], Path]) -> None:
    """A prompt in two calls, tokens one by one, and several at once behind them."""
    directory = exported(name)
    ids = torch.randint(2, 112, (1, 18), generator=torch.Generator().manual_seed(1))
    wanted = expected(directory / "source", ids)
    model = Model(directory / "out")
    model.chunk, held, worst = 6, 0, []
    for part in ids[0].split([9, 1, 1, 1, 1, 5]):
        held += len(part)
        found = model(part.tolist())[0].log_softmax(-1)
        worst.append(float((found - wanted[held - 1]).abs().max()))
    # A code that lies on a tie may be rounded to either side, and moves what is behind it.
    assert worst[0] < 1e-4 and max(worst) < 0.15
    with pytest.raises(ValueError, match="146 tokens are more than 128 slots hold"):
        model([0] * 128)


@torch.no_grad()
def test_what_is_trained_for_it_is_what_it_computes(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The logits of the trained graph and of the packed model, to the order of float sums."""
    source = save(tmp_path / "model", make_llama(num_hidden_layers=1), tokenizer)
    with torch.enable_grad():
        quantize(make(source, tmp_path / "o", recipe=FOR_IT))
    output = open_output(tmp_path / "o")
    runtime = consumer_of(output, 40)
    assert runtime is not None and not runtime.differences
    reference: Any = load_reference(output)
    trained = prepare_reference(reference, output, compile=False)
    ids = torch.randint(2, 112, (1, 40), generator=torch.Generator().manual_seed(1))
    packed = load(output, dtype=torch.float32, compile=False)
    wanted = [model(input_ids=ids, use_cache=False).logits[0] for model in (trained, packed)]
    found = runtime.logits(ids)[0]
    differences = torch.stack([(found - own).abs().amax(-1) for own in wanted])
    # A single code that falls the other way, as on other processors it may, is 0.01 to 0.1.
    assert float(differences.median(1).values.max()) < 1e-5 and float(differences.max()) < 0.15
    monkeypatch.setattr(parity, "consumer_of", lambda output, slots: runtime)
    report = parity.verify(output, reload=False)
    (check,) = (check for check in report.checks if check.point == "runtime")
    assert report.passed and "ExecuTorch from the trained graph" in check.what
    assert check.limit is not None and check.figure < 1e-9


def test_its_rule_is_the_one_that_it_is_trained_by(tmp_path: Path) -> None:
    """Through a product with the identity come the very values that the codes stand for."""
    weight = QuantizedWeight(torch.eye(64, dtype=torch.int8), torch.ones(64, 1), QuantSpec(8))
    zeros = F.pad(with_zero_on_a_tie(500), (0, 62))
    rows = torch.cat([on_ties(1500), zeros, random(500, 64, shift=0.5), random(500, 64).abs()])
    program = torch.export.export(QuantizedLinear(weight, None), (rows,))
    (tmp_path / "identity.pte").write_bytes(lower(program, {}, Observer()))
    method = runtime_of_executorch(tmp_path / "identity.pte")
    found = method.execute([rows])[0]
    assert torch.equal(found, fake_quantize(rows, FOR_IT.activations))


def runtime_of_executorch(file: Path) -> Any:
    from executorch.runtime import Runtime

    return Runtime.get().load_program(file).load_method("forward")


@pytest.mark.parametrize("name", RECIPES)
def test_the_codes_are_in_the_file(name: str, exported: Callable[[str], Path]) -> None:
    directory = exported(name)
    wanted, found = load_codes(directory / "source"), FORMATS["executorch"].read(directory / "out")
    assert found.keys() == wanted.keys() and found
    for weight, own in wanted.items():
        assert torch.equal(found[weight].codes, own.codes)
        assert torch.equal(found[weight].scale, own.scale) and found[weight].spec == own.spec


def test_it_writes_text_without_qatc(exported: Callable[[str], Path], tokenizer: Any) -> None:
    directory, prompt = exported("channels"), "The old fox"
    code = (
        "import runpy, sys; del sys.argv[0]; runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "assert not {'qatc', 'transformers'} & sys.modules.keys()"
    )
    script = str(directory / "out" / "generate.py")
    command = [sys.executable, "-c", code, script, prompt, "--tokens", "4"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=directory)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().splitlines()[-1].startswith(prompt)


def test_a_prompt_longer_than_the_cache(
    exported: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    script = str(exported("channels") / "out" / "generate.py")
    monkeypatch.setattr("sys.argv", [script, "x " * 128])
    with pytest.raises(SystemExit) as left:
        runpy.run_path(script, run_name="__main__")
    assert left.value.code == 2 and "tokens, and the cache holds 128" in capsys.readouterr().err


def test_its_card_names_all_packages(exported: Callable[[str], Path]) -> None:
    card = (exported("channels") / "out" / "README.md").read_text()
    assert "\npip install executorch torch tokenizers\npython generate.py " in card


def test_what_cannot_be_lowered_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **options: Any) -> None:
        raise RuntimeError("no such operator")

    monkeypatch.setattr("executorch.exir.to_edge_transform_and_lower", fail)
    exported: Any = None
    with pytest.raises(CaptureError, match="cannot lower the model: RuntimeError: no such oper"):
        lower(exported, {}, Observer())


class Parts(Observer):
    """Notes what it is told."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def stage(self, title: str) -> None:
        self.seen.append(title)

    def lowered(self, done: int, total: int) -> None:
        self.seen.append((done, total))


def test_the_shortcuts_change_nothing(
    exported: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from executorch.exir import lowered_backend_module

    with shortcuts.shortcuts():
        assert lowered_backend_module.legalize_graph is shortcuts._sort
    monkeypatch.setattr("qatc.export.executorch.lowering.shortcuts", nullcontext)
    directory, parts = exported("groups"), Parts()
    export(directory / "source", tmp_path / "out", format="executorch", observer=parts)
    wanted, found = ((own / "out" / "model.pte").read_bytes() for own in (tmp_path, directory))
    assert found == wanted
    total = len(parts.seen) - 2
    assert parts.seen == ["capture", "lower", *((n + 1, total) for n in range(total))]
    assert total > 7


def test_it_says_what_differs(exported: Callable[[str], Path]) -> None:
    notes = FORMATS["executorch"].notes(open_output(exported("channels") / "source"))
    assert notes[0] == "the cache holds 128 tokens, and a call takes at most 128"
    assert "where this model was trained with one scale per token; --target execu" in notes[1]
    assert notes[2] == "K and V stay in float, where this model was trained with 4 bits"
    assert notes[3] == "weights of 3 bits take 4 (up to 4) or 8 bits each"


UNHELD = {
    "rounds inputs of linear layers to 8 bits": Recipe.from_bits("4-6-16"),
    "here those are in float": Recipe.from_bits("16-8-16", head_bits=8),
    "groups of 16, and XNNPACK takes multiples of 32": Recipe.from_bits("4-8-16", group_size=16),
    "has 8 bits in groups": Recipe.from_bits("8-8-16", group_size=32),
    "has negative scales": Recipe(QuantSpec(4, range="signed"), QuantSpec(8), QuantSpec()),
    "lm_head.weight: it has 8 bits in groups": Recipe(
        QuantSpec(4), QuantSpec(8), QuantSpec(), head=QuantSpec(8, 32), embedding=QuantSpec(8, 32)
    ),
    "lm_head.weight: it has negative scales": Recipe(
        *(QuantSpec(4), QuantSpec(8), QuantSpec()),
        head=QuantSpec(8, range="signed"),
        embedding=QuantSpec(8, range="signed"),
    ),
    "rotates inputs": Recipe.from_bits("4-8-4", rotate_inputs=("*.down_proj.weight",)),
}


@pytest.mark.parametrize("reason", UNHELD)
def test_what_it_cannot_hold(reason: str, tmp_path: Path) -> None:
    made = make_output(tmp_path / "source", UNHELD[reason])
    with pytest.raises(ConfigError, match=reason):
        export(made, tmp_path / "out", format="executorch")
    assert not (tmp_path / "out").exists()


def test_a_tied_head_is_a_product_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its bytes are those of the embedding's table, which multiplies nothing."""

    def step_with_float_head(output: Output, slots: int) -> Step:
        step = quantized_step(output, slots)
        head, weight = step.model.lm_head, output.weights["model.embed_tokens.weight"].dequantize()
        monkeypatch.setattr(head, "forward", lambda x: F.linear(x, weight))
        return step

    monkeypatch.setattr(format, "quantized_step", step_with_float_head)
    model = make_llama(num_hidden_layers=1)
    made = make_output(tmp_path / "source", RECIPES["channels"], model)
    with pytest.raises(ConfigError, match="did not take 1 weights .* lm_head.weight"):
        export(made, tmp_path / "out", format="executorch")


@pytest.mark.parametrize("kind", WINDOWS)
def test_windows_are_refused(kind: str, tmp_path: Path) -> None:
    windows = make_small(kind, **WINDOWS[kind])
    made = make_output(tmp_path / "source", RECIPES["channels"], windows)
    with pytest.raises(ConfigError, match="caches that hold every token for ExecuTorch"):
        FORMATS["executorch"].notes(open_output(made))


def test_windows_that_its_cache_ends_within_are_none(tmp_path: Path) -> None:
    model = make_small("mistral", sliding_window=2048, max_position_embeddings=4096)
    made = make_output(tmp_path / "source", RECIPES["channels"], model)
    assert FORMATS["executorch"].notes(open_output(made))


def test_a_damaged_file(exported: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="export it again"):
        FORMATS["executorch"].read(tmp_path)

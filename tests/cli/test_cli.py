"""The command line, driven for real: exit codes, streams, and one line for every mistake."""

from __future__ import annotations

import json
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.errors import LocalTokenNotFoundError
from safetensors.torch import load_file, save_file

from qatc.cli import terminal
from qatc.evaluation.checks import Check, ParityReport
from qatc.export import FORMATS
from qatc.kernels import native
from qatc.losses.objective import distillation_losses
from qatc.output import Output
from qatc.progress import Observer
from tests.cli.conftest import TINY, refused, run


@pytest.mark.parametrize("bits", ["4-8", "3.5-8-4", "0-8-4", "9-8-4", "4-8-4-4"])
def test_bits(bits: str, shared_model_path: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    refused(2, "bits", "quantize", "--model", shared_model_path, "--bits", bits, "--output", target)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "code", "says"),
    [
        (["--steps", "0"], 2, "steps must be at least 1"),
        (["--device", "nonsense"], 2, "nonsense"),
        (["--dtype", "int3"], 2, "dtype must be one of"),
        (["--strategy", "guess"], 2, "strategy must be one of"),
        (["--method", "gptq+awq"], 2, "there is no 'awq'"),
        (["--method", "gptq+rotate"], 2, "write 'rotate+gptq'"),
        (["--greedy-tokens", "many"], 2, "3-5"),
        (["--skip", "*no_such*"], 2, "matches no parameter"),
        (["--group-size", "7"], 1, "does not divide"),
        (["--kv-site", "moon"], 2, "cache, projection"),
        (["--bits", "16-16-16"], 2, "quantizes nothing"),
        (["--max-length", "4096"], 2, "takes at most 128 tokens"),
        (["--eval-text", "no-such-file.txt"], 2, "no-such-file.txt"),
        (["--resume"], 2, "no unfinished run"),
        (["--loss", "logit"], 2, "has no term 'logit'; terms are logits, label, hidden"),
        (["--loss", "logits+-2*hidden"], 2, "must be a positive number; got '-2'"),
        (["--recipe", "no-such-recipe.yaml"], 2, "cannot read the recipe"),
    ],
)
def test_wrong_options(
    options: list[str], code: int, says: str, shared_model_path: Path, tmp_path: Path
) -> None:
    target = tmp_path / "out"
    command = ["quantize", "--model", shared_model_path, "--output", target, *TINY, *options]
    refused(code, says, *command)
    assert not target.exists()


def test_recipes(shared_model_path: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    command = ["inspect", shared_model_path, "--recipe", recipe]
    recipe.write_text("wieghts: {bits: 4}\n")
    assert "weights, activations, kv" in refused(2, "wieghts", *command)
    recipe.write_text("[unclosed")
    refused(2, "not valid YAML", *command)
    recipe.write_text("weights: {bits: 4}\n")
    refused(2, "--recipe", *command, "--bits", "4-8-4")
    assert run(*command).exit_code == 0


def test_models(tmp_path: Path, shared_model_path: Path, bloom_path: Path, output: Path) -> None:
    target = tmp_path / "out"
    for model, code, says in [
        (tmp_path / "absent", 2, "no model directory"),
        (bloom_path, 2, "no attention through SDPA"),
        (output, 2, "quantized already"),
    ]:
        refused(code, says, "quantize", "--model", model, "--output", target, *TINY)
        assert not target.exists()
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for file in shared_model_path.iterdir():
        damaged.joinpath(file.name).write_bytes(file.read_bytes())
    whole = damaged.joinpath("model.safetensors").read_bytes()
    damaged.joinpath("model.safetensors").write_bytes(whole[: len(whole) // 2])
    refused(1, "are damaged", "quantize", "--model", damaged, "--output", target, *TINY)


def test_existing_and_unwritable_outputs(shared_model_path: Path, output: Path) -> None:
    command = ["quantize", "--model", shared_model_path, *TINY, "--output"]
    refused(2, "--overwrite", *command, output)
    refused(1, "cannot write", *command, output / "qatc.json" / "below")


def test_sigterm_in_training_leaves_a_checkpoint(
    shared_model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "out"
    steps: list[int] = []
    command = ["quantize", "--model", shared_model_path, "--output", target, *TINY, "--no-verify"]

    def ends(*args: Any, **kwargs: Any) -> Any:
        steps.append(1)
        if len(steps) == 2:
            signal.raise_signal(signal.SIGTERM)
        return distillation_losses(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr("qatc.training.distill.distillation_losses", ends)
        refused(143, "SIGTERM: interrupted; the same command goes on", *command)
    assert (tmp_path / "out.partial" / "checkpoints" / "step-000002").is_dir()
    assert run(*command).exit_code == 0
    shown = run("generate", target, "--prompt", "The", "--max-new-tokens", "2", "--no-compile")
    assert "not verified: --no-verify" in shown.stderr


def test_places_that_are_not_its_own(shared_model_path: Path, tmp_path: Path) -> None:
    model = shutil.copytree(shared_model_path, tmp_path / "model")
    command = ["--model", model, "--output", model]
    refused(2, "would replace the model", "quantize", *command, *TINY, "--overwrite")
    refused(2, "would replace the model", "generate-data", *command)
    recipe = tmp_path / "out" / "recipe.yaml"
    recipe.parent.mkdir()
    recipe.write_text("weights: {bits: 4}")
    command = ["quantize", "--model", model, "--output", recipe.parent, "--recipe", recipe]
    refused(2, "would replace the recipe", *command, "--overwrite")
    assert recipe.exists() and (model / "model.safetensors").exists()


def test_evaluate(output: Path, shared_model_path: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The old fox sleeps by the bridge. " * 20)
    common = ["--text", text, "--length", "16", "--no-compile", "--json"]
    result = run("evaluate", output, "--teacher", shared_model_path, *common)
    assert result.exit_code == 0, result.output
    figures = json.loads(result.stdout)
    assert figures["kl"] > 0 and 0 <= figures["top1_agreement"] <= 1
    refused(2, "--text", "evaluate", output)
    refused(2, "quantized already", "evaluate", output, "--bits", "4-8-4", *common)


def test_export(output: Path, tmp_path: Path) -> None:
    target = tmp_path / "exported"
    assert run("export", output, "--output", target).exit_code == 0
    for name in ("model.safetensors", "config.json"):
        assert (target / name).read_bytes() == (output / name).read_bytes()
    refused(2, "--overwrite", "export", output, "--output", target)
    refused(2, "compressed-tensors", "export", output, "--output", tmp_path / "x", "--format", "y")
    (tmp_path / "none").mkdir()
    refused(1, "qatc quantize", "export", tmp_path / "none", "--output", tmp_path / "x")


@pytest.mark.usefixtures("verified_here")
def test_export_to_torchao(output: Path, tmp_path: Path) -> None:
    target = tmp_path / "exported"
    result = run("export", output, "--format", "torchao", "--output", target, "--json")
    assert result.exit_code == 0 and json.loads(result.stdout)["format"] == "torchao"
    (note,) = [line for line in result.stderr.splitlines() if "other numerics" in line]
    assert "no KV quantization" in note and note.endswith("activation rule")
    config = json.loads((target / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "torchao"


@pytest.mark.usefixtures("verified_here")
def test_export_to_gguf(output: Path, tmp_path: Path) -> None:
    target = tmp_path / "exported"
    result = run("export", output, "--format", "gguf", "--output", target)
    assert result.exit_code == 0, result.stderr
    (file,) = target.glob("*.gguf")
    told, *commands = result.stdout.splitlines()
    assert told.endswith("exported: gguf")
    assert [line.split()[0] for line in commands] == ["llama-server", "llama-completion"]
    assert all(f"-m {file} --ctx-size 128" in line for line in commands)
    assert "one scale per token; --target llama.cpp" in result.stderr


@pytest.mark.usefixtures("verified_here")
def test_an_export_says_how_far_it_is(
    output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(output: Output, directory: Path, observer: Observer) -> None:
        observer.stage("lower")
        observer.lowered(1, 2)
        (directory / "model").touch()

    monkeypatch.setattr(terminal, "_LINE_SECONDS", -1.0)  # not half a minute
    monkeypatch.setitem(FORMATS, "torchao", replace(FORMATS["torchao"], write=write))
    result = run("export", output, "--format", "torchao", "--output", tmp_path / "exported")
    assert result.exit_code == 0 and " lower\n" in result.stderr
    assert "1/2 parts" in result.stderr


def test_what_was_verified_before_is_exported_at_once(
    output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = Check("global", "something", 2.0, 1.0)
    monkeypatch.setattr("qatc.evaluation.parity.verify", lambda *_, **__: ParityReport((found,)))
    refused(1, "do not use", "export", output, "--output", tmp_path / "x")
    result = run("export", output, "--no-verify", "--output", tmp_path / "exported")
    assert result.exit_code == 0 and "not verified" in result.stderr
    assert (tmp_path / "exported" / "model.safetensors").exists()


def test_json_has_no_nan(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = Check("global", "something", float("nan"), 1.0)
    monkeypatch.setattr("qatc.evaluation.parity.verify", lambda *_, **__: ParityReport((found,)))
    result = run("verify", output, "--json")
    assert result.exit_code == 1

    def refuses(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    (check,) = json.loads(result.stdout, parse_constant=refuses)["checks"]
    assert check["figure"] is None and not check["passed"]


def test_verify(output: Path) -> None:
    report = json.loads((output / "qatc.json").read_text())["parity"]
    assert report["passed"] and "reload" in report["checks"][-1]["what"]
    assert "## On integers" in (output / "report.md").read_text()
    result = run("verify", output, "--json")
    assert result.exit_code == 0 and json.loads(result.stdout)["passed"]


@pytest.mark.usefixtures("verified_here")
def test_damaged(output: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(output, damaged)
    tensors = load_file(damaged / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight_packed"
    save_file(tensors | {name: tensors[name] ^ 1}, damaged / "model.safetensors")
    result = run("verify", damaged)
    assert result.exit_code == 1 and "differs" in result.stdout
    assert "model.layers.1.mlp.up_proj.weight" in result.stderr
    refused(1, "do not use", "export", damaged, "--output", tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_inspect(shared_model_path: Path) -> None:
    result = run("inspect", shared_model_path, "--bits", "4-8-4", "--json")
    plan = json.loads(result.stdout)
    assert plan["kinds"][0]["layers"] == ["model.layers.0", "model.layers.1"]
    kinds = [site["kind"] for site in plan["kinds"][0]["sites"]]
    assert [kinds.count(k) for k in ("input", "weight", "key", "value")] == [4, 7, 1, 1]


def test_inspect_kernels(output: Path, shared_model_path: Path) -> None:
    report = json.loads(run("inspect", output, "--kernels", "--json").stdout)
    expected = {"packed product"}
    if native.obstacle() is not None:
        expected = {"unpack + int_mm", "fused unpack"}
    assert {use["kernel"] for use in report["kernels"]} == expected
    assert report["memory"]["quantized"] > 0
    shown = run("inspect", output, "--kernels").stdout
    assert "decode" in shown and "KV cache, per token" in shown
    refused(2, "qatc quantize", "inspect", shared_model_path, "--kernels")


@pytest.mark.usefixtures("verified_here")
def test_head_and_embedding(shared_model_path: Path, tmp_path: Path) -> None:
    target, model = tmp_path / "out", ["--model", shared_model_path]
    ends = ["--head-bits", "8", "--embedding-bits", "8"]
    shown = run("inspect", shared_model_path, *ends).stdout
    assert "embedding" in shown and "of it head and embedding, GB" in shown
    result = run("quantize", *model, *ends, "--output", target, *TINY)
    assert result.exit_code == 0, result.output
    assert "for transformers: qatc export" in result.stderr
    metadata = json.loads((target / "qatc.json").read_text())
    assert metadata["parity"]["passed"] and metadata["recipe"]["head"]["bits"] == 8
    report = (target / "report.md").read_text()
    assert "| quantized head and embedding | 4,032 | 7,168 | 0.562 |" in report
    assert "| lm_head | weight | 112 x 32 | decode |" in report
    assert "quantized head and embedding" in run("inspect", target, "--kernels").stdout
    text = tmp_path / "text.txt"
    text.write_text("The old fox sleeps by the bridge. " * 20)
    common = ["--text", text, "--length", "16", "--no-compile", "--json"]
    teacher = ["--teacher", shared_model_path]
    rounded = [
        json.loads(
            run("evaluate", shared_model_path, "--bits", "16-8-16", *o, *teacher, *common).stdout
        )
        for o in ([], ["--head-bits", "4"])
    ]
    assert 0 < rounded[0]["kl"] < rounded[1]["kl"]
    assert run("evaluate", target, *common).exit_code == 0
    options = ["--prompt", "The", "--max-new-tokens", "4", "--no-compile"]
    assert run("generate", target, *options).exit_code == 0
    exported = run("export", target, "--output", tmp_path / "exported")
    assert exported.exit_code == 0 and "a byte each, as transformers reads" in exported.stderr
    refused(2, "need --bits", "evaluate", shared_model_path, "--head-bits", "8", *common)
    refused(2, "got 9", "inspect", shared_model_path, "--head-bits", "9")
    inspect = ["inspect", shared_model_path]
    refused(2, "one tied weight", *inspect, "--head-bits", "8", "--embedding-bits", "4")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("head: {bits: 8}\n")
    refused(2, "leave out --head-bits", *inspect, "--recipe", recipe, "--head-bits", "8")
    lines = run(*inspect, "--recipe", recipe, "--json").stdout
    assert [kind["name"] for kind in json.loads(lines)["kinds"]] == ["LlamaDecoderLayer", "Linear"]


def test_help_names_every_command() -> None:
    text = run("--help").stdout
    for name in (
        "quantize",
        "generate-data",
        "inspect",
        "evaluate",
        "export",
        "generate",
        "verify",
    ):
        assert name in text and "qatc" in run(name, "--help").stdout


def test_push(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ["push", output, "--repo", "me/tiny"]
    result = run(*command, "--dry-run", "--json")
    assert result.exit_code == 0 and "--base-model" in result.stderr
    found = json.loads(result.stdout)
    assert found["published"] is None and "model.safetensors" in found["files"]
    assert "would be published as me/tiny" in run(*command, "--dry-run").stdout
    refused(2, "OWNER/NAME", "push", output, "--repo", "tiny", "--dry-run")

    def nobody(*args: Any, **kwargs: Any) -> None:
        raise LocalTokenNotFoundError("no token")

    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", nobody)
    refused(2, "hf auth login", *command)

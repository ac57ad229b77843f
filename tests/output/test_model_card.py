"""Every fact of a card, held against the files that it is about."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoTokenizer

import qatc
from qatc.data.config import CorpusConfig
from qatc.models.cards import license_of
from qatc.output import load_codes
from qatc.output.model_card import make_card, write_card
from qatc.output.stored import measure
from qatc.quantize.run import quantize
from qatc.quantize.settings import QuantizeConfig
from qatc.recipe.recipe import Recipe
from qatc.training.config import TrainingConfig
from tests.conftest import make_llama, make_output

RECIPES = {
    "4-8-4": Recipe.from_bits("4-8-4"),
    "8-8-8": Recipe.from_bits("8-8-8"),
    "3-6-16": Recipe.from_bits("3-6-16"),
    "groups": Recipe.from_bits("4-16-4", group_size=16),
    "float": Recipe.from_bits("16-8-4"),
    "transformers": Recipe.from_bits("4-8-16", target="transformers"),
    "4-8-K8V4": Recipe.from_bits("4-8-8", value_bits=4),
    "projection": dataclasses.replace(Recipe.from_bits("4-8-4"), kv_site="projection"),
}


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("cards")
    # Fewer columns than fill an int32, so that padding would be counted if it were.
    return {
        name: make_output(
            root / name, recipe, make_llama(intermediate_size=80).bfloat16(), tokenizer
        )
        for name, recipe in RECIPES.items()
    }


@pytest.fixture(scope="module")
def quantized(shared_model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output with figures, of a model that says what its license is."""
    root = tmp_path_factory.mktemp("quantized")
    model = root / "a model"
    model.mkdir()
    for path in shared_model_path.iterdir():
        (model / path.name).write_bytes(path.read_bytes())
    (model / "README.md").write_text("\ufeff---\nlicense: apache-2.0\ntags: [x]\n---\n# hello\n")
    config = QuantizeConfig(
        model=str(model),
        output=root / "out",
        generation=CorpusConfig(sequences=24, max_length=16, batch_size=8),
        training=TrainingConfig(steps=2, batch_size=4, accumulate=2),
        eval_sequences=8,
        compile=False,
    )
    return quantize(config).output


def card_of(directory: Path) -> tuple[dict[str, Any], str]:
    """Front matter and text."""
    _, front, text = (directory / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(front), text


def rows(text: str, title: str) -> list[list[str]]:
    """The body of the table whose header begins like this."""
    lines = text[text.index(f"| {title}") :].split("\n\n")[0].strip().splitlines()
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[2:]]


def number(text: str) -> int:
    return int(text.replace(",", ""))


@pytest.mark.parametrize("name", RECIPES)
def test_sizes_are_those_of_the_tensors(name: str, outputs: dict[str, Path]) -> None:
    _, text = card_of(outputs[name])
    tensors = load_file(outputs[name] / "model.safetensors")
    codes = load_codes(outputs[name])
    found = {row[0]: (number(row[1]), number(row[2])) for row in rows(text, "stored")}
    floats = {n: t for n, t in tensors.items() if n.rsplit("_", 1)[0] not in codes}
    floats = {n: t for n, t in floats.items() if n not in codes}
    expected = {
        "everything else, bfloat16": (
            sum(t.numel() for t in floats.values()),
            sum(t.nbytes for t in floats.values()),
        )
    }
    if codes:
        packed = [tensors.get(f"{n}_packed", tensors.get(n)) for n in codes]
        expected[f"codes of {len(codes)} weights"] = (
            sum(weight.codes.numel() for weight in codes.values()),
            sum(tensor.nbytes for tensor in packed if tensor is not None),
        )
        expected["their scales"] = (
            sum(weight.scale.numel() for weight in codes.values()),
            sum(tensors[f"{n}_scale"].nbytes for n in codes),
        )
    assert found == expected
    parameters = sum(p.numel() for p in make_llama(intermediate_size=80).parameters())
    size = sum(t.nbytes for t in tensors.values() if t.dtype is not torch.int64)
    claimed = re.search(r"of ([\d,]+) parameters in ([\d,]+) bytes \(([\d.]+) bits", text)
    assert claimed is not None
    assert (number(claimed[1]), number(claimed[2])) == (parameters, size)
    assert float(claimed[3]) == pytest.approx(8 * size / parameters, abs=0.005)


@pytest.mark.parametrize("name", RECIPES)
def test_the_recipe_is_that_of_the_codes(name: str, outputs: dict[str, Path]) -> None:
    front, text = card_of(outputs[name])
    recipe, codes = RECIPES[name], load_codes(outputs[name])
    told = dict(rows(text, " |  |"))
    for title, spec in (
        ("weights of linear layers", recipe.weights),
        ("inputs of linear layers", recipe.activations),
        ("KV cache", recipe.kv),
    ):
        if not spec.quantizes:
            assert told[title] == "not quantized"
            continue
        assert told[title].startswith(f"{spec.bits} bits, one scale per ")
        assert (
            f"codes {spec.code_min} to {spec.code_max}, scale = max / {spec.steps:g}" in told[title]
        )
    if codes:
        largest = max(int(weight.codes.abs().max()) for weight in codes.values())
        assert f"codes -{largest} to {largest}," in told["weights of linear layers"]
        scales = {w.codes.shape[1] // w.scale.shape[1] for w in codes.values()}
        per = "one scale per 16 values" if scales == {16} else "one scale per output channel"
        assert per in told["weights of linear layers"]
    assert f"# A model at {recipe.bits}\n" in text
    tag = "w4a8k8v4" if name == "4-8-K8V4" else "w{}a{}kv{}".format(*recipe.bits.split("-"))
    assert tag in front["tags"]
    assert ("values in it" in told) == (name == "4-8-K8V4")
    assert told.get("values in it", "4 bits, codes -7 to 7, scale = max / 7") == (
        "4 bits, codes -7 to 7, scale = max / 7"
    )
    declared = "quantization_config" in json.loads((outputs[name] / "config.json").read_text())
    assert ("compressed-tensors" in front["tags"]) == declared == bool(codes)


@pytest.mark.parametrize(
    ("name", "other", "same"),
    [
        ("4-8-4", ["no KV quantization (4 bits here)", "max / 127.5, where"], []),
        ("3-6-16", ["max / 31.5, where this model was trained with max / 31"], ["no KV"]),
        ("4-8-K8V4", ["no KV quantization (K8V4 bits here)"], []),
        ("groups", ["no KV quantization (4 bits here)"], ["another activation rule"]),
        ("float", ["no KV quantization", "no quantized inputs of linear layers (8 bits"], []),
        ("transformers", [], ["no KV", "other numerics"]),
    ],
)
def test_it_says_what_other_runtimes_compute(
    name: str, other: list[str], same: list[str], outputs: dict[str, Path]
) -> None:
    _, text = card_of(outputs[name])
    for words in other:
        assert text.count(words) == 2  # where it is loaded and where it is measured
    assert ("lm-eval's own `hf` model and plain transformers measure other numerics" in text) == (
        bool(other)
    )
    assert not [words for words in same if words in text]


def test_transformers_rule_is_the_one_that_the_card_tells(outputs: dict[str, Path]) -> None:
    """What it says of transformers, measured on the layer that transformers makes of it."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(outputs["4-8-4"], dtype=torch.float32)
    model(input_ids=torch.zeros((1, 2), dtype=torch.long))  # unpacks the weights
    weight = load_codes(outputs["4-8-4"])["model.layers.0.self_attn.q_proj.weight"].dequantize()
    x = torch.randn(1, 3, 32, generator=torch.Generator().manual_seed(0))
    got = model.model.layers[0].self_attn.q_proj(x)

    def rounded(steps: float, low: int) -> torch.Tensor:
        scale = x.abs().amax(-1, keepdim=True) / steps
        return (x / scale).round().clamp(low, 127) * scale @ weight.T

    torch.testing.assert_close(got, rounded(127.5, -128), rtol=0, atol=1e-5)
    assert (got - rounded(127, -127)).abs().max() > 1e-4


@pytest.mark.parametrize("name", ["4-8-4", "groups"])
def test_its_python_runs(name: str, outputs: dict[str, Path], capsys: Any) -> None:
    _, text = card_of(outputs[name])
    blocks = [b for b in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "lm_eval" not in b]
    assert len(blocks) == 2
    for block in blocks:
        load = 'qatc.load("THIS_DIRECTORY"'
        code = block.replace(load, f"{load}, compile=False")
        exec(code.replace("THIS_DIRECTORY", str(outputs[name])), {})
    assert "nce upon a time" in capsys.readouterr().out


def test_lm_eval_measures_what_the_card_says(outputs: dict[str, Path]) -> None:
    """Through ``qatc.load`` the very numbers of the integer model; by its own loader others."""
    huggingface = pytest.importorskip("lm_eval.models.huggingface")
    from lm_eval.api.instance import Instance

    _, text = card_of(outputs["4-8-4"])
    assert "HFLM(pretrained=model, tokenizer=tokenizer)" in text
    model = qatc.load(outputs["4-8-4"], compile=False)
    tokenizer = AutoTokenizer.from_pretrained(outputs["4-8-4"])
    asked, answer = "The old fox", " sleeps by the bridge"
    request = Instance("loglikelihood", {}, (asked, answer), 0)

    def measured(**options: Any) -> float:
        wrapped = huggingface.HFLM(device="cpu", **options)
        return float(wrapped.loglikelihood([request], disable_tqdm=True)[0][0])

    ids = torch.tensor([tokenizer(asked + answer)["input_ids"]])
    start = len(tokenizer(asked)["input_ids"])
    log_p = model(input_ids=ids, use_cache=False).logits.log_softmax(-1)[0, start - 1 : -1]
    expected = float(log_p.gather(1, ids[0, start:, None]).sum())
    through_qatc = measured(pretrained=model, tokenizer=tokenizer)
    assert through_qatc == pytest.approx(expected, abs=1e-4)
    assert abs(measured(pretrained=str(outputs["4-8-4"]), dtype="float32") - expected) > 1e-3


def test_a_recipe_without_an_integer_runtime_has_none_on_its_card(outputs: dict[str, Path]) -> None:
    _, text = card_of(outputs["projection"])
    assert "qatc.load" not in text and "qatc generate" not in text
    assert "qatc evaluate" in text and "one scale per token, codes -7 to 7" in text


def test_figures_are_those_of_the_run(quantized: Path) -> None:
    metadata = json.loads((quantized / "qatc.json").read_text())
    front, text = card_of(quantized)
    found = {(row[0], row[1]): row[2:] for row in rows(text, "text")}
    expected = {
        (name, model): [f"{v['perplexity']:.4g}", f"{v['kl']:.4f}", f"{v['top1_agreement']:.1%}"]
        for name, models in metadata["figures"].items()
        for model, v in models.items()
    }
    assert found == expected and len(found) == 3
    assert f"all {len(metadata['parity']['checks'])} checks passed" in text
    assert front["base_model"] == "a model" and front["license"] == "apache-2.0"
    assert front["base_model_relation"] == "quantized"
    assert front["library_name"] == "transformers"
    assert "a directory called `a model`" in text and str(quantized.parent) not in text
    made = dict(rows(text, " |  |\n| --- | --- |\n| training text"))
    assert made["training text"].startswith("24 sequences of at most 16 tokens")
    assert made["training"].startswith("2 steps of 8 rows, peak learning rate")
    assert (
        made["torch"] == torch.__version__.partition("+")[0] or made["torch"] == torch.__version__
    )


def edited(**changes: Any) -> Callable[[Path], str]:
    def card(directory: Path) -> str:
        metadata = json.loads((directory / "qatc.json").read_text()) | changes
        config = json.loads((directory / "config.json").read_text())
        return make_card(metadata, config, measure(directory))

    return card


def test_what_is_not_verified_is_not_called_so(quantized: Path) -> None:
    assert "**not been verified**" in edited(parity={"passed": None})(quantized)
    assert "**differed**" in edited(parity={"passed": False, "checks": []})(quantized)
    assert "## Figures" not in edited(figures={})(quantized)


def test_a_hub_name_is_kept(quantized: Path) -> None:
    text = edited(model="meta-llama/Llama-2-7b-hf", model_is_directory=False)(quantized)
    assert "base_model: meta-llama/Llama-2-7b-hf\n" in text
    assert "--teacher meta-llama/Llama-2-7b-hf\n" in text and "a directory called" not in text
    local = edited(model="some/where", model_is_directory=True)(quantized)
    assert "base_model: where\n" in local and "some/where" not in local


def test_a_form_for_qatc_alone_is_not_offered_to_others(quantized: Path) -> None:
    metadata = json.loads((quantized / "qatc.json").read_text())
    config = json.loads((quantized / "config.json").read_text())
    four = {"bits": 4, "group_size": None, "range": "restricted"}
    metadata["recipe"] |= {"head": four, "embedding": four | {"bits": 16}}
    groups = config["quantization_config"]["config_groups"]
    groups["group_1"] = groups["group_0"] | {"targets": ["lm_head"], "format": "another"}
    text = make_card(metadata, config, measure(quantized))
    told = dict(rows(text, " |  |"))
    per = "one scale per token of the vocabulary, codes -7 to 7, scale = max / 7"
    assert told["output head"] == f"4 bits, {per}"
    assert told["token embedding"] == "not quantized"
    assert told["stay in full precision"].endswith(", but for the output head")
    assert "library_name: qatc\n" in text and "qatc export THIS_DIRECTORY" in text
    assert "AutoModelForCausalLM" not in text and "vllm serve" not in text
    assert "plain transformers cannot load this form" in text and "qatc.load" in text


def test_bytes_in_a_name_that_are_no_text(quantized: Path) -> None:
    metadata = json.loads((quantized / "qatc.json").read_text())
    (quantized / "qatc.json").write_text(json.dumps(metadata | {"model": "/models/m\udcff"}))
    write_card(quantized)
    assert b"m\\udcff" in (quantized / "README.md").read_bytes()


@pytest.mark.parametrize(
    ("card", "license"),
    [
        (
            "---\nlicense: other\nlicense_name: odd\n---\n",
            {"license": "other", "license_name": "odd"},
        ),
        ("---\nlicense: [a, b]\n---\n", {}),
        ("---\n: [\n---\n", {}),
        ("# no front matter", {}),
        ("---\n- a\n---\n", {}),
    ],
)
def test_license(card: str, license: dict[str, str], tmp_path: Path) -> None:
    assert license_of(str(tmp_path)) == {}
    (tmp_path / "README.md").write_text(card)
    assert license_of(str(tmp_path)) == license


def test_license_of_a_hub_name_comes_from_the_cache(monkeypatch: Any, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
    cached = {("some/model", "README.md"): str(tmp_path / "README.md")}
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *key: cached.get(key))
    assert license_of("some/model") == {"license": "mit"}
    assert license_of("another/model") == {}

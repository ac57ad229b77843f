"""The written directory: what is in it, what transformers makes of it, and what is refused."""

from __future__ import annotations

import copy
import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from qatc import output as output_package
from qatc.errors import CheckpointError, ConfigError
from qatc.export.formats import export
from qatc.output import directory as directory_module
from qatc.output.codes import QuantizedWeight
from qatc.output.contents import Output
from qatc.output.directory import write_output
from qatc.output.reading import (
    load_codes,
    load_reference,
    open_output,
    read_metadata,
)
from qatc.recipe.recipe import Recipe

W4A8 = Recipe.from_bits("4-8-4")
OLD = '{"format_version": 2, "recipe": {}}'
IDS = torch.randint(0, 97, (2, 19), generator=torch.Generator().manual_seed(1))


def make_model(
    *, tied: bool = True, width: int = 52, dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=width,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=97,
        tie_word_embeddings=tied,
        initializer_range=0.2,
    )
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.eval()


def quantized_linears(model: nn.Module) -> dict[str, nn.Linear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"}


def quantize(model: nn.Module, recipe: Recipe) -> dict[str, QuantizedWeight]:
    if not recipe.weights.quantizes:
        return {}
    return {
        f"{name}.weight": QuantizedWeight.from_float(linear.weight, recipe.weights)
        for name, linear in quantized_linears(model).items()
    }


def write(
    directory: Path, model: PreTrainedModel, recipe: Recipe, **changes: Any
) -> dict[str, QuantizedWeight]:
    directory.mkdir()
    arguments: dict[str, Any] = {
        "config": model.config,
        "state": model.state_dict(),
        "weights": quantize(model, recipe),
        "recipe": recipe,
        "metadata": {"source": "a tiny model"},
    }
    given = arguments | changes
    own = ("tokenizer", "max_shard_bytes", "portable")
    options = {name: given.pop(name) for name in own if name in given}
    write_output(directory, Output(**given), **options)
    weights: dict[str, QuantizedWeight] = given["weights"]
    return weights


def stored_tensors(directory: Path) -> dict[str, Tensor]:
    return {
        name: value
        for path in sorted(directory.glob("*.safetensors"))
        for name, value in load_file(path).items()
    }


def assert_same_codes(
    actual: dict[str, QuantizedWeight], expected: dict[str, QuantizedWeight]
) -> None:
    assert actual.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(actual[name].codes, weight.codes)
        assert torch.equal(actual[name].scale, weight.scale)
        assert actual[name].spec == weight.spec


def logits(model: PreTrainedModel, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(ids).logits
    return result


def quantize_inputs_as_transformers_does(model: PreTrainedModel) -> None:
    """8 bits, one scale per token: amax / 127.5, codes -128 to 127."""

    def hook(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        scale = args[0].abs().amax(dim=-1, keepdim=True) / 127.5
        return (torch.round(args[0] / scale).clamp(-128, 127) * scale,)

    for linear in quantized_linears(model).values():
        linear.register_forward_pre_hook(hook)


# What a runtime makes of it


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("bits", "group_size", "width"),
    [
        ("4-8-4", None, 52),  # 52 values do not fill the last word
        ("4-8-4", 32, 96),
        ("3-8-16", 4, 52),
        ("8-8-8", None, 52),
        ("6-16-16", 4, 52),
        ("4-16-16", None, 52),
    ],
)
def test_transformers_computes_the_reference_under_its_own_activation_rule(
    tmp_path: Path, bits: str, group_size: int | None, width: int, tied: bool
) -> None:
    recipe = Recipe.from_bits(bits, group_size=group_size)
    weights = write(tmp_path / "out", make_model(tied=tied, width=width), recipe)

    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    actual = logits(loaded)

    reference = load_reference(tmp_path / "out")
    without_activations = logits(reference)
    if recipe.activations.quantizes:
        quantize_inputs_as_transformers_does(reference)
        assert (actual - without_activations).abs().max() > 1e-3
    torch.testing.assert_close(actual, logits(reference), rtol=0, atol=1e-5)
    torch.testing.assert_close(
        logits(loaded, IDS[:1, :1]), logits(reference, IDS[:1, :1]), rtol=0, atol=1e-5
    )

    state = loaded.state_dict()  # decompressed by the forward above
    for name, weight in weights.items():
        assert torch.equal(state[name], weight.dequantize())
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_transformers_dequantizes_exactly_in_half_precision(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    weights = write(tmp_path / "out", make_model(dtype=dtype), W4A8)
    stored = stored_tensors(tmp_path / "out")
    assert {v.dtype for k, v in stored.items() if k.endswith("_scale")} == {dtype}

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    logits(loaded)
    assert loaded.dtype == dtype
    for name, weight in weights.items():
        assert torch.equal(loaded.state_dict()[name], weight.dequantize(dtype))


def test_a_float_model_is_written_as_it_is(tmp_path: Path) -> None:
    model = make_model()
    write(tmp_path / "out", model, Recipe.from_bits("16-8-4"))
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())
    assert read_metadata(tmp_path / "out")["layout"] == "float"
    assert load_codes(tmp_path / "out") == {}
    for read in (AutoModelForCausalLM.from_pretrained, load_reference):
        assert torch.equal(logits(read(tmp_path / "out")), logits(model))


# What is in it


@pytest.mark.parametrize("bits", ["4-8-4", "2-8-4", "8-8-8"])
def test_no_float_copy_of_a_quantized_weight_is_written(tmp_path: Path, bits: str) -> None:
    recipe = Recipe.from_bits(bits)
    weights = write(tmp_path / "out", make_model(width=64), recipe)
    stored = stored_tensors(tmp_path / "out")
    floats = {name for name, value in stored.items() if value.is_floating_point()}
    norms = {name for name in stored if name.endswith("norm.weight")}
    scales = {f"{name}_scale" for name in weights}
    assert floats == scales | norms | {"model.embed_tokens.weight"}
    for name, weight in weights.items():
        codes = stored[name if recipe.weights.bits == 8 else f"{name}_packed"]
        rows, width = weight.codes.shape
        assert codes.nbytes == rows * width // (1 if recipe.weights.bits == 8 else 2)


def test_codes_recipe_and_metadata_are_read_back(tmp_path: Path) -> None:
    model = make_model()
    weights = write(tmp_path / "out", model, W4A8, metadata={"seed": 3, "quantized": "ours wins"})
    assert_same_codes(load_codes(tmp_path / "out"), weights)
    assert open_output(tmp_path / "out").recipe == W4A8
    metadata = read_metadata(tmp_path / "out")
    stored = {**weights, **open_output(tmp_path / "out").state}
    assert {**metadata.pop("digests"), **metadata.pop("float_digests")}.keys() == stored.keys()
    assert metadata == {
        "seed": 3,
        "format_version": 3,
        "layout": "pack-quantized",
        "recipe": W4A8.to_dict(),
        "quantized": sorted(weights),
        "specs": {},
    }
    state = open_output(tmp_path / "out").state
    expected = {n: v for n, v in model.state_dict().items() if n not in weights}
    del expected["lm_head.weight"]
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], value) for name, value in expected.items())


def test_the_config_is_replaced_in_the_file_only(tmp_path: Path) -> None:
    model = make_model(dtype=torch.bfloat16)
    model.config.quantization_config = {"quant_method": "another", "bits": 3}
    before = copy.deepcopy(model.config.to_dict())
    write(tmp_path / "out", model, W4A8)
    assert model.config.to_dict() == before
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    assert config["quantization_config"]["ignore"] == ["lm_head"]
    assert config["dtype"] == "bfloat16"
    assert config["architectures"] == ["LlamaForCausalLM"]


def test_layers_that_stay_float_are_ignored(tmp_path: Path) -> None:
    model = make_model()
    weights = {n: w for n, w in quantize(model, W4A8).items() if ".layers.0." not in n}
    write(tmp_path / "out", model, W4A8, weights=weights)
    config = json.loads((tmp_path / "out/config.json").read_text())
    expected = {n for n in quantized_linears(model) if ".layers.0." in n} | {"lm_head"}
    assert set(config["quantization_config"]["ignore"]) == expected
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(loaded.state_dict()[name], model.state_dict()[name])


def test_files_carry_the_pt_format_and_are_readable_by_all(tmp_path: Path) -> None:
    write(tmp_path / "out", make_model(), W4A8)
    with safe_open(tmp_path / "out/model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    modes = {path.stat().st_mode for path in (tmp_path / "out").iterdir()}
    assert len(modes) == 1


def make_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {"<unk>": 0, "a": 1, "b": 2}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>")),
        unk_token="<unk>",
    )


def test_tokenizer_and_generation_config_are_saved(tmp_path: Path) -> None:
    # A temperature without sampling: transformers refuses to save what many models ship.
    generation = GenerationConfig(max_new_tokens=7, do_sample=False, temperature=0.5)
    write(
        tmp_path / "out",
        make_model(),
        W4A8,
        tokenizer=make_tokenizer(),
        generation_config=generation,
    )
    assert AutoTokenizer.from_pretrained(tmp_path / "out").encode("b") == [2]
    read = GenerationConfig.from_pretrained(tmp_path / "out")
    assert (read.max_new_tokens, read.temperature) == (7, 0.5)


# Tied weights


def test_a_tied_weight_is_written_once(tmp_path: Path) -> None:
    model = make_model()
    write(tmp_path / "both", model, W4A8)
    state = {n: v for n, v in model.state_dict().items() if n != "model.embed_tokens.weight"}
    write(tmp_path / "head", model, W4A8, state=state)
    for out in (tmp_path / "both", tmp_path / "head"):
        assert "lm_head.weight" not in stored_tensors(out)
        assert "model.embed_tokens.weight" in stored_tensors(out)


def test_untied_weights_that_share_storage_are_both_written(tmp_path: Path) -> None:
    model = make_model(tied=False)
    state = model.state_dict()
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    write(tmp_path / "out", model, W4A8, state=state)
    stored = stored_tensors(tmp_path / "out")
    assert torch.equal(stored["lm_head.weight"], stored["model.embed_tokens.weight"])


def test_tied_weights_that_differ_are_a_bug(tmp_path: Path) -> None:
    state = dict(make_model().state_dict())
    state["lm_head.weight"] = state["lm_head.weight"] + 1
    with pytest.raises(AssertionError, match="lm_head"):
        write(tmp_path / "out", make_model(), W4A8, state=state)


def test_a_tied_weight_cannot_be_quantized(tmp_path: Path) -> None:
    model = make_model()
    weights = quantize(model, W4A8)
    head = model.state_dict()["lm_head.weight"]
    weights["lm_head.weight"] = QuantizedWeight.from_float(head, W4A8.weights)
    with pytest.raises(ConfigError, match=r"lm_head\.weight.*tied.*skip"):
        write(tmp_path / "out", model, W4A8, weights=weights)


# Shards


def test_shards_hold_what_one_file_holds(tmp_path: Path) -> None:
    model = make_model()
    weights = write(tmp_path / "one", model, W4A8)
    write(tmp_path / "many", model, W4A8, max_shard_bytes=5_000)
    one, many = stored_tensors(tmp_path / "one"), stored_tensors(tmp_path / "many")
    assert one.keys() == many.keys()
    assert all(torch.equal(one[name], many[name]) for name in one)

    index = json.loads((tmp_path / "many/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in one.values())
    assert index["weight_map"].keys() == one.keys()
    files = sorted(path.name for path in (tmp_path / "many").glob("*.safetensors"))
    assert sorted(set(index["weight_map"].values())) == files
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    for file in files:
        shard = load_file(tmp_path / "many" / file)
        assert len(shard) == 1 or sum(value.nbytes for value in shard.values()) <= 5_000

    assert_same_codes(load_codes(tmp_path / "many"), weights)
    loaded = [AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("one", "many")]
    assert torch.equal(logits(loaded[0]), logits(loaded[1]))
    assert torch.equal(
        logits(load_reference(tmp_path / "one")), logits(load_reference(tmp_path / "many"))
    )


# What is refused


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pristine")
    write(root / "one", make_model(), W4A8)
    write(root / "many", make_model(), W4A8, max_shard_bytes=5_000)
    return root


def edit_metadata(**changes: Any) -> Callable[[Path], None]:
    def edit(out: Path) -> None:
        metadata = json.loads((out / "qatc.json").read_text())
        (out / "qatc.json").write_text(json.dumps(metadata | changes))

    return edit


def cut(pattern: str) -> Callable[[Path], None]:
    def edit(out: Path) -> None:
        (path,) = out.glob(pattern)
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])

    return edit


def remove(pattern: str) -> Callable[[Path], None]:
    def edit(out: Path) -> None:
        (path,) = out.glob(pattern)
        path.unlink()

    return edit


def drop_tensor(part: str) -> Callable[[Path], None]:
    def edit(out: Path) -> None:
        path = out / "model.safetensors"
        kept = {name: value for name, value in load_file(path).items() if part not in name}
        save_file(kept, path)

    return edit


@pytest.mark.parametrize(
    ("kind", "damage", "message"),
    [
        ("one", shutil.rmtree, "is not a directory"),
        ("one", remove("qatc.json"), "no output of qatc.*qatc quantize"),
        ("one", cut("qatc.json"), "not valid JSON"),
        ("one", lambda out: (out / "qatc.json").write_text("3"), "damaged"),
        ("one", lambda out: (out / "qatc.json").write_text('{"format_version": 2}'), "damaged"),
        ("one", edit_metadata(format_version=4), "format_version 4.*reads 2 and 3"),
        ("one", edit_metadata(recipe={"weight": 4}), "unknown key 'weight'"),
        ("one", edit_metadata(recipe=None), "qatc.json"),
        ("one", cut("model.safetensors"), "damaged or cut off"),
        ("one", remove("model.safetensors"), "model.safetensors is missing"),
        ("one", drop_tensor("0.mlp.up_proj.weight_scale"), "no tensor .*up_proj.weight_scale"),
        ("one", edit_metadata(recipe=Recipe.from_bits("8-8-4").to_dict()), "no tensor .*weight;"),
        (
            "one",
            edit_metadata(recipe=Recipe.from_bits("4-8-4", group_size=4).to_dict()),
            "does not belong to this recipe",
        ),
        ("many", remove("model-00002-*"), r"model-00002-of-\d+\.safetensors is missing"),
        ("many", cut("model-00002-*"), r"model-00002-of-\d+\.safetensors is damaged"),
        ("many", cut("model.safetensors.index.json"), "index.json.*not valid JSON"),
        (
            "many",
            lambda out: (out / "model.safetensors.index.json").write_text("{}"),
            "no tensor",
        ),
    ],
)
def test_a_damaged_directory_is_refused_in_one_line(
    tmp_path: Path, pristine: Path, kind: str, damage: Callable[[Path], Any], message: str
) -> None:
    out = tmp_path / "out"
    shutil.copytree(pristine / kind, out)
    assert load_codes(out)
    damage(out)
    for read in (load_codes, load_reference):
        with pytest.raises(CheckpointError, match=message) as error:
            read(out)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (drop_tensor("model.norm"), r"1 are missing or left over.*model\.norm\.weight"),
        (remove("config.json"), "cannot read the config"),
        (cut("config.json"), "cannot read the config"),
    ],
)
def test_a_reference_of_another_model_is_refused(
    tmp_path: Path, pristine: Path, damage: Callable[[Path], Any], message: str
) -> None:
    out = tmp_path / "out"
    shutil.copytree(pristine / "one", out)
    damage(out)
    with pytest.raises(CheckpointError, match=message) as error:
        load_reference(out)
    assert "\n" not in str(error.value)


def test_weights_that_cannot_be_written_are_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise SafetensorError("No space left on device")

    monkeypatch.setattr(directory_module, "save_file", fail)
    with pytest.raises(CheckpointError, match=r"cannot write .*model\.safetensors.*No space"):
        write(tmp_path / "out", make_model(), W4A8)


@pytest.mark.parametrize("suffix", ["_scale", ""])
def test_a_stored_tensor_that_is_no_number_is_named(
    tmp_path: Path, pristine: Path, suffix: str
) -> None:
    out = Path(shutil.copytree(pristine / "one", tmp_path / "out"))
    name = "model.layers.0.mlp.up_proj.weight_scale" if suffix else "model.norm.weight"
    tensors = load_file(out / "model.safetensors")
    tensors[name][0] = float("nan")
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"the tensor {name} of .* holds 1 values"):
        load_reference(out)


# load_reference


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
def test_the_reference_holds_code_times_scale(
    tmp_path: Path, tied: bool, dtype: torch.dtype
) -> None:
    model = make_model(tied=tied)
    weights = write(tmp_path / "out", model, W4A8)
    reference = load_reference(tmp_path / "out", dtype=dtype)
    assert type(reference) is type(model)
    assert not reference.training
    assert not hasattr(reference.config, "quantization_config")
    for name, value in reference.state_dict().items():
        source = weights[name].dequantize() if name in weights else model.state_dict()[name]
        assert torch.equal(value, source.to(dtype)), name
    assert (reference.lm_head.weight is reference.model.embed_tokens.weight) == tied


# export


def snapshot(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize("bits", ["4-8-4", "8-16-16", "16-16-16"])
def test_export_writes_the_same_model_again(tmp_path: Path, bits: str) -> None:
    write(
        tmp_path / "source",
        make_model(),
        Recipe.from_bits(bits),
        tokenizer=make_tokenizer(),
        generation_config=GenerationConfig(max_new_tokens=7),
    )
    assert export(tmp_path / "source", tmp_path / "out") == tmp_path / "out"
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "source")


def test_export_of_shards_leaves_no_file_of_theirs(tmp_path: Path, pristine: Path) -> None:
    export(pristine / "many", tmp_path / "out")
    assert snapshot(tmp_path / "out") == snapshot(pristine / "one")


def test_export_refuses_an_unknown_format(tmp_path: Path, pristine: Path) -> None:
    with pytest.raises(ConfigError, match=r"'gguf'; valid formats: compressed-tensors"):
        export(pristine / "one", tmp_path / "out", format="gguf")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("output", ["one", "../{name}/one", "."])
def test_export_refuses_to_replace_its_source(pristine: Path, output: str) -> None:
    before = snapshot(pristine / "one")
    path = pristine / output.format(name=pristine.name)
    with pytest.raises(ConfigError, match="would replace the source"):
        export(pristine / "one", path, overwrite=True)
    assert snapshot(pristine / "one") == before


def test_export_writes_nothing_into_its_source(pristine: Path) -> None:
    before = snapshot(pristine / "one")
    with pytest.raises(ConfigError, match="lies in the source"):
        export(pristine / "one", pristine / "one" / "exported")
    assert snapshot(pristine / "one") == before


def test_export_replaces_nothing_but_outputs(tmp_path: Path, pristine: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").write_text("mine")
    with pytest.raises(ConfigError, match="is no output of qatc"):
        export(pristine / "one", tmp_path / "model", overwrite=True)
    assert snapshot(tmp_path / "model") == {"model.safetensors": b"mine"}


def test_two_exports_at_once(tmp_path: Path, pristine: Path) -> None:
    refused: list[str] = []

    def second() -> None:
        try:
            export(pristine / "one", tmp_path / "out")
        except ConfigError as error:
            refused.append(str(error))

    def start_another(source: Path) -> None:
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()

    export(pristine / "one", tmp_path / "out", verify=start_another)
    assert "is being written by process" in refused[0]
    assert snapshot(tmp_path / "out") == snapshot(pristine / "one")


def test_export_replaces_an_existing_output_only_when_told(tmp_path: Path, pristine: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "qatc.json").write_text(OLD)
    with pytest.raises(ConfigError, match="--overwrite"):
        export(pristine / "one", out)
    assert snapshot(out) == {"qatc.json": OLD.encode()}
    export(pristine / "one", out, overwrite=True)
    assert snapshot(out) == snapshot(pristine / "one")


def test_a_failed_export_leaves_the_output_as_it_was(
    tmp_path: Path, pristine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "qatc.json").write_text(OLD)

    def fail(*args: Any, **kwargs: Any) -> None:
        raise SafetensorError("No space left on device")

    monkeypatch.setattr(directory_module, "save_file", fail)
    with pytest.raises(CheckpointError, match="No space"):
        export(pristine / "one", out, overwrite=True)
    assert snapshot(out) == {"qatc.json": OLD.encode()}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_package_re_exports_the_api() -> None:
    for name in output_package.__all__:
        assert hasattr(output_package, name)

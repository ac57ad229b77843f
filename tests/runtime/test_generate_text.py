"""Writing text: the settings a model brings along, what ends a text, and what is no prompt."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from qatc.errors import CheckpointError, ConfigError, DataError
from qatc.recipe.recipe import Recipe
from qatc.runtime.generate_text import Writer
from tests.conftest import make_llama, make_output, make_tokenizer
from tests.runtime.test_text_stream import WORDS, sentencepiece_like

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}"
    "{% endif %}<|{{ m.role }}|>{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a chat template whose end of a turn is not the model's end of a text."""
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens(
        {"additional_special_tokens": ["<|user|>", "<|assistant|>", "<|end|>"]}
    )
    tokenizer.add_tokens(["<think>"])
    tokenizer.chat_template = TEMPLATE
    path = tmp_path_factory.mktemp("writing") / "out"
    return make_output(path, Recipe.from_bits("8-8-8"), make_llama(len(tokenizer)), tokenizer)


def with_settings(output: Path, copy: Path, **settings: Any) -> Path:
    shutil.copytree(output, copy)
    file = copy / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    return copy


def writer(model: Path, **options: Any) -> Writer:
    defaults: dict[str, Any] = {
        "compile": False,
        "max_new_tokens": 8,
        "temperature": 0.0,
        "device": "cpu",
    }
    return Writer(model, **(defaults | options))


def always(writer: Writer, tokens: Sequence[int]) -> Writer:
    """Let a model say these tokens, one after the other, and the last one for ever."""
    forward, said = writer.model.forward, iter(tokens)
    last = tokens[-1]

    def says(*args: Any, **kwargs: Any) -> Any:
        out = forward(*args, **kwargs)
        out.logits = torch.zeros_like(out.logits)
        out.logits[..., next(said, last)] = 9.0
        return out

    writer.model.forward = says
    return writer


@pytest.fixture(scope="module")
def plain_text(output: Path) -> str:
    """What the model writes without settings of its own."""
    plain = writer(output)
    assert plain.left_out == {}
    return plain.write("The old").text


@pytest.mark.parametrize(
    "settings",
    [
        {"return_dict_in_generate": True},
        {"return_dict_in_generate": True, "output_scores": True, "output_logits": True},
        {"num_return_sequences": 3},
        {"num_beams": 4, "early_stopping": True, "length_penalty": 0.5},
        {"cache_implementation": "static"},
        {"cache_implementation": "quantized", "cache_config": {"backend": "quanto"}},
        {"prompt_lookup_num_tokens": 3},
        {"assistant_early_exit": 1},
        {"guidance_scale": 1.5},
        {"penalty_alpha": 0.6, "low_memory": True},
        {"dola_layers": "low"},
        {"forced_bos_token_id": 5, "output_attentions": True},
        {"max_time": 0.0001, "min_length": 30, "token_healing": True},
        {"chat_format": "odd", "assistant": "some/model"},
        {"watermarking_config": {"bias": 2.0, "greenlist_ratio": 0.3}},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_settings_that_are_not_supported_change_nothing_and_are_told(
    settings: dict[str, Any], output: Path, plain_text: str, tmp_path: Path
) -> None:
    odd = writer(with_settings(output, tmp_path / "odd", **settings))
    assert odd.left_out == settings
    assert odd.write("The old").text == plain_text


def test_options_decide_over_the_model(output: Path, plain_text: str, tmp_path: Path) -> None:
    own = {"do_sample": True, "temperature": 9.0, "top_p": 0.1, "max_new_tokens": 1, "top_k": 3}
    model = with_settings(output, tmp_path / "own", **own, max_length=4)
    odd = writer(model)
    assert odd.left_out == {} and odd.write("The old").text == plain_text
    assert writer(model, temperature=1.0).settings["top_k"] == 3


def test_supported_settings_are_kept(output: Path, tmp_path: Path) -> None:
    tokens = writer(output).tokenizer(writer(output).write("The old").text)["input_ids"]
    banned = sorted(set(tokens))
    odd = writer(with_settings(output, tmp_path / "odd", suppress_tokens=banned))
    found = odd.tokenizer(odd.write("The old").text, add_special_tokens=False)["input_ids"]
    assert found and not set(found) & set(banned)


def test_values_that_generation_refuses_are_named(output: Path, tmp_path: Path) -> None:
    odd = writer(with_settings(output, tmp_path / "odd", repetition_penalty=-1.0))
    with pytest.raises(ConfigError, match=r"'repetition_penalty': -1.0.*generation_config.json"):
        odd.write("The old")
    (tmp_path / "odd" / "generation_config.json").write_text("{")
    with pytest.raises(CheckpointError, match="generation_config.json is not valid JSON"):
        writer(tmp_path / "odd")


def test_stop_strings_of_options_and_of_the_model(output: Path, tmp_path: Path) -> None:
    says = writer(output).tokenizer("fox waits by the river", add_special_tokens=False)["input_ids"]
    odd = with_settings(output, tmp_path / "odd", stop_strings="by")
    for found in (
        always(writer(output, stop=["by"], max_new_tokens=30), says).write("The"),
        always(writer(odd, max_new_tokens=30), says).write("The"),
    ):
        assert found.text == "fox waits " and found.new_tokens < 30
    marked = with_settings(output, tmp_path / "marked", stop_strings=["<|end|>"])
    end = writer(output).tokenizer.convert_tokens_to_ids("<|end|>")
    assert always(writer(marked), [says[0], end]).write("The").new_tokens == 2
    with pytest.raises(ConfigError, match="must not be empty"):
        writer(output, stop=[""])


def test_a_turn_ends_where_the_template_ends_it(output: Path) -> None:
    one = writer(output)
    ids = one.tokenizer.convert_tokens_to_ids
    says = [ids("<think>"), *one.tokenizer(" fox", add_special_tokens=False)["input_ids"]]
    shown: list[str] = []
    turns = [{"role": "user", "content": "who?"}]
    found = always(one, [*says, ids("<|end|>"), says[1]]).answer(turns, shown.append)
    assert found.text == "".join(shown) == "<think> fox"
    assert found.new_tokens == len(says) + 1
    with pytest.raises(ConfigError, match="refuses the conversation: no system"):
        one.answer([{"role": "system", "content": "x"}])


def test_the_space_in_front_of_the_first_word(tmp_path: Path) -> None:
    tokenizer = sentencepiece_like()
    model = make_llama(259 + len(WORDS))
    path = make_output(tmp_path / "out", Recipe.from_bits("8-8-8"), model, tokenizer)
    says = tokenizer.convert_tokens_to_ids(["▁is", "▁Paris", ".", "</s>"])
    shown: list[str] = []
    one = always(writer(path), says)
    one.ends = {tokenizer.convert_tokens_to_ids("</s>")}
    assert one.write("The fox", shown.append).text == " is Paris."
    assert "".join(shown) == "The fox is Paris."
    tokenizer.chat_template = TEMPLATE
    one = always(writer(path), says)
    one.tokenizer.chat_template = TEMPLATE
    one.ends = {tokenizer.convert_tokens_to_ids("</s>")}
    assert one.answer([{"role": "user", "content": "where?"}]).text == "is Paris."


def test_prompts_that_are_none(output: Path) -> None:
    one = writer(output)
    says = r"the prompt 'caf\\udce9' is not UTF-8"
    with pytest.raises(ConfigError, match=says):
        one.write("caf\udce9")
    with pytest.raises(ConfigError, match=says):
        one.answer([{"role": "user", "content": "caf\udce9"}])
    one.tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    with pytest.raises(DataError, match=r"holds the token '\[PAD\]', number 116.* 116 tokens only"):
        one.write("The [PAD] fox")
    # As Python reads UTF-8 where it takes the terminal to be ASCII.
    shown: list[str] = []
    one.write("caf\udcc3\udca9", shown.append)
    assert shown[0] == "caf\u00e9"
    with pytest.raises(ConfigError, match="the stop string .* is not UTF-8"):
        writer(output, stop=["\udcff"])
    assert one.write("The fox").new_tokens > 0
    assert one.write("").new_tokens > 0


@pytest.mark.parametrize("seed", [-1, 2**43, 2**64, 10**30])
def test_any_whole_number_is_a_seed(seed: int, output: Path) -> None:
    one = writer(output, seed=seed, temperature=1.0)
    assert one.write("The").text == one.write("The").text

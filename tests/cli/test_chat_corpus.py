"""``--strategy chat``: conversations by a chat template, and a training on their answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qatc.data.corpus import Corpus
from tests.cli.conftest import TINY, refused, run
from tests.conftest import make_llama, make_tokenizer, save

TEMPLATE = (
    "<s>{% for m in messages %}{{ ('<|ask|>' if m.role == 'user' else '<|say|>') + m.content }}"
    "</s>{% endfor %}{% if add_generation_prompt %}<|say|>{% endif %}"
)


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|ask|>", "<|say|>"]})
    tokenizer.chat_template = TEMPLATE
    model = make_llama(114, eos_token_id=list(range(1, 12)))  # some messages are short
    return save(tmp_path_factory.mktemp("models") / "chatty", model, tokenizer)


@pytest.fixture(scope="module")
def corpus(chat_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("chat") / "corpus"
    command: list[Any] = ["generate-data", "--model", chat_model, "--output", target]
    command += ["--strategy", "chat", "--turns", "1", "--samples", "40", "--max-length", "24"]
    result = run(*command, "--no-compile", "--batch-size", "8", "--preview", "2")
    assert result.exit_code == 0, result.output
    tokens = sum(s["answer_tokens"] for s in Corpus.open(target).manifest["shards"])
    assert f" ({tokens:,} in answers) in 1 shards" in result.stdout
    assert "<s><|ask|>" in result.stdout and "</s><|say|>" in result.stdout
    return target


def test_inspect_and_evaluate(chat_model: Path, corpus: Path) -> None:
    answers = Corpus.open(corpus).manifest["shards"][0]["answer_tokens"]
    shown = " ".join(run("inspect", corpus).stdout.replace("│", " ").split())
    assert f"of answers {answers}, at most 1 a conversation" in shown
    assert "strategy chat, seed 0" in shown
    command = ["evaluate", chat_model, "--data", corpus, "--teacher", chat_model, "--no-compile"]
    found = json.loads(run(*command, "--length", 24, "--json").stdout)
    assert (found["tokens"], found["kl"]) == (answers, 0)


@pytest.mark.parametrize("loss_on", [None, "all"])
def test_trained_on(chat_model: Path, corpus: Path, tmp_path: Path, loss_on: str | None) -> None:
    command = ["quantize", "--model", chat_model, "--data", corpus, "--output", tmp_path / "out"]
    command += [*TINY, "--max-length", "24", "--no-verify", "--json"]
    result = run(*command, *(["--loss-on", loss_on] if loss_on else []))
    assert result.exit_code == 0, result.output
    figures = json.loads(result.stdout)["figures"]["generated"]
    held_out = Corpus.open(corpus).rows(24, slice(-8, None))
    assert figures["QAT"]["tokens"] == held_out.counted.sum(), "figures are of answers"
    trained = Corpus.open(corpus).rows(24, slice(None, -8), answers_only=not loss_on)
    other = Corpus.open(corpus).rows(24, slice(None, -8), answers_only=bool(loss_on))
    assert round(trained.utilization, 4) != round(other.utilization, 4), "or this shows nothing"
    made = json.loads((tmp_path / "out" / "qatc.json").read_text())
    assert made["row_utilization"] == round(trained.utilization, 4)
    report = (tmp_path / "out" / "report.md").read_text()
    assert "those of the answers in held-out conversations" in report
    assert f"loss `logits` on {'all tokens' if loss_on else 'answers'}," in report
    assert ("loss-on: all" in (tmp_path / "out" / "run.yaml").read_text()) == bool(loss_on)


def test_written_by_quantize(chat_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ["quantize", "--model", chat_model, "--output", out, *TINY, "--max-length", "20"]
    result = run(*command, "--strategy", "chat", "--method", "rtn", "--no-verify", "--json")
    assert result.exit_code == 0, result.output
    assert Corpus.open(tmp_path / "out.data").is_chat
    assert "strategy chat" in (out / "README.md").read_text()


def test_refused(shared_model_path: Path, chat_model: Path, corpus: Path, tmp_path: Path) -> None:
    out = ["--output", tmp_path / "out"]
    for command in ("generate-data", "quantize"):
        plain = [command, "--model", shared_model_path, *out, "--max-length", 24]
        refused(2, "has no chat template", *plain, "--strategy", "chat")
    quantize = ["quantize", "--model", chat_model, *out, *TINY]
    refused(2, "leave out --loss-on answers", *quantize, "--loss-on", "answers")
    refused(2, "must be answers or all; got 'users'", *quantize, "--loss-on", "users")
    refused(2, "leave --turns out", *quantize, "--turns", 2)
    generate = ["generate-data", "--model", chat_model, *out, "--strategy", "chat"]
    refused(2, "raise --max-length", *generate, "--max-length", 5, "--no-compile")
    refused(2, "leave out --turns", *generate[:-2], "--from-text", corpus, "--turns", 2)
    assert not list(tmp_path.iterdir())

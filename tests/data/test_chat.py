"""Conversations: what a template puts between turns, and what the model writes into it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qatc.data import corpus as data
from qatc.data.chat import ChatFormat, Turn
from qatc.data.config import CorpusConfig
from qatc.data.corpus import Corpus
from qatc.data.generate import generate_corpus
from qatc.data.sampling import sequence_random
from qatc.data.shards import read_answers
from qatc.errors import ConfigError, DataError
from qatc.models.load import LoadedModel
from qatc.storage.files import write_json
from tests.conftest import contents, kill_at_call, make_llama, make_tokenizer, run_until_killed

CONFIG = CorpusConfig(
    sequences=24, max_length=60, batch_size=5, shard_size=10, seed=3, strategy="chat"
)
USER, BOT, END, OTHER = 112, 113, 114, 115
NAMES = {"user": "<|user|>", "assistant": "<|bot|>"}
TEMPLATE = (
    "{{ '<s>The old fox' }}{% for m in messages %}"
    "{{ ('<|user|>' if m.role == 'user' else '<|bot|>') + m.content + '<|end|>by' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|bot|>' }}{% endif %}"
)


def make_chat_tokenizer(template: str = TEMPLATE) -> Any:
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens(
        {"additional_special_tokens": ["<|user|>", "<|bot|>", "<|end|>", "<|other|>"]}
    )
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(scope="module")
def chat_tokenizer() -> Any:
    return make_chat_tokenizer()


def make_chatter(end: float) -> LoadedModel:
    """A model that begins no turn of its own; ``end`` is added to the logits that end one.

    It is in fp64, so that a plain forward pass leads to the same tokens.
    """
    model = make_llama(116, tie_word_embeddings=False)
    liking = torch.zeros(116, dtype=torch.float64)
    liking[[0, USER, BOT]], liking[[1, END, OTHER]] = -torch.inf, end
    model.lm_head.register_forward_hook(lambda head, args, logits: logits + liking)
    model.generation_config.eos_token_id = [1, OTHER]
    return LoadedModel(model.double(), "chatty", torch.float64)


@pytest.fixture(scope="module")
def chatter() -> LoadedModel:
    return make_chatter(0.2)


Write = Callable[..., Corpus]


@pytest.fixture(scope="module")
def talk(chatter: LoadedModel, chat_tokenizer: Any) -> Write:
    def talk(output: Path, config: CorpusConfig = CONFIG, **changes: Any) -> Corpus:
        given = {"teacher": chatter, "tokenizer": chat_tokenizer, "compile": False} | changes
        return generate_corpus(output=output, config=config, **given)

    return talk


@pytest.fixture(scope="module")
def talked(tmp_path_factory: pytest.TempPathFactory, talk: Write) -> Corpus:
    """The corpus of an uninterrupted run."""
    return talk(tmp_path_factory.mktemp("chat") / "whole")


def reference(
    model: Any, tokenizer: Any, config: CorpusConfig, number: int
) -> tuple[list[int], list[bool]]:
    """A conversation and its answers, one plain forward pass for every token."""
    ids = tokenizer("The old fox", add_special_tokens=False)["input_ids"]
    by = tokenizer("by", add_special_tokens=False)["input_ids"]
    random = sequence_random(config.seed, number)
    low, high = config.greedy_tokens
    greedy = low + int(random.random() * (high - low + 1))
    uniform = random.random(config.max_length)
    found, marks = [0, *ids, USER], [False] * (len(ids) + 2)
    answering, own, turns = False, 0, 0
    while len(found) < config.max_length:
        with torch.no_grad():
            logits = model(torch.tensor([found])).logits[0, -1]
        cumulative = logits.softmax(-1).cumsum(-1)
        token = int((cumulative <= uniform[len(found)] * cumulative[-1]).sum())
        if answering and own < greedy:
            token = int(logits.argmax())
        found.append(token)
        marks.append(answering)
        own += 1
        if token not in (1, END, OTHER):
            continue
        turns += answering
        if answering and (token != END or turns == config.turns):
            break
        behind = [END, *by, USER if answering else BOT]
        if len(found) - 1 + len(behind) >= config.max_length:
            break
        found[-1:] = behind
        marks += [False] * (len(behind) - 1)
        answering, own = not answering, 0
    return found, marks


def marks_of(corpus: Corpus) -> list[list[bool]]:
    shards = corpus.manifest["shards"]
    return [a.tolist() for shard in shards for a in read_answers(corpus.path, shard)]


class TestConversations:
    @pytest.mark.parametrize(
        "change",
        [
            {},
            {"turns": 1, "greedy_tokens": (0, 0)},
            {"turns": 2, "batch_size": 1, "max_length": 33},
        ],
    )
    def test_as_a_plain_loop_writes_them(
        self,
        tmp_path: Path,
        talk: Write,
        chatter: LoadedModel,
        chat_tokenizer: Any,
        change: dict[str, Any],
    ) -> None:
        config = replace(CONFIG, **change)
        corpus = talk(tmp_path / "corpus", config)
        wanted = [reference(chatter.model, chat_tokenizer, config, n) for n in range(24)]
        assert [s.tolist() for s in corpus.sequences()] == [tokens for tokens, _ in wanted]
        assert marks_of(corpus) == [marks for _, marks in wanted]
        answers = sum(sum(marks) for _, marks in wanted)
        assert sum(s["answer_tokens"] for s in corpus.manifest["shards"]) == answers
        turns = [tokens.count(BOT) for tokens, _ in wanted]
        assert {0, 1} <= set(turns) and (max(turns) > 1) == (config.turns != 1), turns
        assert any(tokens[-1] in (1, OTHER) for tokens, _ in wanted), "over by itself"
        full = [len(tokens) < config.max_length and tokens[-1] == END for tokens, _ in wanted]
        assert any(full), "no room for what follows"

    def test_text_is_what_the_template_makes_of_it(
        self, talked: Corpus, chat_tokenizer: Any
    ) -> None:
        """Whole turns, taken out of the text and rendered again."""
        seen = 0
        for sequence in talked.sequences():
            text = chat_tokenizer.decode(sequence)
            _, *turns = text.split("<|user|>")
            messages: list[dict[str, str]] = []
            for turn in turns:
                for role, part in zip(NAMES, turn.split("<|bot|>"), strict=False):
                    if "<|end|>by" not in part:
                        break
                    messages.append({"role": role, "content": part.split("<|end|>by")[0]})
            if messages:
                rendered = chat_tokenizer.apply_chat_template(messages, tokenize=False)
                assert text.startswith(rendered)
            seen += len(messages)
        assert seen > 24, "or this test shows nothing"

    def test_rows_count_what_predicts_an_answer(self, talked: Corpus) -> None:
        rows = talked.rows(60)
        counted = rows.counted
        assert counted.sum() == sum(map(sum, marks_of(talked))) > 0
        assert counted[rows.tokens == BOT].all(), "the first token of an answer"
        assert not counted[np.isin(rows.tokens, [USER, END])].any(), "these predict what is given"
        every = talked.rows(60, answers_only=False)
        assert np.array_equal(every.counted, every.real) and every.real.sum() > rows.real.sum()

    def test_no_answer_at_all(self, tmp_path: Path, talk: Write) -> None:
        config = replace(CONFIG, sequences=2, max_length=12)
        corpus = talk(tmp_path / "corpus", config, teacher=make_chatter(-torch.inf))
        with pytest.raises(DataError, match="none of 2 conversations .* comes to an answer in 12"):
            corpus.rows(12)


class TestResume:
    @pytest.fixture
    def interrupted(self, tmp_path: Path, talk: Write) -> Path:
        """Killed in its second shard."""
        kill = kill_at_call(lambda *_: None, 8)
        run_until_killed(lambda: talk(tmp_path / "corpus", on_progress=kill))
        assert len(data.read_manifest(tmp_path / "corpus")["shards"]) == 1
        return tmp_path / "corpus"

    def test_killed_inside_a_shard(
        self,
        interrupted: Path,
        talk: Write,
        talked: Corpus,
    ) -> None:
        talk(interrupted)
        assert contents(interrupted) == contents(talked.path)

    def test_a_template_that_tells_the_date(
        self,
        interrupted: Path,
        talk: Write,
        talked: Corpus,
        chat_tokenizer: Any,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """Another opening on another day: the corpus goes on with that of its first one."""
        today = ChatFormat.of(chat_tokenizer, "chatty")
        tomorrow = replace(today, opening=(*today.opening[:-1], 7))
        monkeypatch.setattr(ChatFormat, "of", lambda *_: tomorrow)
        talk(interrupted)
        assert contents(interrupted) == contents(talked.path)

    def test_another_template(self, interrupted: Path, talk: Write) -> None:
        other = make_chat_tokenizer(TEMPLATE.replace("fox", "sea"))
        with pytest.raises(ConfigError, match="was made by another chat template, that of chatty"):
            talk(interrupted, tokenizer=other)

    def test_other_turns(self, talked: Corpus, talk: Write) -> None:
        with pytest.raises(ConfigError, match="was made with turns None, not 1"):
            talk(talked.path, replace(CONFIG, turns=1))


def test_a_corpus_of_before_there_were_turns(tmp_path: Path, talk: Write) -> None:
    """It has neither the setting nor the column, and is read and gone on with."""
    config = CorpusConfig(sequences=8, max_length=12, batch_size=4, shard_size=4)
    corpus = talk(tmp_path / "corpus", config)
    before = contents(corpus.path)
    plain = json.loads((corpus.path / data.MANIFEST).read_text())
    del plain["turns"]
    write_json(corpus.path / data.MANIFEST, plain | {"complete": False, "shards": []})
    again = talk(corpus.path, config)
    shards = {name: found for name, found in before.items() if name.endswith(".parquet")}
    assert shards.items() <= contents(again.path).items()
    rows = again.rows(12)
    assert not rows.answers_only and np.array_equal(rows.counted, rows.real)


CHATML = (
    "{% for m in messages %}{{ '<|user|>' + m.role + ' by ' + m.content + '<|end|>' + ' ' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|user|>assistant by ' }}{% endif %}"
)
INST = (
    "<s>{% for m in messages %}{% if m.role == 'user' %}{{ '<|user|>' + m.content + '<|bot|>' }}"
    "{% else %}{{ m.content + '</s>' }}{% endif %}{% endfor %}"
)
LEADS = INST.replace("'<|bot|>' }}", "' by<|bot|>' }}")
BARE = "{% for m in messages %}{{ m.content + '<|end|>' }}{% endfor %}"
SPELLED = CHATML.replace("'<|end|>'", "'by'").replace("<|user|>", "by")
THINKS = (
    "{% for m in messages %}{{ ('<|user|>' if m.role == 'user' else '<|bot|>') + m.content }}"
    "{% if m.role == 'assistant' %}{{ '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|bot|>and' }}{% endif %}"
)
NO_PROMPT = THINKS.partition("{% if add_generation_prompt")[0]


class TestFormat:
    @pytest.mark.parametrize(
        ("template", "opening", "message", "answer"),
        [
            (
                CHATML,
                "<|user|>user by ",
                "<|end|> <|user|>assistant by ",
                "<|end|> <|user|>user by ",
            ),
            (INST, "<s><|user|>", "<|bot|>", "</s><|user|>"),
            (LEADS, "<s><|user|>", "<|bot|>", "</s><|user|>"),
            (THINKS, "<|user|>", "<|bot|>and", "<|end|><|user|>"),
            (NO_PROMPT, "<|user|>", "<|bot|>", "<|end|><|user|>"),
        ],
        ids=["like ChatML", "no role", "text before the end", "begins to think", "no prompt"],
    )
    def test_found(self, template: str, opening: str, message: str, answer: str) -> None:
        tokenizer = make_chat_tokenizer(template)

        def encoded(text: str) -> tuple[int, ...]:
            return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])

        turns = [Turn(ids[0], ids[1:]) for ids in map(encoded, (message, answer))]
        found = ChatFormat.of(tokenizer, "m")
        assert found == ChatFormat(encoded(opening), *turns)
        assert found.ends == {encoded(message)[0], encoded(answer)[0]}

    @pytest.mark.parametrize(
        ("template", "says"),
        [
            (None, "m has no chat template, by which it could write conversations; take a chat"),
            (BARE, "of m puts nothing before a user's message"),
            ("<s>by<|end|>", "of m leaves out a message"),
            ("{{ raise_exception('no') }}", r"of m refuses a conversation \(no\)"),
            (SPELLED, "ends a user's message with"),
            (INST.replace("</s>", "").replace("'<|user|>'", "'by '"), "ends an answer with 'by '"),
        ],
    )
    def test_not_found(self, template: str | None, says: str) -> None:
        tokenizer = make_chat_tokenizer()
        tokenizer.chat_template = template
        with pytest.raises(ConfigError, match=f"{says}.*another --strategy, such as hybrid"):
            ChatFormat.of(tokenizer, "m")

    def test_no_room_for_an_answer(self, tmp_path: Path, talk: Write, chat_tokenizer: Any) -> None:
        own = chat_tokenizer.apply_chat_template(
            [{"role": "user", "content": ""}], add_generation_prompt=True, return_dict=True
        )["input_ids"]
        least = len(own) + 2  # a token of the message, and one of the answer
        config = replace(CONFIG, sequences=2, max_length=least - 1)
        with pytest.raises(ConfigError, match=f"takes {least - 2} tokens .* raise --max-length"):
            talk(tmp_path / "corpus", config)
        assert not (tmp_path / "corpus").exists()
        config = replace(config, max_length=least)
        talk(tmp_path / "corpus", config)

    def test_a_model_without_the_tokens_of_the_template(self, tmp_path: Path, talk: Write) -> None:
        with pytest.raises(DataError, match=r"the chat template holds the token '<\|end\|>'"):
            talk(tmp_path / "corpus", teacher=LoadedModel(make_llama(), "m", torch.float32))

    @pytest.mark.parametrize(
        ("change", "says"),
        [
            ({"turns": 0}, "turns must be at least 1; got 0"),
            ({"strategy": "hybrid", "turns": 2}, "the strategy is hybrid; leave --turns out"),
        ],
    )
    def test_settings(self, change: dict[str, Any], says: str) -> None:
        with pytest.raises(ConfigError, match=says):
            replace(CONFIG, **change)

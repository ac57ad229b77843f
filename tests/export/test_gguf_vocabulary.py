"""Tokenizers in GGUF: what is written of each kind, and what is refused."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from qatc.errors import ConfigError
from qatc.export.gguf.vocabulary import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    Vocabulary,
    read_vocabulary,
)
from tests.export.gguf_files import LLAMA3, TRAINED_ON, of_bytes, of_pieces

WORDS = pre_tokenizers.Whitespace()
PLAIN = pre_tokenizers.ByteLevel(add_prefix_space=False)
PREFIXED = pre_tokenizers.ByteLevel(add_prefix_space=True)
LOWER = normalizers.Lowercase()
ODD = processors.TemplateProcessing(single="</s> $A", special_tokens=[("</s>", 1)])


@pytest.mark.parametrize("kind", ["gpt-2", "smollm", "qwen2", "llama-bpe", "smaug-bpe"])
def test_pairs_of_bytes(kind: str) -> None:
    tokenizer = of_bytes(kind)
    found = read_vocabulary(tokenizer, 340)
    assert (found.model, found.pre, len(found.notes)) == ("gpt2", kind, kind == "qwen2")
    size = len(tokenizer)
    assert list(found.tokens[:size]) == tokenizer.convert_ids_to_tokens(range(size))
    assert list(found.tokens[size:]) == [f"[PAD{id}]" for id in range(size, 340)]
    wanted = [CONTROL] * 3 + [NORMAL] * (size - 4) + [USER_DEFINED] + [UNUSED] * (340 - size)
    assert list(found.types) == wanted
    pairs = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    assert list(found.merges) == [" ".join(pair) for pair in pairs]
    assert found.flags == {"bos_token": True, "eos_token": False}
    assert found.ids == {"bos": 0, "eos": 1, "pad": 2} and not found.scores


def test_the_ways_to_split_are_those_of_the_published_tokenizers() -> None:
    assert PRETOKENIZE_REGEX == LLAMA3.replace("{1,3}", "")


@pytest.mark.parametrize("form", ["prepend", "replace", "metaspace"])
def test_pieces(form: str) -> None:
    tokenizer = of_pieces(form)
    found = read_vocabulary(tokenizer, len(tokenizer))
    assert (found.model, found.pre) == ("llama", "default")
    assert found.flags["space_prefix"] == (form != "replace")
    assert len(found.notes) == (form == "metaspace")
    assert list(found.types[:4]) == [UNKNOWN, CONTROL, CONTROL, BYTE]
    assert set(found.types[3:259]) == {BYTE} and set(found.types[259:]) == {NORMAL}
    assert found.ids == {"bos": 1, "eos": 2, "unk": 0} and not found.merges


@pytest.mark.parametrize("form", ["prepend", "replace"])
def test_scores_make_the_tokens_that_merges_make(form: str) -> None:
    """By the rule of SentencePiece, written down here: the best pair of neighbours, leftmost."""
    tokenizer = of_pieces(form)
    found = read_vocabulary(tokenizer, len(tokenizer))
    ids = {token: id for id, token in enumerate(found.tokens)}
    mixed = "".join(random.Random(0).choices("abdehhiknnooorsttwwyy.  ", k=600))
    for text in (*TRAINED_ON[0].split("."), "the quiet foxes", mixed):
        pieces = list("▁" * found.flags["space_prefix"] + text.replace(" ", "▁"))
        while True:
            pairs = [
                (-found.scores[ids[a + b]], place)
                for place, (a, b) in enumerate(zip(pieces, pieces[1:], strict=False))
                if a + b in ids
            ]
            if not pairs:
                break
            _, place = min(pairs)
            pieces[place : place + 2] = ["".join(pieces[place : place + 2])]
        made: list[int] = []
        for piece in pieces:
            one = ids.get(piece)
            made += [3 + byte for byte in piece.encode()] if one is None else [one]
        assert made == tokenizer(text, add_special_tokens=False)["input_ids"], text


def test_a_chat_template_and_a_token_at_the_end() -> None:
    tokenizer = of_pieces()
    core = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    changed = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")
    changed.chat_template = "{{ messages[0].content }}"
    found = read_vocabulary(changed, len(changed))
    assert found.flags["bos_token"] and found.flags["eos_token"]
    assert _put(found)["add_chat_template"] == changed.chat_template
    changed.chat_template = {"default": "a", "tool_use": "b"}
    told = _put(read_vocabulary(changed, len(changed)))
    assert told["add_chat_template"] == [
        {"name": "default", "template": "a"},
        {"name": "tool_use", "template": "b"},
    ]
    assert told["add_add_eos_token"] is True and told["add_bos_token_id"] == 1


def _put(vocabulary: Vocabulary) -> dict[str, Any]:
    """What it puts into a writer, by the writer's functions."""
    told: dict[str, Any] = {}

    class Writer:
        def __getattr__(self, name: str) -> Any:
            return lambda value: told.__setitem__(name, value)

    vocabulary.put(Writer())
    return told


def _with(kind: str, **parts: Any) -> Any:
    core = Tokenizer.from_str(of_bytes(kind).backend_tokenizer.to_str())
    for name, part in parts.items():
        setattr(core, name, part)
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")


def _with_merges(change: Any) -> Any:
    plain = json.loads(of_pieces().backend_tokenizer.to_str())
    plain["model"]["merges"] = change(plain["model"]["merges"])
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(plain)), bos_token="<s>"
    )


def _scattered(merges: list[list[str]]) -> list[list[str]]:
    """The second pair of some token behind all others."""
    made = ["".join(pair) for pair in merges]
    place = next(i for i in range(1, len(made)) if made[i] == made[i - 1])
    return [*merges[:place], *merges[place + 1 :], merges[place]]


def _of_words() -> Any:
    core = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    return PreTrainedTokenizerFast(tokenizer_object=core)


@pytest.mark.parametrize(
    ("reason", "make"),
    [
        ("its pre_tokenizer is .*Whitespace", lambda: _with("gpt-2", pre_tokenizer=WORDS)),
        ('"add_prefix_space": true', lambda: _with("gpt-2", pre_tokenizer=PREFIXED)),
        ("with ignore_merges", lambda: _with("llama-bpe", pre_tokenizer=PLAIN)),
        ("its normalizer is .*Lowercase", lambda: _with("gpt-2", normalizer=LOWER)),
        (r"it makes \[1, .* other tokens around", lambda: _with("gpt-2", post_processor=ODD)),
        ("model is WordLevel", _of_words),
        ("merges leave out", lambda: _with_merges(lambda merges: merges[:-1])),
        ("merges come back to", lambda: _with_merges(_scattered)),
        ("Metaspace.*replacement", lambda: _spaces(split=True)),
    ],
)
def test_what_is_not_known_is_refused(reason: str, make: Any) -> None:
    with pytest.raises(ConfigError, match=reason) as caught:
        read_vocabulary(make(), 400)
    assert "export it as compressed-tensors, for another runtime" in str(caught.value)


def _spaces(split: bool) -> Any:
    core = Tokenizer.from_str(of_pieces("metaspace").backend_tokenizer.to_str())
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=split)
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>")

"""A tokenizer as llama.cpp takes it: tokens, their types, and what finds them in a text.

llama.cpp has its own code for every way to split a text before byte pairs are merged, and a GGUF
file names one. Which one, is read off the tokenizer's own pipeline: what is not known here is
refused, since a wrong one would give other tokens without a word.

A vocabulary of SentencePiece is merged by scores of tokens in llama.cpp, and by a list of pairs in
transformers. The two agree where the list ranks tokens: it names each pair that makes a token, and
all pairs of one token before those of the next. That is checked.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qatc.errors import ConfigError

# gguf.TokenType, which is not always installed.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

_WORD = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_BYTES = ("ByteLevel", False, True)
_BYTES_ALONE = ("ByteLevel", False, False)

PIPELINES: Mapping[tuple[Any, ...], str] = {
    (_BYTES,): "gpt-2",
    (("Digits", True), _BYTES): "smollm",
    (("Split", _WORD + r"\p{N}" + _REST), _BYTES_ALONE): "qwen2",
    (("Split", _WORD + r"\p{N}{1,3}" + _REST), _BYTES_ALONE): "smaug-bpe",
    (("Split", _WORD + r"\p{N}{1,3}" + _REST), _BYTES_ALONE, "whole words first"): "llama-bpe",
}
"""What llama.cpp calls the ways to split a text that are known here."""


@dataclass(frozen=True)
class Vocabulary:
    """What a GGUF file says of a tokenizer.

    Attributes:
        model: ``gpt2`` for pairs of bytes, ``llama`` for SentencePiece.
        pre: llama.cpp's name of how a text is split first.
        tokens: by id.
        types: of each token.
        merges: pairs, of ``gpt2``.
        scores: of each token, of ``llama``.
        flags: whether the token bos or eos, or a space, is added to a text.
        ids: of the tokens bos, eos, unk and pad.
        chat_template: the default one, or several by name.
        notes: for which texts llama.cpp makes other tokens.
    """

    model: str
    pre: str
    tokens: Sequence[str]
    types: Sequence[int]
    merges: Sequence[str]
    scores: Sequence[float]
    flags: Mapping[str, bool]
    ids: Mapping[str, int]
    chat_template: str | Mapping[str, str] | None
    notes: Sequence[str] = ()

    def put(self, writer: Any) -> None:
        """Put it into a ``gguf.GGUFWriter``."""
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        writer.add_token_scores(self.scores)
        writer.add_token_merges(self.merges)
        for name, value in self.ids.items():
            getattr(writer, f"add_{name}_token_id")(value)
        for name, value in self.flags.items():
            getattr(writer, f"add_add_{name}")(value)
        template = self.chat_template
        if isinstance(template, str):
            writer.add_chat_template(template)
        elif template:
            writer.add_chat_template([{"name": n, "template": t} for n, t in template.items()])


def read_vocabulary(tokenizer: Any, size: int) -> Vocabulary:
    """The vocabulary of a tokenizer of transformers.

    Args:
        tokenizer: one with a pipeline of the library tokenizers, as all have but old slow ones.
        size: rows of the embedding; those behind the last token are filled with unused ones.

    Raises:
        ConfigError: llama.cpp has no such tokenizer, or it is not known here.
    """
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise _refused(f"it is a {type(tokenizer).__name__}, which has no tokenizer.json")
    pipeline = json.loads(tokenizer.backend_tokenizer.to_str())
    model = pipeline["model"]
    if model["type"] != "BPE":
        raise _refused(f"its model is {model['type']}, where BPE is expected")
    odd = [key for key in ("continuing_subword_prefix", "end_of_word_suffix", "dropout")]
    if found := [key for key in odd if model.get(key)]:
        raise _refused(f"its BPE has a {found[0]}")
    added = {own["id"]: own for own in pipeline["added_tokens"]}
    by_id = {id: token for token, id in model["vocab"].items()}
    by_id |= {id: own["content"] for id, own in added.items()}
    if max(by_id) >= size:
        raise _refused(f"it has the token {max(by_id)}, and the embedding {size} rows")
    unknown = tokenizer.unk_token_id if model.get("byte_fallback") else None
    of_bytes = {f"<0x{byte:02X}>" for byte in range(256)} if model.get("byte_fallback") else set()

    def type_of(id: int) -> int:
        if id not in by_id:
            return UNUSED
        if id == unknown:
            return UNKNOWN
        if id in added:
            return CONTROL if added[id]["special"] else USER_DEFINED
        return BYTE if by_id[id] in of_bytes else NORMAL

    tokens = [by_id.get(id, f"[PAD{id}]") for id in range(size)]
    flags = _added_around(tokenizer)
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in model["merges"]]
    scores: list[float] = []
    if of_bytes:
        kind, pre, notes = "llama", "default", _notes(pipeline)
        flags |= {"space_prefix": _adds_space(pipeline)}
        plain = {id: token for id, token in by_id.items() if id not in added}
        ranks = _ranks(merges, {token for token in plain.values() if token not in of_bytes})
        scores = [-float(ranks.get(plain.get(id, ""), 0)) for id in range(size)]
        merges = []
    else:
        kind, pre, notes = "gpt2", _split(pipeline), _notes(pipeline)
    return Vocabulary(
        model=kind,
        pre=pre,
        tokens=tokens,
        types=[type_of(id) for id in range(size)],
        # A space in a pair would be read as the end of its first token.
        merges=[" ".join(part.replace(" ", "Ġ") for part in pair) for pair in merges],
        scores=scores,
        flags=flags,
        ids={
            name: id
            for name in ("bos", "eos", "unk", "pad")
            if (id := getattr(tokenizer, f"{name}_token_id")) is not None
        },
        chat_template=getattr(tokenizer, "chat_template", None),
        notes=notes,
    )


def _refused(reason: str) -> ConfigError:
    return ConfigError(
        f"the tokenizer of this model is none that qatc knows llama.cpp's name of: {reason}; export"
        " it as compressed-tensors, for another runtime"
    )


def _added_around(tokenizer: Any) -> dict[str, bool]:
    """Which of bos and eos the tokenizer puts around a text."""
    text = "a"
    whole, bare = (
        list(tokenizer(text, add_special_tokens=add)["input_ids"]) for add in (True, False)
    )
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    for before in ([], [bos]):
        for after in ([], [eos]):
            if whole == before + bare + after:
                return {"bos_token": bool(before), "eos_token": bool(after)}
    raise _refused(f"it makes {whole} of {text!r}, which is {bare} with other tokens around it")


def _notes(pipeline: Mapping[str, Any]) -> list[str]:
    """What transformers does with a text and llama.cpp does not."""
    found = []
    if pipeline["normalizer"] == {"type": "NFC"}:
        found.append(
            "llama.cpp does not normalize text (NFC) before it makes tokens of it, as transformers"
            " does: text with combining characters may give others"
        )
    if (pipeline["pre_tokenizer"] or {}).get("prepend_scheme") == "first":
        found.append(
            "llama.cpp puts a space before every text and behind special tokens, and transformers"
            " only before a text that begins with neither"
        )
    return found


def _split(pipeline: Mapping[str, Any]) -> str:
    """Llama.cpp's name of how a text is split before its bytes are merged."""
    normalizer = pipeline["normalizer"]
    if normalizer not in (None, {"type": "NFC"}):
        raise _refused(f"its normalizer is {json.dumps(normalizer)}")
    steps = tuple(map(_step, _parts(pipeline["pre_tokenizer"], "pretokenizers")))
    whole_words = ("whole words first",) if pipeline["model"].get("ignore_merges") else ()
    name = PIPELINES.get((*steps, *whole_words))
    if name is None:
        given = json.dumps(pipeline["pre_tokenizer"])
        raise _refused(f"its pre_tokenizer is {given}{' with ignore_merges' * bool(whole_words)}")
    return name


def _parts(given: Mapping[str, Any] | None, key: str) -> list[Mapping[str, Any]]:
    if given is None:
        return []
    return list(given[key]) if given["type"] == "Sequence" else [given]


def _step(given: Mapping[str, Any]) -> tuple[Any, ...]:
    """A pre-tokenizer by what matters of it; any other form of one is in no pipeline."""
    kind = given["type"]
    if kind == "ByteLevel":
        return kind, given["add_prefix_space"], given.get("use_regex", True)
    if kind == "Digits":
        return kind, given["individual_digits"]
    if kind == "Split" and given["behavior"] == "Isolated" and not given["invert"]:
        return kind, given["pattern"].get("Regex")
    return (json.dumps(given),)


def _adds_space(pipeline: Mapping[str, Any]) -> bool:
    """Whether a vocabulary of SentencePiece has a space before a text; spaces are ``▁`` in it."""
    steps = [
        *_parts(pipeline["normalizer"], "normalizers"),
        *_parts(pipeline["pre_tokenizer"], "pretokenizers"),
    ]
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    if steps == [replace]:
        return False
    if steps == [{"type": "Prepend", "prepend": "▁"}, replace]:
        return True
    if len(steps) == 1 and steps[0]["type"] == "Metaspace":
        if steps[0]["replacement"] == "▁" and not steps[0].get("split", True):
            return bool(steps[0]["prepend_scheme"] != "never")
    raise _refused(f"its normalizer and pre_tokenizer are {json.dumps(steps)}")


def _ranks(merges: Iterable[tuple[str, ...]], tokens: set[str]) -> dict[str, int]:
    """The rank of each token that pairs make, from 1, if the pairs rank tokens."""
    pairs = set()
    ranks: dict[str, int] = {}
    last = ""
    for pair in merges:
        token = "".join(pair)
        if token != last and token in ranks:
            raise _refused(f"its merges come back to the token {token!r}, which has no one rank")
        ranks.setdefault(token, len(ranks) + 1)
        pairs.add(pair)
        last = token
    for token in tokens:
        for place in range(1, len(token)):
            pair = (token[:place], token[place:])
            if tokens.issuperset(pair) and pair not in pairs:
                raise _refused(f"its merges leave out {pair}, by which llama.cpp makes {token!r}")
    return ranks

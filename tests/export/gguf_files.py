"""GGUF files read by the package gguf, and tokenizers of each kind that they hold."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf.quants import dequantize
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from tests.conftest import TEXT

TRAINED_ON = [
    f"{TEXT} We've 12345 reasons; don't ask!\n\n\tThe 7th (and last) is: \u00e9t\u00e9, 雨, OK?  "
]

SAMPLES = (
    "The old fox sleeps by the bridge.",
    " the  quiet   miller\n\n\nwaits \t ",
    "I'VE 1234567890 reasons, don't you? It's 7.5%!!",
    "\u00e9t\u00e9 \u96e8 \U0001f642 na\u00efve \u00c5ngstr\u00f6m",
    "x=[1,2];\r\n  return x  # end\n",
    "nobody",
    " ",
    "<not a token> </nor this>",
)
"""Texts on which ways to split one give different tokens."""

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _split(regex: str) -> Any:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(regex), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


@cache
def of_bytes(kind: str, size: int = 330) -> Any:
    """A byte-pair tokenizer of all bytes, with a bos token, that splits a text as ``kind`` does."""
    splits: dict[str, Any] = {
        "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
        "smollm": pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        ),
        "qwen2": _split(LLAMA3.replace("{1,3}", "")),
        "llama-bpe": _split(LLAMA3),
        "smaug-bpe": _split(LLAMA3),
    }
    core = Tokenizer(models.BPE(ignore_merges=kind == "llama-bpe"))
    core.pre_tokenizer = splits[kind]
    core.decoder = decoders.ByteLevel()
    if kind == "qwen2":
        core.normalizer = normalizers.NFC()
    special = ["<s>", "</s>", "<pad>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        TRAINED_ON,
        BpeTrainer(
            vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        ),
    )
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    core.add_tokens(["<tool>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


@cache
def of_pieces(form: str = "prepend") -> Any:
    """A tokenizer of SentencePiece's kind, as converters make it: every pair of every token."""
    learned = Tokenizer(models.BPE())
    learned.pre_tokenizer = pre_tokenizers.Metaspace()
    learned.train_from_iterator(TRAINED_ON, BpeTrainer(vocab_size=120, show_progress=False))
    found = json.loads(learned.to_str())["model"]
    made = list(dict.fromkeys("".join(pair) for pair in found["merges"]))
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *made]
    tokens += [token for token in found["vocab"] if token not in made]
    vocabulary = {token: id for id, token in enumerate(tokens)}
    pairs = [(token[:i], token[i:]) for token in made for i in range(1, len(token))]
    merges = [pair for pair in pairs if vocabulary.keys() >= set(pair)]
    core = Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    if form == "metaspace":
        core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        prepend = [normalizers.Prepend("▁")] if form == "prepend" else []
        core.normalizer = normalizers.Sequence([*prepend, normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def file_in(directory: Path) -> Path:
    """The one GGUF file of a directory."""
    (path,) = directory.glob("*.gguf")
    return path


def fields(path: Path) -> dict[str, Any]:
    """All that a file says besides its tensors."""
    return {key: field.contents() for key, field in gguf.GGUFReader(path).fields.items()}


def tensors(path: Path) -> dict[str, tuple[str, Tensor]]:
    """Type and values of each tensor, by the package gguf."""
    return {
        own.name: (
            own.tensor_type.name,
            torch.from_numpy(np.array(dequantize(own.data, own.tensor_type)))
            .float()
            .reshape([int(size) for size in reversed(own.shape)]),
        )
        for own in gguf.GGUFReader(path).tensors
    }

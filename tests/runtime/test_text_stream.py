"""Text as it comes, against decoding everything at once."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from qatc.runtime.text_stream import Detokenizer, TextStream

WORDS = ["▁The", "▁fox", "es", "▁", "▁is", ".", "Paris", "▁Paris", "▁,"]


def sentencepiece_like() -> Any:
    """As Llama's: words carry their space in front, and decoding drops the first one."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2}
    vocabulary |= {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    vocabulary |= {word: 259 + number for number, word in enumerate(WORDS)}
    core = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    core.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    core.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def byte_level() -> Any:
    """As GPT-2's: every byte is a token here."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<s>": 0, "</s>": 1} | {byte: 2 + n for n, byte in enumerate(alphabet)}
    core = Tokenizer(models.BPE(vocabulary, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=True,
    )


TOKENIZERS = {"sentencepiece": sentencepiece_like(), "bytes": byte_level()}


def ids(tokenizer: Any, *words: str) -> list[int]:
    found: list[int] = tokenizer.convert_tokens_to_ids(list(words))
    return found


def streamed(tokenizer: Any, prompt: list[int], new: list[int], **options: Any) -> TextStream:
    shown: list[str] = []
    text = TextStream(Detokenizer(tokenizer, prompt), show=shown.append, **options)
    for token in new:
        text.push([token])
    text.end()
    assert "".join(shown) == text.text
    return text


def test_the_space_before_the_first_word_is_kept() -> None:
    tokenizer = TOKENIZERS["sentencepiece"]
    prompt = ids(tokenizer, "<s>", "▁The", "▁fox")
    new = ids(tokenizer, "▁is", "▁Paris", ".", "▁", "▁The")
    assert tokenizer.decode(new) == "is Paris.  The"  # which is why
    assert streamed(tokenizer, prompt, new).text == " is Paris.  The"
    assert streamed(tokenizer, ids(tokenizer, "<s>"), new).text == "is Paris.  The"
    assert streamed(tokenizer, prompt, ids(tokenizer, "es", ".")).text == "es."


@given(st.data())
@pytest.mark.parametrize("name", TOKENIZERS)
def test_pieces_are_the_whole(name: str, data: st.DataObject) -> None:
    """Text with characters of one to four bytes, cut anywhere between prompt and answer."""
    tokenizer = TOKENIZERS[name]
    text = data.draw(st.text(st.sampled_from("a é€😀 .,\n"), min_size=1, max_size=12))
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    cut = data.draw(st.integers(0, len(tokens)))
    prompt, new = tokens[:cut], tokens[cut:]
    whole = tokenizer.decode(tokens, clean_up_tokenization_spaces=False)
    before = tokenizer.decode(prompt, clean_up_tokenization_spaces=False).rstrip("\ufffd")
    if whole.startswith(before):
        assert before + streamed(tokenizer, prompt, new).text == whole


def test_a_character_waits_for_its_last_byte() -> None:
    tokenizer = TOKENIZERS["bytes"]
    shown: list[str] = []
    text = TextStream(Detokenizer(tokenizer, []), show=shown.append)
    for token in tokenizer("a€b", add_special_tokens=False)["input_ids"]:
        text.push([token])
    assert shown == ["a", "€", "b"]
    text.push(tokenizer("€", add_special_tokens=False)["input_ids"][:2])
    text.end()
    assert text.text == "a€b\ufffd"


def test_spaces_before_punctuation_are_the_model_s() -> None:
    tokenizer = TOKENIZERS["bytes"]
    new = tokenizer("yes , no .", add_special_tokens=False)["input_ids"]
    assert streamed(tokenizer, [], new).text == "yes , no ."


def test_special_tokens_are_no_text() -> None:
    tokenizer = TOKENIZERS["sentencepiece"]
    new = ids(tokenizer, "▁is", "</s>", "▁Paris", "</s>")
    assert streamed(tokenizer, ids(tokenizer, "▁The"), new).text == " is Paris"


class TestStopStrings:
    def write(self, text: str, *stop: str, **options: Any) -> TextStream:
        tokenizer = TOKENIZERS["bytes"]
        new = tokenizer(text, add_special_tokens=False)["input_ids"]
        return streamed(tokenizer, [], new, stop=stop, **options)

    def test_the_text_ends_before_the_first(self) -> None:
        for stop in (["END"], ["later", "END", "ND"], ["END?", "END"]):
            found = self.write("abc END later", *stop)
            assert (found.text, found.stopped) == ("abc ", True)

    def test_what_only_looks_like_one_is_shown(self) -> None:
        for text in ("abc EN", "abc ENx", "EEEN", "E"):
            found = self.write(text, "END")
            assert (found.text, found.stopped) == (text, False)

    def test_nothing_of_one_is_ever_shown(self) -> None:
        tokenizer, shown = TOKENIZERS["bytes"], ""

        def show(text: str) -> None:
            nonlocal shown
            shown += text

        text = TextStream(Detokenizer(tokenizer, []), ["\n\nUser:"], show)
        for token in tokenizer("yes\n\nUser: no", add_special_tokens=False)["input_ids"]:
            text.push([token])
            assert "yes".startswith(shown) or shown == "yes"
        assert text.stopped and shown == text.text == "yes"

    def test_white_space_in_front_of_an_answer(self) -> None:
        assert self.write(" \n yes no ", strip=True).text == "yes no "
        assert self.write("   ", strip=True).text == ""

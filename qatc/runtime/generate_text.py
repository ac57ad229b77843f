"""Write text with an integer model, and say how fast that was."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig

from qatc.data.corpus import derived_seed, require_known
from qatc.errors import ConfigError, QatcError
from qatc.machine.device import peak_memory, pick_device
from qatc.models import load_tokenizer
from qatc.models.load import check_length
from qatc.models.preparation import can_compile
from qatc.runtime.cuda.loop import decoding_loop
from qatc.runtime.model import load
from qatc.runtime.text_stream import Detokenizer, TextStream
from qatc.storage.files import read_json


@dataclass(frozen=True)
class Written:
    """A text and what it took.

    Attributes:
        text: what was written, without the prompt and up to a stop string.
        prompt_tokens, new_tokens: how many there were of either.
        prefill_seconds: until the first token.
        decode_tokens_per_second: of the tokens after the first.
        peak_memory_bytes: of the process, or of the GPU.
    """

    text: str
    prompt_tokens: int
    new_tokens: int
    prefill_seconds: float
    decode_tokens_per_second: float | None
    peak_memory_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    def __str__(self) -> str:
        rate = self.decode_tokens_per_second
        speed = "" if rate is None else f", then {rate:,.1f} tokens/s"
        return (
            f"{self.new_tokens} tokens; first after {self.prefill_seconds:.2f} s"
            f" ({self.prompt_tokens} of prompt){speed}; peak memory"
            f" {self.peak_memory_bytes / 1e9:.2f} GB"
        )


class Writer:
    """An integer model that continues prompts.

    Args:
        model: directory of a qatc output.
        device, compile, trust_remote_code, kernels: see :func:`qatc.runtime.model.load`.
        max_new_tokens: tokens to write, at most.
        temperature: of sampling; 0 takes the most likely token.
        top_p: sample from this share of the probability.
        seed: of sampling.
        stop: strings that end the text, besides those of the model's generation config.

    Attributes:
        left_out: settings of the model's generation config that are not supported here.

    Raises:
        QatcError: the directory is no complete output, or has no tokenizer.
    """

    def __init__(
        self,
        model: Path,
        *,
        device: str = "auto",
        compile: bool | None = None,
        trust_remote_code: bool = False,
        kernels: str = "auto",
        max_new_tokens: int = 200,
        temperature: float = 0.7,
        top_p: float = 1.0,
        seed: int = 0,
        stop: Sequence[str] = (),
    ) -> None:
        if not all(stop):
            raise ConfigError("a stop string must not be empty")
        self.device = pick_device(device)
        self.name = str(model)
        trust = trust_remote_code
        self.model: Any = load(
            model,
            device=self.device,
            compile=compile,
            trust_remote_code=trust,
            kernels=kernels,  # type: ignore[arg-type]  # checked there
        )
        self.tokenizer = load_tokenizer(self.name, trust_remote_code=trust)
        self.seed, self.max_new_tokens = seed, max_new_tokens
        file = model / "generation_config.json"
        own: dict[str, Any] = read_json(file) if file.exists() else {}
        self.left_out = {
            name: value
            for name, value in own.items()
            if name not in _KNOWN and not _is_neutral(name, value)
        }
        self.ends = _ends(self.tokenizer, self.model.config, self.model.generation_config)
        added, given = self.tokenizer.get_added_vocab(), own.get("stop_strings") or ()
        self.stop = []
        stop = [_as_text(text, "the stop string") for text in stop]
        for text in (*stop, *([given] if isinstance(given, str) else given)):
            if text in added:  # never part of the text, as special tokens are left out
                self.ends.add(added[text])
            self.stop.append(text)
        self.settings = {k: own[k] for k in _SUPPORTED if own.get(k) is not None}
        self.settings |= {"max_new_tokens": max_new_tokens, "do_sample": temperature > 0}
        if temperature > 0:
            self.settings |= {"temperature": temperature, "top_p": top_p}
            self.settings.setdefault("top_k", 0)
        else:
            for name in _SAMPLING:
                self.settings.pop(name, None)
        # generate() adds what this one says to the settings that it is given.
        self.model.generation_config = GenerationConfig()
        if can_compile(self.device) if compile is None else compile:
            self._warm_up()

    def _warm_up(self) -> None:
        """Let prefill and decode be compiled, so that figures are those of writing alone."""
        ids = torch.zeros((1, 4), dtype=torch.long, device=self.device)
        with torch.no_grad():
            cache = self.model(input_ids=ids, use_cache=True).past_key_values
            self.model(input_ids=ids[:, :1], past_key_values=cache, use_cache=True)

    def write(self, prompt: str, show: Callable[[str], None] | None = None) -> Written:
        """Continue a prompt, handing over the prompt and then the text as it comes.

        Raises:
            ConfigError: the prompt is no text, or it and the new tokens are more than the model
                takes.
            DataError: the model has no embedding for one of its tokens.
        """
        prompt = _as_text(prompt)
        ids = self.tokenizer(prompt)["input_ids"] or [self.tokenizer.bos_token_id or 0]
        return self._run(ids, self.ends, show, echo=prompt)

    def require_chat_template(self) -> None:
        """Raise ``ConfigError`` if the tokenizer has no chat template."""
        if not getattr(self.tokenizer, "chat_template", None):
            raise ConfigError(f"{self.name} has no chat template; use --prompt TEXT")

    def answer(
        self, turns: list[dict[str, str]], show: Callable[[str], None] | None = None
    ) -> Written:
        """Answer a conversation, by the tokenizer's chat template.

        Raises:
            ConfigError: the tokenizer has none, or it refuses the conversation; or as
                :meth:`write`.
            DataError: as :meth:`write`.
        """
        self.require_chat_template()
        turns = [turn | {"content": _as_text(turn["content"])} for turn in turns]
        ids = self._render(turns)
        return self._run(ids, self.ends | self._ends_of_turn(), show, strip=True)

    def _render(self, turns: list[dict[str, str]], answered: bool = False) -> list[int]:
        from jinja2 import TemplateError

        try:
            found: list[int] = self.tokenizer.apply_chat_template(
                turns, add_generation_prompt=not answered, return_dict=True
            )["input_ids"]
        except TemplateError as error:
            raise ConfigError(
                f"the chat template of {self.name} refuses the conversation: {error}; use --prompt"
            ) from error
        return found

    def _ends_of_turn(self) -> set[int]:
        """The special token that the chat template puts behind an answer.

        Some models name another token as their end, with which they would answer themselves.
        """
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        ids = self._render(turns, answered=True)
        special = set(self.tokenizer.all_special_ids)
        special |= {n for n, t in self.tokenizer.added_tokens_decoder.items() if t.special}
        behind: set[int] = set()
        for token in reversed(ids):
            if token in special:
                behind = {token}
            elif self.tokenizer.decode([token]).strip():
                break
        return behind

    def _run(
        self,
        tokens: list[int],
        ends: set[int],
        show: Callable[[str], None] | None,
        *,
        echo: str = "",
        strip: bool = False,
    ) -> Written:
        check_length(self.name, self.model.config, len(tokens) + self.max_new_tokens)
        require_known(
            np.asarray(tokens), self.tokenizer, self.model, what="the prompt", name=self.name
        )
        if show is not None:
            show(echo)
        text = TextStream(Detokenizer(self.tokenizer, tokens), self.stop, show, strip=strip)
        stream = _Stream(text)
        settings: dict[str, Any] = {"eos_token_id": sorted(ends)} if ends else {}
        settings["pad_token_id"] = min(ends, default=0)  # never read: there is one row
        ids = torch.tensor([tokens], device=self.device)
        torch.manual_seed(derived_seed(self.seed, 0))
        started = time.perf_counter()
        try:
            found = self.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                generation_config=GenerationConfig(**self.settings, **settings),
                **self._loop(stream, ends),
            )
            stream.text.end()
        except (ValueError, TypeError) as error:
            own = {name: self.settings[name] for name in _SUPPORTED if name in self.settings}
            if isinstance(error, QatcError) or not own:
                raise
            raise ConfigError(
                f"cannot write with the settings {own} of {self.name}/generation_config.json:"
                f" {error}; correct or remove them there"
            ) from error
        times = stream.times
        rate = None
        if len(times) > 1 and times[-1] > times[0]:
            rate = (len(times) - 1) / (times[-1] - times[0])
        return Written(
            text=text.text,
            prompt_tokens=len(tokens),
            new_tokens=found.shape[1] - len(tokens),
            prefill_seconds=times[0] - started,
            decode_tokens_per_second=rate,
            peak_memory_bytes=peak_memory(self.device),
        )

    def _loop(self, stream: _Stream, ends: set[int]) -> dict[str, Any]:
        """What of ``generate`` takes a token and says whether it was the last one.

        On a GPU that is a loop of our own, which never waits for more than that token.
        """
        if torch.device(self.device).type == "cuda":
            return {"custom_generate": decoding_loop(self.max_new_tokens, ends, stream.take)}
        return {
            "stopping_criteria": [lambda seen, _: seen.new_full((1,), stream.text.stopped).bool()],
            "streamer": stream,
        }


_SAMPLING = ("top_k", "min_p", "typical_p")
_SUPPORTED = (
    *_SAMPLING,
    *("repetition_penalty", "no_repeat_ngram_size", "bad_words_ids", "sequence_bias"),
    *("suppress_tokens", "begin_suppress_tokens"),
)
"""Settings of a model's generation config that are handed on."""

_KNOWN = (
    *_SUPPORTED,
    *("eos_token_id", "bos_token_id", "pad_token_id", "stop_strings"),
    # What options of the command say.
    *("max_new_tokens", "max_length", "do_sample", "temperature", "top_p", "use_cache"),
    # No settings.
    *("transformers_version", "_from_model_config"),
)


_ONE = (
    *("num_beams", "num_beam_groups", "num_return_sequences", "length_penalty"),
    *("encoder_repetition_penalty", "guidance_scale", "top_h"),
)
"""Settings that do nothing at 1."""


def _is_neutral(name: str, value: Any) -> bool:
    """Whether a setting does nothing at this value."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return value is None or value is False or value in ([], {}, "")
    return value == 0 or (value == 1 and name in _ONE)


def _ends(*sources: Any) -> set[int]:
    """The tokens that end a text, by any of a tokenizer, a config and a generation config."""
    found: set[int] = set()
    for source in sources:
        ids = getattr(source, "eos_token_id", None)
        found.update([ids] if isinstance(ids, int) else ids or [])
    return found


def _as_text(given: str, what: str = "the prompt") -> str:
    """What was typed, with bytes that Python could not decode in the terminal's encoding decoded.

    Raises:
        ConfigError: they are not UTF-8.
    """
    try:
        return given.encode(errors="surrogateescape").decode()
    except UnicodeError as error:
        raise ConfigError(
            f"{what} {given[:40]!a} is not UTF-8; is it in another encoding?"
        ) from error


class _Stream:
    """A streamer of transformers that notes when tokens come, and hands them over as text."""

    def __init__(self, text: TextStream) -> None:
        self.text = text
        self.times: list[float] = []
        self._prompt = True

    def put(self, value: Tensor) -> None:
        if self._prompt:
            self._prompt = False
            return
        for token in value.flatten().tolist():
            self.take(token)

    def take(self, token: int) -> bool:
        """Take in a token; whether a stop string has come with it."""
        self.times.append(time.perf_counter())
        self.text.push([token])
        return self.text.stopped

    def end(self) -> None:
        """All has come."""

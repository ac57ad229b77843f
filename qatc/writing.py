"""Write text with an integer model, and say how fast that was."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qatc.data import derived_seed
from qatc.device import pick_device
from qatc.errors import ConfigError
from qatc.models import load_tokenizer
from qatc.models.load import check_length
from qatc.preparation import can_compile
from qatc.runtime import load


@dataclass(frozen=True)
class Written:
    """A text and what it took.

    Attributes:
        text: what was written, without the prompt.
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
        device, compile: see :func:`qatc.runtime.load`.
        max_new_tokens: tokens to write, at most.
        temperature: of sampling; 0 takes the most likely token.
        top_p: sample from this share of the probability.
        seed: of sampling.

    Raises:
        QatcError: the directory is no complete output, or has no tokenizer.
    """

    def __init__(
        self,
        model: Path,
        *,
        device: str = "auto",
        compile: bool | None = None,
        max_new_tokens: int = 200,
        temperature: float = 0.7,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> None:
        self.device = pick_device(device)
        self.name = str(model)
        self.model: Any = load(model, device=self.device, compile=compile)
        self.tokenizer = load_tokenizer(self.name)
        self.seed = seed
        self.options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "num_beams": 1}
        if temperature > 0:
            self.options |= {"do_sample": True, "temperature": temperature, "top_p": top_p}
            self.options |= {"top_k": 0}
        else:
            self.options |= {"do_sample": False}
        if can_compile() if compile is None else compile:
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
            ConfigError: prompt and new tokens are more than the model takes.
        """
        ids = self.tokenizer(prompt, return_tensors="pt")["input_ids"]
        if ids.shape[1] == 0:
            ids = torch.tensor([[self.tokenizer.bos_token_id or 0]])
        return self._run(ids, show, prompt)

    def require_chat_template(self) -> None:
        """Raise ``ConfigError`` if the tokenizer has no chat template."""
        if not getattr(self.tokenizer, "chat_template", None):
            raise ConfigError(f"{self.name} has no chat template; use --prompt TEXT")

    def answer(
        self, turns: list[dict[str, str]], show: Callable[[str], None] | None = None
    ) -> Written:
        """Answer a conversation, by the tokenizer's chat template.

        Raises:
            ConfigError: the tokenizer has none.
        """
        self.require_chat_template()
        ids = self.tokenizer.apply_chat_template(
            turns, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )["input_ids"]
        return self._run(ids, show)

    def _run(self, ids: Tensor, show: Callable[[str], None] | None, echo: str = "") -> Written:
        wanted = ids.shape[1] + self.options["max_new_tokens"]
        check_length(self.name, self.model.config, wanted)
        if show is not None:
            show(echo)
        ids = ids.to(self.device)
        clock = _Clock(self.tokenizer, show)
        torch.manual_seed(derived_seed(self.seed, 0))
        if self.tokenizer.pad_token_id is None:
            self.options["pad_token_id"] = self.tokenizer.eos_token_id
        started = time.perf_counter()
        found = self.model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), streamer=clock, **self.options
        )
        new = found[0, ids.shape[1] :]
        times = clock.times
        rate = None
        if len(times) > 1 and times[-1] > times[0]:
            rate = (len(times) - 1) / (times[-1] - times[0])
        return Written(
            text=self.tokenizer.decode(new, skip_special_tokens=True),
            prompt_tokens=ids.shape[1],
            new_tokens=len(new),
            prefill_seconds=times[0] - started,
            decode_tokens_per_second=rate,
            peak_memory_bytes=_peak_memory(self.device),
        )


class _Clock:
    """A streamer of transformers that notes when tokens come, and shows whole characters."""

    def __init__(self, tokenizer: Any, show: Callable[[str], None] | None) -> None:
        self.tokenizer, self.show = tokenizer, show
        self.times: list[float] = []
        self._tokens: list[int] = []
        self._shown = ""
        self._prompt = True

    def put(self, value: Tensor) -> None:
        if self._prompt:
            self._prompt = False
            return
        self.times.append(time.perf_counter())
        self._tokens += value.flatten().tolist()
        text = self.tokenizer.decode(self._tokens, skip_special_tokens=True)
        if self.show is not None and not text.endswith("\ufffd"):
            self.show(text[len(self._shown) :])
            self._shown = text

    def end(self) -> None:
        pass


def _peak_memory(device: str) -> int:
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated()
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024

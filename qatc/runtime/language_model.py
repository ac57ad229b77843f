"""A causal LM, prepared, packed or neither, as lm-eval asks it: how likely is a text, and go on.

lm-eval's ``HFLM`` tokenizes, and cuts answers off where a task wants it. What runs the model is
here, so that every model is measured alike: in batches of a fixed size, without a KV cache where
none is needed, with probabilities in fp32, and of nothing but the tokens that are scored.

The module imports lm_eval: import it where that is known to be installed.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from inspect import signature
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils_hf import stop_sequences_criteria
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from qatc.data.corpus import require_known
from qatc.errors import EvaluationError

SOFTMAX_DTYPE = torch.float32

Scored = tuple[float, bool]
"""Log-likelihood in nats, and whether every token was the likeliest."""


class LanguageModel(HFLM):  # type: ignore[misc]
    """The model of lm-eval.

    Args:
        model: a transformers causal LM in eval mode.
        tokenizer: its tokenizer.
        batch_size: rows per forward pass.
        max_length: tokens that the model is given at once, at most.
        on_progress: called with the rows done and all rows of a kind of request.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        batch_size: int,
        max_length: int,
        on_progress: Callable[[int, int], None],
    ) -> None:
        super().__init__(
            pretrained=model,
            tokenizer=tokenizer,
            batch_size=batch_size,
            max_length=max_length,
            softmax_dtype=SOFTMAX_DTYPE,
        )
        self._on_progress = on_progress
        self._to_generate = self._generated = 0
        self._takes_logits_to_keep = "logits_to_keep" in signature(type(model).forward).parameters

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[Scored]:
        """How likely each continuation is behind its context."""
        found: list[Scored] = super().loglikelihood(requests, disable_tqdm=True)
        return found

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
        """Log-likelihood of whole texts, in nats; long ones in windows that do not overlap."""
        windows, owners = [], []
        for number, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            pairs = get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, 1)
            for pair in pairs:
                windows.append((None, *make_disjoint_window(pair)))
                owners.append(number)
        totals = [0.0] * len(requests)
        for owner, (likelihood, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[owner] += likelihood
        return totals

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        """What the model writes behind each context, up to a stop of the task."""
        self._to_generate, self._generated = len(requests), 0
        found: list[str] = super().generate_until(requests, disable_tqdm=True)
        return found

    @torch.no_grad()
    def _loglikelihood_tokens(
        self,
        requests: list[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = True,
        override_bs: int | None = None,
    ) -> list[Scored]:
        # Answers of one token to one question read the same logits, which are computed once.
        asking: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for number, (_, context, continuation) in enumerate(requests):
            if len(continuation) > self.max_length:
                raise EvaluationError(
                    f"a task has an answer of {len(continuation)} tokens, which do not fit into"
                    f" {self.max_length}; give a larger --length"
                )
            given = (context + continuation)[-self.max_length - 1 : -1]
            asking[tuple(given)].append(number)
        rows = sorted(asking, key=lambda row: (-len(row), row))
        scored: list[Scored] = [(math.nan, False)] * len(requests)
        for start in range(0, len(rows), self.batch_size):
            batch = rows[start : start + self.batch_size]
            first = min(len(row) - len(requests[n][2]) for row in batch for n in asking[row])
            logits = self._logits(batch, first)
            for row, own in zip(batch, logits, strict=True):
                for number in asking[row]:
                    answer = torch.tensor(requests[number][2], device=own.device)
                    end = len(row) - first
                    scored[number] = _score(own[end - len(answer) : end], answer)
            self._on_progress(start + len(batch), len(rows))
        return scored

    def _logits(self, rows: Sequence[Sequence[int]], first: int) -> Tensor:
        """Logits ``[B, T - first, V]`` behind the tokens ``first`` to T of rows padded to T."""
        ids = pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
        self._require_known(ids)
        # The head is a fifth of a small model, and its logits most of the memory.
        spared = {"logits_to_keep": ids.shape[1] - first} if self._takes_logits_to_keep else {}
        logits: Tensor = self.model(input_ids=ids.to(self.device), use_cache=False, **spared).logits
        return logits[:, first - ids.shape[1] :]

    def _model_generate(
        self, context: Tensor, max_length: int, stop: list[str], **generation_kwargs: Any
    ) -> Tensor:
        self._require_known(context)
        if not generation_kwargs.get("temperature"):
            generation_kwargs.pop("temperature", None)
            generation_kwargs["do_sample"] = False
        stops = stop_sequences_criteria(self.tokenizer, stop, context.shape[1], context.shape[0])
        written: Tensor = self.model.generate(
            input_ids=context,
            max_length=max_length,
            stopping_criteria=stops,
            pad_token_id=self.tokenizer.pad_token_id,
            use_cache=self.model.config.use_cache,  # a prepared model has none
            **generation_kwargs,
        )
        self._generated += len(context)
        self._on_progress(self._generated, self._to_generate)
        return written

    def _require_known(self, ids: Tensor) -> None:
        name = self.model.name_or_path or type(self.model).__name__
        require_known(ids.cpu().numpy(), self.tokenizer, self.model, what="a task", name=name)


def _score(logits: Tensor, answer: Tensor) -> Scored:
    """Of logits ``[T, V]`` and the T tokens that came."""
    likelihoods = logits.log_softmax(-1, dtype=SOFTMAX_DTYPE).gather(-1, answer[:, None])
    total = float(likelihoods.sum())
    if math.isnan(total):
        raise EvaluationError(
            "the model answers NaN or infinity, so that no task can be scored; take another"
            " checkpoint, or compute in float32 if this was bfloat16"
        )
    return total, bool((logits.argmax(-1) == answer).all())

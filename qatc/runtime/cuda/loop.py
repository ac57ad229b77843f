"""A text of one row, token by token, on a device that is never waited for but for its last token.

transformers' loop asks after every token whether it was the last one, so that the device has
nothing to do until the processor has launched the next step. Here that step is launched first.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor


class Arrival:
    """A token on its way to host memory.

    Args:
        token: int64 ``[1, 1]``.
        buffer: int64 ``[1]`` in host memory, pinned where ``token`` is on a GPU.
    """

    def __init__(self, token: Tensor, buffer: Tensor) -> None:
        self._buffer = buffer
        buffer.copy_(token[0], non_blocking=True)
        self._copied: torch.cuda.Event | None = None
        if token.is_cuda:  # on the stream of the copy, whichever GPU is the current one
            self._copied = torch.cuda.current_stream(token.device).record_event()

    def wait(self) -> int:
        """The token, once it is here: what was launched after it is not waited for."""
        if self._copied is not None:
            self._copied.synchronize()
        return int(self._buffer)


def _drawn(probabilities: Tensor) -> Tensor:
    """Tokens ``[B, 1]`` as ``torch.multinomial`` draws them, which may wait to check its input."""
    waits = torch.empty_like(probabilities).exponential_(1)
    return (probabilities / waits).argmax(-1, keepdim=True)


def decoding_loop(
    tokens: int, ends: Collection[int], take: Callable[[int], bool]
) -> Callable[..., Tensor]:
    """A loop for ``generate(custom_generate=...)`` of transformers, which prepares all else.

    Args:
        tokens: to write, at most.
        ends: tokens that end the text.
        take: gets every token as soon as it is there; True ends the text.

    Returns:
        The loop, which gives the prompt and what was written, ``[1, T]``. It samples as
        transformers' own does.
    """

    def loop(
        model: Any,
        input_ids: Tensor,
        logits_processor: Any = None,
        stopping_criteria: Any = None,
        generation_config: Any = None,
        **options: Any,
    ) -> Tensor:
        cache = {"past_key_values": options.get("past_key_values"), "use_cache": True}
        on_gpu = input_ids.is_cuda
        buffers = [torch.empty(1, dtype=torch.long, pin_memory=on_gpu) for _ in range(2)]
        kept = {name: value for name, value in options.items() if name == "logits_to_keep"}
        output = model(input_ids=input_ids, **cache, **kept)
        cache["past_key_values"] = output.past_key_values
        for number in range(1, tokens + 1):
            logits = output.logits[:, -1].to(copy=True, dtype=torch.float32)
            scores = logits_processor(input_ids, logits)
            if generation_config.do_sample:
                token = _drawn(scores.softmax(-1))
            else:
                token = scores.argmax(-1, keepdim=True)
            arrival = Arrival(token, buffers[number % 2])
            input_ids = torch.cat([input_ids, token], -1)
            if number < tokens:  # of no use if the text ends here, which is not known yet
                output = model(input_ids=token, **cache)
            found = arrival.wait()
            if take(found) or found in ends:
                break
        return input_ids

    return loop

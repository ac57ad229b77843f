"""GGUF files run by llama.cpp, through whichever of its bindings is installed.

``llama-cpp-python`` builds llama.cpp for the very processor, which takes minutes; ``cyllama`` comes
built, for any x86-64 or Arm. Both are llama.cpp: the results are the same, the speeds are not.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

BINDINGS = ("llama_cpp", "cyllama")

CACHE_TYPES = {"f32": 0, "f16": 1}
"""ggml's numbers of types for K and V."""

FILE_TYPES = {"F32": 0, "Q4_0": 2, "Q8_0": 7, "Q4_K_M": 15}
"""llama.cpp's numbers of what a file is quantized to."""


def binding() -> str | None:
    """The binding that is taken; None if none is installed."""
    return next((name for name in BINDINGS if importlib.util.find_spec(name)), None)


def quantize(source: Path, path: Path, kind: str, threads: int = 1) -> Path:
    """Let llama.cpp quantize a file of floats to a key of :data:`FILE_TYPES`."""
    if binding() == "llama_cpp":
        import llama_cpp

        options = llama_cpp.llama_model_quantize_default_params()
        options.ftype, options.nthread = FILE_TYPES[kind], threads
        failed = llama_cpp.llama_model_quantize(str(source).encode(), str(path).encode(), options)
        assert failed == 0, f"llama.cpp could not write {path.name}"
    else:
        from cyllama.llama import llama_cpp as own

        own.disable_logging()
        params = own.LlamaModelQuantizeParams()
        params.ftype, params.nthread = FILE_TYPES[kind], threads
        own.model_quantize(str(source), str(path), params)
    return path


class LlamaFile:
    """A GGUF file opened by llama.cpp.

    Args:
        path: the file.
        slots: tokens that its cache holds; 0 loads the tokenizer alone.
        threads: to run with.
        cache: the type of K and V.
    """

    def __init__(self, path: Path, slots: int, threads: int = 1, cache: str = "f16") -> None:
        kind = CACHE_TYPES[cache]
        self._bound = binding()
        self._position = 0
        if self._bound == "llama_cpp":
            import llama_cpp

            self._model: Any = llama_cpp.Llama(
                str(path), n_ctx=slots or 512, n_threads=threads, n_threads_batch=threads,
                type_k=kind, type_v=kind, logits_all=True, vocab_only=not slots, verbose=False,
            )  # fmt: skip
            return
        from cyllama.llama import llama_cpp as own

        class Model(own.LlamaModel):  # type: ignore[misc]
            @property
            def n_vocab(self) -> int:  # which its own context looks for in vain
                return int(self.get_vocab().n_vocab)

        own.disable_logging()
        self._model = Model(str(path), own.LlamaModelParams())
        if slots:
            options = own.LlamaContextParams()
            options.n_ctx = options.n_batch = options.n_ubatch = slots
            options.n_threads = options.n_threads_batch = threads
            options.type_k = options.type_v = kind
            options.flash_attn_type = 0  # off: it rounds queries to fp16
            self._context: Any = own.LlamaContext(self._model, options)
            self._batch: Any = own.LlamaBatch(n_tokens=slots, embd=0, n_seq_max=1)

    def tokenize(self, text: str) -> list[int]:
        """The tokens of a text, with what belongs before it; special ones by their names."""
        if self._bound == "llama_cpp":
            return [int(id) for id in self._model.tokenize(text.encode(), True, True)]
        return [int(id) for id in self._model.get_vocab().tokenize(text, True, True)]

    def detokenize(self, ids: list[int]) -> str:
        """The text of tokens."""
        if self._bound == "llama_cpp":
            found: bytes = self._model.detokenize(ids)
            return found.decode(errors="replace")
        return str(self._model.get_vocab().detokenize(ids, len(ids) * 64 + 64, False, False))

    def ends(self) -> tuple[int, int]:
        """The tokens bos and eos."""
        vocabulary = self._model if self._bound == "llama_cpp" else self._model.get_vocab()
        return int(vocabulary.token_bos()), int(vocabulary.token_eos())

    def reset(self) -> None:
        """Begin anew, with an empty cache."""
        self._position = 0
        if self._bound == "llama_cpp":
            self._model.reset()
        else:
            self._context.kv_cache_clear()

    def logits(self, ids: list[int]) -> NDArray[np.float32]:
        """Logits ``[len(ids), V]`` after each of the next tokens."""
        first, self._position = self._position, self._position + len(ids)
        if self._bound == "llama_cpp":
            self._model.eval(ids)
            return np.array(self._model.scores[first : self._position], dtype=np.float32)
        self._batch.reset()
        for place, id in enumerate(ids):
            self._batch.add(id, first + place, [0], True)
        self._context.decode(self._batch)
        rows = [self._context.get_logits_ith(place) for place in range(len(ids))]
        return np.array(rows, dtype=np.float32)

    def log_probabilities(self, ids: list[int]) -> NDArray[np.float64]:
        """The logarithms of probabilities ``[len(ids), V]`` after each of the next tokens."""
        rows = self.logits(ids).astype(np.float64)
        rows -= rows.max(-1, keepdims=True)
        rows -= np.log(np.exp(rows).sum(-1, keepdims=True))
        return rows

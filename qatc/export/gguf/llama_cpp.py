"""GGUF files run by llama.cpp, through whichever of its bindings is installed.

``llama-cpp-python`` builds llama.cpp for the very processor, which takes minutes; ``cyllama`` comes
built, for any x86-64 or Arm. Both are llama.cpp: the results are the same, the speeds are not.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from qatc.errors import CheckpointError, ConfigError
from qatc.export.gguf.card import cache_types
from qatc.recipe.recipe import Recipe

BINDINGS = ("llama_cpp", "cyllama")

CACHE_TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q8_0": 8}
"""ggml's numbers of types for K and V."""

FLOAT_TYPES = ("f32", "f16")

_SENTENCE = "Once upon a time 7 foxes said: that's all."


def binding() -> str | None:
    """The binding that is taken; None if none is installed."""
    return next((name for name in BINDINGS if importlib.util.find_spec(name)), None)


def require_binding() -> str:
    """The binding that is taken.

    Raises:
        ConfigError: none is installed.
    """
    found = binding()
    if found is None:
        raise ConfigError(
            "llama.cpp is reached by a binding for Python, and none is installed; pip install"
            " cyllama, which comes built, or llama-cpp-python, which is built for this machine"
        )
    return found


class LlamaFile:
    """A GGUF file opened by llama.cpp.

    Args:
        path: the file.
        slots: tokens that its cache holds; 0 loads the tokenizer alone.
        threads: to run with.
        keys, values: the types of K and V, of :data:`CACHE_TYPES`.

    Raises:
        ConfigError: no binding of llama.cpp is installed.
        CheckpointError: llama.cpp cannot load the file.
    """

    def __init__(
        self, path: Path, slots: int, threads: int = 1, keys: str = "f16", values: str = "f16"
    ) -> None:
        self._bound = require_binding()
        self._position = 0
        opened = self._open_llama_cpp if self._bound == "llama_cpp" else self._open_cyllama
        try:
            opened(path, slots, threads, keys, values)
        except (ValueError, RuntimeError, OSError) as error:
            raise CheckpointError(
                f"llama.cpp cannot load {path} ({error}); export it again, or take a newer binding"
            ) from error

    def _open_llama_cpp(self, path: Path, slots: int, threads: int, keys: str, values: str) -> None:
        import llama_cpp

        self._model: Any = llama_cpp.Llama(
            str(path), n_ctx=slots or 512, n_threads=threads, n_threads_batch=threads,
            type_k=CACHE_TYPES[keys], type_v=CACHE_TYPES[values],
            flash_attn=_flash_attention(keys, values),
            logits_all=True, vocab_only=not slots, verbose=False,
        )  # fmt: skip
        self.vocabulary_size = self._model.n_vocab()
        self.context = int(llama_cpp.llama_model_n_ctx_train(self._model.model))

    def _open_cyllama(self, path: Path, slots: int, threads: int, keys: str, values: str) -> None:
        from cyllama.llama import llama_cpp as own

        class Model(own.LlamaModel):  # type: ignore[misc]
            @property
            def n_vocab(self) -> int:  # which its own context looks for in vain
                return int(self.get_vocab().n_vocab)

        own.disable_logging()
        self._model = Model(str(path), own.LlamaModelParams())
        self.vocabulary_size, self.context = self._model.n_vocab, self._model.n_ctx_train
        if slots:
            options = own.LlamaContextParams()
            options.n_ctx = options.n_batch = options.n_ubatch = slots
            options.n_threads = options.n_threads_batch = threads
            options.type_k, options.type_v = CACHE_TYPES[keys], CACHE_TYPES[values]
            options.flash_attn_type = int(_flash_attention(keys, values))
            self._context: Any = own.LlamaContext(self._model, options)
            self._batch: Any = own.LlamaBatch(n_tokens=slots, embd=0, n_seq_max=1)

    def tokenize(self, text: str) -> list[int]:
        """The tokens of a text, with what belongs before it; special ones by their names."""
        if self._bound == "llama_cpp":
            return [int(id) for id in self._model.tokenize(text.encode(), True, True)]
        return [int(id) for id in self._model.get_vocab().tokenize(text, True, True)]

    def require_tokens_of(self, tokenizer: Any) -> None:
        """Raise ``ConfigError`` if a tokenizer of transformers makes other tokens of a sentence."""
        own, theirs = self.tokenize(_SENTENCE), list(tokenizer(_SENTENCE)["input_ids"])
        first = [tokenizer.bos_token_id]
        if own[own[:1] == first :] != theirs[theirs[:1] == first :]:
            raise ConfigError(
                "the tokenizer of the teacher makes other tokens than the one in the GGUF file;"
                " give the model that the file was made from"
            )

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
        rows = np.empty((len(ids), self.vocabulary_size), dtype=np.float32)
        for place in range(len(ids)):  # each is a list of Python's: one at a time in memory
            rows[place] = self._context.get_logits_ith(place)
        return rows

    def log_probabilities(self, ids: list[int]) -> NDArray[np.float64]:
        """The logarithms of probabilities ``[len(ids), V]`` after each of the next tokens."""
        rows = self.logits(ids).astype(np.float64)
        rows -= rows.max(-1, keepdims=True)
        rows -= np.log(np.exp(rows).sum(-1, keepdims=True))
        return rows


def _flash_attention(keys: str, values: str) -> bool:
    """Only where K and V are quantized, which need it: it rounds queries to fp16."""
    return not {keys, values} <= set(FLOAT_TYPES)


class LlamaModel(nn.Module):
    """A GGUF file that is called as a causal LM of transformers is, for logits of whole rows.

    Args:
        path: the file.
        slots: tokens of a row, at most.
        keys, values: as of :class:`LlamaFile`.
    """

    def __init__(self, path: Path, slots: int, keys: str = "f16", values: str = "f16") -> None:
        super().__init__()
        threads = torch.get_num_threads()
        self.file = LlamaFile(path, slots, threads, keys, values)
        self.config = SimpleNamespace(max_position_embeddings=self.file.context)
        # Of a model, the device of its parameters is asked for.
        self.place = nn.Parameter(torch.zeros(()), requires_grad=False)
        self.ran_by = (
            f"llama.cpp ({binding()}) runs {path.name}, with K in {keys} and V in {values}"
        )
        self.scratch: TemporaryDirectory[str] | None = None

    def get_input_embeddings(self) -> Any:
        """What says how many tokens it has an embedding for."""
        return SimpleNamespace(num_embeddings=self.file.vocabulary_size)

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> SimpleNamespace:
        """Logits, fp32 ``[B, T, V]``, of rows that begin anew."""
        rows = []
        for ids in input_ids.tolist():
            self.file.reset()
            rows.append(torch.from_numpy(self.file.logits(ids)))
        return SimpleNamespace(logits=torch.stack(rows))


def find_gguf(place: Path) -> Path | None:
    """The GGUF file at a path: that itself, or the one in a directory; None if there is none.

    Raises:
        ConfigError: there are several.
    """
    if place.suffix == ".gguf":
        return place
    found = sorted(place.glob("*.gguf")) if place.is_dir() else []
    if len(found) > 1:
        raise ConfigError(f"{place} has {len(found)} GGUF files; give the one that is meant")
    return found[0] if found else None


def require_runnable(model: str, teacher: str | None, *, rounded: bool) -> None:
    """Raise ``ConfigError`` if what is no output of qatc cannot be evaluated by llama.cpp.

    Args:
        model: its place.
        teacher: the model that it is compared with, whose tokenizer reads the text.
        rounded: whether it is to be rounded first.
    """
    if rounded or find_gguf(Path(model)) is None:
        raise ConfigError(
            f"llama.cpp runs outputs of qatc quantize and GGUF files, and {model} is neither, or is"
            " rounded by --bits; quantize it first"
        )
    if teacher is None:
        raise ConfigError(
            f"{model} is read with the tokenizer of the model that it was made from; give that by"
            " --teacher"
        )


def open_gguf(path: Path, slots: int) -> LlamaModel:
    """A GGUF file in llama.cpp, with K and V as its recipe has them if qatc wrote it.

    Raises:
        QatcError: as of :class:`LlamaFile`, or the package gguf is not installed.
    """
    from qatc.export.gguf.plan import require_gguf

    if not path.is_file():
        raise CheckpointError(f"{path} is no file; give a GGUF file, or an output of qatc")
    require_gguf()
    return LlamaModel(path, slots, *_types_in(path))


def _types_in(path: Path) -> tuple[str, str]:
    import gguf

    try:
        fields = gguf.GGUFReader(path).fields
    except (ValueError, IndexError, KeyError, OSError) as error:
        raise CheckpointError(
            f"{path} is no GGUF file, or a damaged one ({error}); copy or export it again"
        ) from error
    if "qatc.recipe" not in fields:
        return "f16", "f16"
    own = fields["general.architecture"].contents()
    width = fields.get(f"{own}.attention.key_length")
    heads = fields[f"{own}.attention.head_count"].contents()
    values = width.contents() if width else fields[f"{own}.embedding_length"].contents() // heads
    return cache_types(Recipe.from_dict(json.loads(fields["qatc.recipe"].contents())), values)


def open_in_llama(
    source: Path, slots: int, *, trust_remote_code: bool = False
) -> tuple[LlamaModel, list[str]]:
    """An output of qatc in llama.cpp, by an export that is deleted with it, or a GGUF file.

    Returns:
        The model, and what llama.cpp computes in another way than an output was trained for.

    Raises:
        QatcError: it cannot be exported, or as of :func:`open_gguf`.
    """
    file = None if (source / "qatc.json").exists() else find_gguf(source)
    if file is not None:
        return open_gguf(file, slots), []
    from qatc.export.gguf.format import notes_of, write_plan
    from qatc.export.gguf.plan import make_plan
    from qatc.output import open_output

    require_binding()
    plan = make_plan(open_output(source, trust_remote_code=trust_remote_code))
    scratch = TemporaryDirectory(prefix="qatc-gguf-")
    write_plan(plan, Path(scratch.name))
    (file,) = Path(scratch.name).glob("*.gguf")
    model = open_gguf(file, slots)
    model.scratch = scratch
    return model, notes_of(plan)

"""What a model can be run by, once it is on disk: qatc in two ways, or the runtime of others."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

from qatc.errors import ConfigError
from qatc.export.gguf.llama_cpp import open_in_llama, require_runnable
from qatc.export.vllm.engine import VllmModel, open_in_vllm, require_vllm
from qatc.progress import Observer

Runtime = Literal["trained", "packed", "llama.cpp", "vllm"]

FOREIGN: tuple[Runtime, ...] = ("llama.cpp", "vllm")
"""Those that are asked for the logits of a text only."""


def require_runs(model: str, runtime: Runtime, *, is_output: bool, rounded: bool) -> None:
    """Raise ``ConfigError`` if a runtime does not run such a model.

    Args:
        model: its place.
        runtime: its name.
        is_output: whether it is an output of qatc.
        rounded: whether it is to be rounded by a recipe first.
    """
    if runtime not in get_args(Runtime):
        *others, last = get_args(Runtime)
        raise ConfigError(f"the runtime is {', '.join(others)} or {last}; got {runtime!r}")
    if Path(model).suffix == ".gguf" and runtime != "llama.cpp":
        raise ConfigError(
            f"{model} is a GGUF file, which llama.cpp runs; add --runtime llama.cpp, and"
            " --teacher with the model that it was made from"
        )
    if runtime == "packed" and not is_output:
        raise ConfigError(
            f"{model} is no output of qatc quantize, so that there is nothing packed to"
            " run; leave out --runtime packed, or quantize it first"
        )
    if runtime == "vllm":
        if rounded:
            raise ConfigError(
                "vLLM runs what is on disk, and --bits rounds it in memory; quantize it first"
            )
        require_vllm()


def require_readable(model: str, teacher: str | None, runtime: Runtime, *, rounded: bool) -> None:
    """Raise ``ConfigError`` if a runtime does not run what is no output of qatc on a text."""
    if runtime == "llama.cpp":
        require_runnable(model, teacher, rounded=rounded)


def refuse_tasks(runtime: Runtime) -> None:
    """Raise ``ConfigError`` if a runtime is not asked tasks here; with the way out."""
    if runtime == "llama.cpp":
        raise ConfigError(
            "llama.cpp is asked for the logits of a text only; leave out --tasks, or --runtime"
        )
    if runtime == "vllm":
        raise ConfigError(
            "vLLM is asked for the logits of a text only; leave out --runtime, or serve an export"
            " with vLLM, and let lm-eval ask that: lm_eval --model local-completions"
        )


def open_foreign(
    runtime: Runtime,
    model: str,
    length: int,
    tokenizer: Any,
    observer: Observer,
    *,
    trust_remote_code: bool,
    is_output: bool,
) -> Any:
    """The model in one of :data:`FOREIGN`, for rows of a length; what differs there is noted."""
    found: Any
    if runtime == "vllm":
        found, notes = open_in_vllm(Path(model), length, trust_remote_code=trust_remote_code)
    else:
        found, notes = open_in_llama(Path(model), length, trust_remote_code=trust_remote_code)
        if not is_output:
            found.file.require_tokens_of(tokenizer)
    for note in (found.ran_by, *notes):
        observer.note(note)
    return found


@contextmanager
def released(model: Any) -> Iterator[Any]:
    """The model inside the block; what runs it in processes of its own ends with that."""
    try:
        yield model
    finally:
        if isinstance(model, VllmModel):
            model.close()

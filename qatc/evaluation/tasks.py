"""The tasks of lm-eval (``pip install 'qatc[eval]'``) on a model that qatc loaded.

lm-eval serves as a library: it has the tasks, their prompts and their metrics. The model is handed
over as it is (see :mod:`qatc.runtime.language_model`); lm-eval's own loading of a qatc output
would measure other numerics.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import qatc
from qatc.errors import ConfigError, DataError
from qatc.evaluation.scores import TaskResults
from qatc.progress import Observer

_COMMON_SENSE = "boolq piqa social_iqa hellaswag winogrande arc_easy arc_challenge openbookqa"

PRESETS: Mapping[str, Mapping[str, int]] = {
    "paper": dict.fromkeys(_COMMON_SENSE.split(), 0),
    "fewshot": {"mmlu": 5, "triviaqa": 5},
    "perplexity": {"wikitext": 0, "c4": 0},
}
"""Tasks of LLM-QAT (Liu et al., 2023), by lm-eval's names, and the examples in their prompts."""

LOCAL = "_local"
"""A task of a preset gives way to the one of this ending, if ``include_path`` has it."""

_ALSO_CALLED = {"social_iqa": "siqa", "wikitext": "wikitext2"}

LONGEST = 2048
"""Tokens that a model is given at once unless told otherwise, if it takes that many."""

_SEED = 1234  # of the choice of few-shot examples: lm-eval's own default


def evaluate_tasks(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    include_path: Path | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    num_fewshot: int | None = None,
    max_length: int | None = None,
    observer: Observer | None = None,
) -> TaskResults:
    """Evaluate a model on tasks of lm-eval.

    Args:
        model: a transformers causal LM: of full precision, prepared, or made by ``qatc.load``.
        tokenizer: its tokenizer.
        tasks: names of tasks, groups or tags of lm-eval, or of :data:`PRESETS`.
        include_path: directory of task files besides lm-eval's own.
        limit: items of each task, the first ones; ``None`` for all.
        batch_size: rows per forward pass.
        num_fewshot: examples in the prompt, for tasks that leave it open; ``None``: what the task
            or the preset says.
        max_length: tokens that the model is given at once; ``None`` for :data:`LONGEST`, or what it
            takes.
        observer: is told of the progress.

    Raises:
        ConfigError: lm-eval is not installed, or there is no such task.
        DataError: the data of a task cannot be fetched or read.
        EvaluationError: the model answers NaN, or an answer does not fit into ``max_length``.
    """
    observer = observer or Observer()
    numbers = {"limit": limit, "batch size": batch_size, "length": max_length}
    for what, number in (numbers | {"number of examples": num_fewshot}).items():
        if number is not None and number < (what != "number of examples"):
            raise ConfigError(f"the {what} is too small; got {number}")
    lm_eval = _import_lm_eval()
    from qatc.runtime.language_model import SOFTMAX_DTYPE, LanguageModel

    chosen = load_tasks(tasks, include_path, num_fewshot)
    takes = getattr(model.config, "max_position_embeddings", None) or LONGEST
    language_model = LanguageModel(
        model,
        tokenizer,
        batch_size=batch_size,
        max_length=max_length or min(LONGEST, takes),
        on_progress=observer.evaluated,
    )
    raw = dict[str, Any]()
    for name, loaded in chosen.items():
        observer.stage(f"Evaluating on {name}")
        found = lm_eval.evaluator.evaluate(
            language_model, loaded, limit=limit, bootstrap_iters=1000, log_samples=True
        )
        raw[name] = json.loads(json.dumps(found, default=lm_eval.utils.handle_non_serializable))
    numerics = {
        "dtype": str(model.dtype).removeprefix("torch."),
        "softmax_dtype": str(SOFTMAX_DTYPE).removeprefix("torch."),
        "device": str(language_model.device),
        "batch_size": batch_size,
        "max_length": language_model.max_length,
        "limit": limit,
        "versions": {"qatc": qatc.__version__}
        | {name: version(name) for name in ("lm_eval", "torch", "transformers")},
    }
    return TaskResults.of(raw, numerics)


def load_tasks(
    names: Sequence[str], include_path: Path | None = None, num_fewshot: int | None = None
) -> dict[str, Any]:
    """Find tasks and fetch their data.

    Returns:
        What lm-eval loaded, by the names that the presets among ``names`` stand for.

    Raises:
        ConfigError, DataError: as :func:`evaluate_tasks`.
    """
    if include_path is not None and not include_path.is_dir():
        raise ConfigError(f"--include-path takes a directory of task files; got {include_path}")
    _import_lm_eval()
    from lm_eval.tasks import TaskManager

    given = None if include_path is None else str(include_path)
    manager = TaskManager(include_path=given, include_defaults=False)
    wanted = resolve(names, manager.all_tasks)
    if fetches := not wanted.keys() <= set(manager.all_subtasks):
        manager = _with_those_of_lm_eval(given)
    for name in wanted:
        if name not in manager.all_tasks:
            near = difflib.get_close_matches(name, [*PRESETS, *manager.all_tasks], n=5)
            hint = f"; near it are {', '.join(near)}" if near else ""
            raise ConfigError(
                f"lm-eval has no task {name!r}{hint}; task files of your own are found with"
                " --include-path"
            )
    loaded = {}
    with _no_waiting_for_the_hub() if fetches else nullcontext():
        for name, shots in wanted.items():
            with _readable_errors(name):
                loaded[name] = manager.load([name])
            for task in loaded[name]["tasks"].values():
                if getattr(task, "UNSAFE_CODE", False):
                    raise ConfigError(f"the task {name} runs what the model wrote: leave it out")
                _set_shots(task, shots if num_fewshot is None else num_fewshot)
    return loaded


@cache
def _with_those_of_lm_eval(include_path: str | None) -> Any:
    """All tasks there are. To read lm-eval's thousands of files takes seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=include_path)


def resolve(names: Iterable[str], local: Iterable[str] = ()) -> dict[str, int | None]:
    """The tasks that are meant, presets among them taken apart, and the shots that those ask for.

    Args:
        names: of tasks and presets.
        local: names of the tasks that the user brought. Where ``NAME_local`` is one of them, it
            stands for the task NAME of a preset, and its file says how many shots there are.

    Raises:
        ConfigError: there are none.
    """
    local, found = set(local), dict[str, int | None]()
    for name in names:
        if name not in PRESETS:
            found.setdefault(name, None)
            continue
        for task, shots in PRESETS[name].items():
            own = [called + LOCAL for called in (task, _ALSO_CALLED.get(task, task))]
            brought = next((called for called in own if called in local), None)
            found[brought or task] = None if brought else shots
    if not found:
        raise ConfigError(f"name at least one task, or one of {', '.join(PRESETS)}")
    return found


def _import_lm_eval() -> Any:
    try:
        import lm_eval.evaluator
        import lm_eval.models.huggingface
    except ImportError as error:
        raise ConfigError(
            f"tasks are evaluated by lm-eval, which cannot be imported ({error}); install it with"
            " pip install 'qatc[eval]'"
        ) from error
    return lm_eval


def _set_shots(task: Any, shots: int | None) -> None:
    """As lm-eval does it: a task that says 0 means it."""
    own = task.get_config("num_fewshot")
    if own is None or (shots is not None and own != 0):
        task.set_config(key="num_fewshot", value=shots or 0)
    task.set_fewshot_seed(seed=_SEED)


@contextmanager
def _readable_errors(name: str) -> Iterator[None]:
    """A task file is the user's, and so is whatever is wrong with it."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split())
        if isinstance(error, OSError):
            raise DataError(
                f"the data set of the task {name} could not be fetched or read: {reason}. Connect"
                " to the Hugging Face hub once, so that it is kept on this machine, or name a task"
                " that reads local files, with --include-path for the directory of its file; a"
                " relative path in it starts where the command runs"
            ) from error
        raise ConfigError(
            f"the task {name} cannot be set up, {type(error).__name__}: {reason}; mend its file or"
            " choose another task"
        ) from error


@contextmanager
def _no_waiting_for_the_hub() -> Iterator[None]:
    """Where the hub does not answer, take what is on this machine, and retry nothing."""
    import datasets
    import huggingface_hub

    holders: tuple[Any, ...] = (datasets.config, huggingface_hub.constants)
    before = [holder.HF_HUB_OFFLINE for holder in holders]
    try:
        huggingface_hub.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=5)
    except Exception:  # whatever the client and the network may raise
        for holder in holders:
            holder.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        for holder, value in zip(holders, before, strict=True):
            holder.HF_HUB_OFFLINE = value

"""Evaluate a model on disk: a quantized output with the numerics it was trained for, or another."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from qatc.data.corpus import (
    Corpus,
    Rows,
    require_known,
    text_rows,
    tokenizer_fingerprint,
)
from qatc.data.documents import read_text
from qatc.errors import ConfigError
from qatc.evaluation.metrics import Metrics, evaluate
from qatc.evaluation.reference import prepare_reference
from qatc.evaluation.scores import Pairing, TaskResults, pair
from qatc.evaluation.tasks import evaluate_tasks, load_tasks
from qatc.export.running import (
    FOREIGN,
    Runtime,
    open_foreign,
    refuse_tasks,
    released,
    require_readable,
    require_runs,
)
from qatc.machine.device import pick_device
from qatc.models import load_model, load_tokenizer
from qatc.models.load import check_length
from qatc.models.preparation import prepare
from qatc.output import load_reference, open_output
from qatc.progress import Observer
from qatc.ptq import rotate_inputs
from qatc.recipe.recipe import Recipe
from qatc.runtime.model import load as load_packed
from qatc.storage.directories import recover


@dataclass(frozen=True)
class Evaluated:
    """Which model to evaluate, and how it runs.

    Args:
        model: directory of a qatc output, or hub name or directory of a full-precision model.
        teacher: full-precision model to compare with.
        recipe: round a full-precision model by this recipe.
        batch_size: rows per forward pass.
        device: torch device, or ``auto``.
        compile: compile the graphs; ``None``: if this machine can.
        trust_remote_code: run code that comes with the model.
        runtime: what runs an output: ``trained``, the graph that was trained, ``packed``, the
            integer model of :func:`qatc.load`, or ``llama.cpp`` or ``vllm``, for a text only.
    """

    model: str
    teacher: str | None = None
    recipe: Recipe | None = None
    batch_size: int = 8
    device: str = "auto"
    compile: bool | None = None
    trust_remote_code: bool = False
    runtime: Runtime = "trained"

    def __post_init__(self) -> None:
        recover(Path(self.model))
        if self.is_output and self.recipe is not None:
            raise ConfigError(f"{self.model} is quantized already; leave out --bits")
        rounded = self.recipe is not None
        require_runs(self.model, self.runtime, is_output=self.is_output, rounded=rounded)

    @property
    def is_output(self) -> bool:
        """Whether the model is an output of qatc."""
        return (Path(self.model) / "qatc.json").exists()

    def load(self) -> Any:
        """The model in fp32, with fake-quantized activations and KV if it is quantized."""
        model: Any
        if self.runtime == "packed":
            return load_packed(
                self.model,
                device=self.device,
                dtype=torch.float32,
                compile=self.compile,
                trust_remote_code=self.trust_remote_code,
            )
        if self.is_output:
            output = open_output(Path(self.model), trust_remote_code=self.trust_remote_code)
            model = load_reference(output).to(pick_device(self.device))  # type: ignore[arg-type]
            return prepare_reference(model, output, compile=self.compile)
        model = self.load_float(self.model)
        if self.recipe is None:
            return model
        if self.recipe.rotate_inputs:
            rotate_inputs(model, self.recipe)
        return prepare(model, self.recipe, compile=self.compile)

    def load_float(self, name: str) -> Any:
        """A full-precision model in fp32."""
        device, trust = pick_device(self.device), self.trust_remote_code
        return load_model(name, dtype=torch.float32, device=device, trust_remote_code=trust).model


@dataclass(frozen=True)
class AssessConfig(Evaluated):
    """What to evaluate, and on which text.

    Args:
        text: text file, or
        data: corpus; one of the two is needed.
        length: tokens per row.
        max_tokens: tokens to evaluate on, at most.
    """

    text: Path | None = None
    data: Path | None = None
    length: int = 256
    max_tokens: int = 65_536

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.text is None) == (self.data is None):
            raise ConfigError(
                "say what to evaluate on: either --text FILE or --data CORPUS, or --tasks NAMES"
            )
        if self.length < 4 or self.batch_size < 1:
            raise ConfigError(
                "length must be at least 4 and batch_size at least 1;"
                f" got {self.length} and {self.batch_size}"
            )
        if not self.is_output:
            rounded = self.recipe is not None
            require_readable(self.model, self.teacher, self.runtime, rounded=rounded)

    @property
    def is_alone(self) -> bool:
        """Whether it is a file of llama.cpp's, with no tokenizer of transformers beside it."""
        return self.runtime == "llama.cpp" and not self.is_output

    @property
    def tokenizer(self) -> Any:
        """What makes tokens of the text: the model's, or its teacher's."""
        name = self.teacher if self.is_alone and self.teacher is not None else self.model
        return load_tokenizer(name, trust_remote_code=self.trust_remote_code)

    def load_by(self, observer: Observer) -> Any:
        """The model by its runtime; what differs in one of others is noted."""
        if self.runtime not in FOREIGN:
            return self.load()
        return open_foreign(
            self.runtime,
            self.model,
            self.length,
            self.tokenizer,
            observer,
            trust_remote_code=self.trust_remote_code,
            is_output=self.is_output,
        )


def assess(config: AssessConfig, observer: Observer | None = None) -> Metrics:
    """Evaluate a model in fp32, with fake-quantized activations and KV if it is quantized.

    In a runtime of others, with what that computes; it is told in notes.

    Raises:
        QatcError: something cannot be read; with the way out.
    """
    observer = observer or Observer()
    observer.stage(f"Loading {config.model}")
    tokenizer = config.tokenizer
    rows = _rows(config, tokenizer)
    if config.teacher is not None:
        _require_one_vocabulary(config, tokenizer)
    with released(config.load_by(observer)) as model:
        check_length(config.model, model.config, config.length)
        teacher = None if config.teacher is None else config.load_float(config.teacher)
        for name, judged in ((config.model, model), (config.teacher, teacher)):
            if name is not None and judged is not None:
                what = f"the text {config.text or config.data}"
                require_known(rows.tokens, tokenizer, judged, what=what, name=name)
        observer.stage(f"Evaluating on {rows.tokens.size:,} tokens")
        return evaluate(
            model,
            rows,
            teacher=teacher,
            batch_size=config.batch_size,
            on_progress=observer.evaluated,
        )


@dataclass(frozen=True)
class TasksConfig(Evaluated):
    """What to evaluate, and on which tasks of lm-eval.

    Args:
        tasks, include_path, limit, num_fewshot, max_length: as of
            :func:`qatc.evaluation.tasks.evaluate_tasks`.
        teacher: a full-precision model, or the file of results of a model that has answered these
            tasks before.
    """

    tasks: tuple[str, ...] = ()
    include_path: Path | None = None
    limit: int | None = None
    num_fewshot: int | None = None
    max_length: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_tasks(self.runtime)

    @property
    def ran_by(self) -> str:
        """What runs the model, in words."""
        if self.is_output:
            return self.runtime
        return "full precision" if self.recipe is None else "rounded"


@dataclass(frozen=True)
class TaskComparison:
    """A model on tasks, and its teacher on the same items if it was asked for."""

    model: TaskResults
    teacher: TaskResults | None = None

    @property
    def pairings(self) -> dict[str, Pairing]:
        """The model beside its teacher, for each task whose items are right or wrong."""
        if self.teacher is None:
            return {}
        found = {}
        for own, other in zip(self.model.scores, self.teacher.scores, strict=True):
            assert own.asked == other.asked, "the same questions"
            if own.right_or_wrong and own.scores and other.scores:
                found[own.task] = pair(own.scores, other.scores)
        return found

    def to_dict(self, raw: bool = False) -> dict[str, Any]:
        """Plain data; with ``raw``, all that lm-eval returned as well."""
        found = self.model.to_dict() | ({"lm_eval": self.model.raw} if raw else {})
        if self.teacher is not None:
            found["teacher"] = self.teacher.to_dict()
            found["teacher"] |= {"lm_eval": self.teacher.raw} if raw else {}
            found["flips"] = {
                task: asdict(pairing) | {"p": pairing.p} for task, pairing in self.pairings.items()
            }
        return found


def assess_tasks(config: TasksConfig, observer: Observer | None = None) -> TaskComparison:
    """Evaluate a model, and then its teacher, on tasks of lm-eval, both in fp32.

    Raises:
        QatcError: something cannot be read or fetched; with the way out.
    """
    observer = observer or Observer()
    observer.stage("Reading the tasks")
    asked = load_tasks(config.tasks, config.include_path)  # a wrong name ends it before hours
    earlier = _answered_before(config, list(asked))
    names = [config.model]
    if config.teacher is not None and earlier is None:
        names.append(config.teacher)
    trust = config.trust_remote_code
    tokenizers = [load_tokenizer(name, trust_remote_code=trust) for name in names]
    results = list[TaskResults]()
    for name, tokenizer in zip(names, tokenizers, strict=True):
        observer.stage(f"Loading {name}")
        is_teacher = bool(results)
        model = config.load_float(name) if is_teacher else config.load()
        if config.max_length is not None:
            check_length(name, model.config, config.max_length)
        found = evaluate_tasks(
            model,
            tokenizer,
            config.tasks,
            include_path=config.include_path,
            limit=config.limit,
            batch_size=config.batch_size,
            num_fewshot=config.num_fewshot,
            max_length=config.max_length,
            observer=observer,
        )
        ran = {"model": name, "runtime": "full precision" if is_teacher else config.ran_by}
        results.append(replace(found, numerics=ran | found.numerics))
    if earlier is not None:
        if changed := _other_questions(results[0], earlier):
            observer.note(f"not compared with {config.teacher}: other questions, in {changed}")
        else:
            results.append(earlier)
    return TaskComparison(*results)


def _answered_before(config: TasksConfig, tasks: list[str]) -> TaskResults | None:
    """What the teacher answered, if a file of its results is given for it.

    Raises:
        ConfigError: it answered something else.
    """
    if config.teacher is None or not Path(config.teacher).is_file():
        return None
    found = TaskResults.read(Path(config.teacher))
    if missing := [task for task in tasks if task not in found.raw]:
        raise ConfigError(
            f"{config.teacher} has no answers to {', '.join(missing)}; leave them out, or give the"
            " teacher itself"
        )
    if (limit := found.numerics["limit"]) != config.limit:
        items = "all items" if limit is None else f"--limit {limit}"
        raise ConfigError(f"{config.teacher} has the answers to {items}; ask for the same here")
    return TaskResults.of({task: found.raw[task] for task in tasks}, found.numerics)


def _other_questions(model: TaskResults, teacher: TaskResults) -> str:
    """Tasks in which the two were asked different things; empty if they were not."""
    own, others = ({score.task: score.asked for score in r.scores} for r in (model, teacher))
    return ", ".join(task for task in own | others if own.get(task) != others.get(task))


def _require_one_vocabulary(config: AssessConfig, tokenizer: Any) -> None:
    """KL compares two distributions over the same tokens."""
    assert config.teacher is not None
    other = load_tokenizer(config.teacher, trust_remote_code=config.trust_remote_code)
    if tokenizer_fingerprint(other) != tokenizer_fingerprint(tokenizer):
        raise ConfigError(
            f"the teacher {config.teacher} has another tokenizer than {config.model}; give the"
            " full-precision model that it was made from"
        )


def _rows(config: AssessConfig, tokenizer: Any) -> Rows:
    if config.data is not None:
        corpus = Corpus.open(config.data)
        corpus.require_tokenizer(tokenizer)
        rows = corpus.rows(config.length)
        return rows[: max(1, config.max_tokens // config.length)]
    assert config.text is not None
    return text_rows(read_text(config.text), tokenizer, config.length, config.max_tokens)

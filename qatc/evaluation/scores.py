"""Scores on tasks, and two models on the same items: how many answers change, and is that chance.

The standard error of an accuracy says how far another sample of questions might move it. Two models
that answered the same questions share that error, so that their difference is known far better:
what counts are the answers that only one of them has right.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from statistics import fmean
from typing import Any

from qatc.errors import ConfigError, DataError
from qatc.storage.files import read_json

METRICS = ("acc_norm", "acc", "exact_match", "word_perplexity")
"""What is shown of a task: the first of these that it has, else its first metric. Accuracy is
normalized by the answer's length in bytes where the task offers it, as in LLaMA's tables."""


@dataclass(frozen=True)
class TaskScore:
    """One task, or a group of tasks such as mmlu.

    Attributes:
        task: its name.
        metric: which of its metrics, see :data:`METRICS`.
        value: the metric over all items.
        stderr: its standard error over the choice of items; None where lm-eval gives none.
        shots: examples in the prompt that were drawn by lm-eval.
        items: hash of every item that was asked.
        scores: the metric of each item; None where it has none of its own, as in a perplexity.
    """

    task: str
    metric: str
    value: float
    stderr: float | None
    shots: int
    items: tuple[str, ...] = field(repr=False)
    scores: tuple[float, ...] | None = field(repr=False)

    @property
    def asked(self) -> tuple[Any, ...]:
        """What another model has to have been asked to be compared."""
        return self.task, self.metric, self.shots, self.items

    @property
    def right_or_wrong(self) -> bool:
        """Whether each item is either answered (1) or not (0)."""
        return self.scores is not None and set(self.scores) <= {0, 1}

    def to_dict(self) -> dict[str, Any]:
        """Plain data, without that of each item."""
        own = {name: getattr(self, name) for name in ("task", "metric", "value", "stderr", "shots")}
        return own | {"items": len(self.items)}


@dataclass(frozen=True)
class TaskResults:
    """What :func:`evaluate_tasks` found.

    Attributes:
        scores: of each task.
        numerics: how it was computed: dtypes, batch size, lengths, limit, versions.
        raw: what lm-eval returned for each name that was asked for, every item included.
    """

    scores: tuple[TaskScore, ...]
    numerics: dict[str, Any]
    raw: dict[str, Any] = field(repr=False)

    @property
    def average(self) -> tuple[float, float | None] | None:
        """Mean and standard error over the tasks whose items are right or wrong; None if none."""
        counted = [score for score in self.scores if score.right_or_wrong]
        if not counted:
            return None
        errors = [score.stderr for score in counted if score.stderr is not None]
        known = len(errors) == len(counted)
        stderr = sum(error**2 for error in errors) ** 0.5 / len(counted) if known else None
        return fmean(score.value for score in counted), stderr

    def to_dict(self) -> dict[str, Any]:
        """Plain data, without that of each item."""
        average = dict(zip(("value", "stderr"), self.average or (None, None), strict=True))
        average["tasks"] = sum(score.right_or_wrong for score in self.scores)
        scores = [score.to_dict() for score in self.scores]
        return {"tasks": scores, "average": average, "numerics": self.numerics}

    @classmethod
    def of(cls, raw: dict[str, Any], numerics: dict[str, Any]) -> TaskResults:
        """The scores in what lm-eval returned."""
        scores = tuple(score for name, found in raw.items() for score in _scores(name, found))
        return cls(scores, numerics, raw)

    @classmethod
    def read(cls, path: Path) -> TaskResults:
        """Those in a file of ``qatc evaluate --tasks --output``: of its model, not of its teacher.

        Raises:
            DataError: it is no such file.
        """
        plain = read_json(path)
        try:
            numerics = {**plain["numerics"], "limit": plain["numerics"]["limit"]}
            return cls.of(plain["lm_eval"], numerics)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(
                f"{path} does not hold what qatc evaluate --tasks ... --output FILE writes"
            ) from error


@dataclass(frozen=True)
class Pairing:
    """Right and wrong answers of a model beside those of its teacher.

    Attributes:
        items: questions that both answered.
        lost: what only the teacher has right.
        gained: what only the model has right.
    """

    items: int
    lost: int
    gained: int

    @property
    def p(self) -> float:
        """Two-sided p value of McNemar's exact test, see :func:`mcnemar`."""
        return mcnemar(self.lost, self.gained)

    def __add__(self, other: Pairing) -> Pairing:
        return Pairing(self.items + other.items, self.lost + other.lost, self.gained + other.gained)


def pair(model: Sequence[float], teacher: Sequence[float]) -> Pairing:
    """Compare scores of the same items in the same order, 1 for a right answer and 0 for none.

    Raises:
        ConfigError: they are not of equally many items.
    """
    if len(model) != len(teacher):
        raise ConfigError(
            f"only answers to the same items can be compared; got {len(model)} and {len(teacher)}"
        )
    both = list(zip(model, teacher, strict=True))
    return Pairing(len(both), both.count((0, 1)), both.count((1, 0)))


def mcnemar(lost: int, gained: int) -> float:
    """How often chance alone makes the flips at least this uneven, if either way is as likely.

    Twice the binomial tail ``P(X <= min(lost, gained))`` of ``lost + gained`` fair draws, at most 1
    (McNemar, 1947, in its exact form). Integers of any size make the sum exact.
    """
    flips = lost + gained
    term = tail = 1
    for k in range(1, min(lost, gained) + 1):
        term = term * (flips - k + 1) // k
        tail += term
    p: float = 2 * tail / 2**flips
    return min(1.0, p)


def _scores(name: str, found: Mapping[str, Any]) -> Iterator[TaskScore]:
    """The rows of a table for what lm-eval returned when it was asked for ``name``."""
    samples = found["samples"]
    figures = found.get("groups", {}).get(name)
    if figures is not None:
        yield _score(name, figures, sorted(samples), found)
    else:
        for task in sorted(samples):
            yield _score(task, found["results"][task], [task], found)


def _score(
    name: str, figures: Mapping[str, Any], tasks: Sequence[str], found: Mapping[str, Any]
) -> TaskScore:
    known = [tuple(key.split(",")) for key in figures if "," in key and "_stderr," not in key]
    metric, kind = min(
        known, key=lambda each: METRICS.index(each[0]) if each[0] in METRICS else len(METRICS)
    )
    items = [item for task in tasks for item in found["samples"][task] if item["filter"] == kind]
    scores = [item.get(metric) for item in items]
    numbers = all(isinstance(score, Real) for score in scores)
    stderr = figures.get(f"{metric}_stderr,{kind}")
    return TaskScore(
        task=name,
        metric=metric,
        value=float(figures[f"{metric},{kind}"]),
        stderr=float(stderr) if isinstance(stderr, Real) else None,
        shots=max(found["n-shot"][task] for task in tasks),
        items=tuple(item["doc_hash"] for item in items),
        scores=tuple(map(float, scores)) if numbers else None,
    )

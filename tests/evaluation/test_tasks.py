"""Tasks of lm-eval against likelihoods and answers computed one text at a time in float64."""

from __future__ import annotations

import copy
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import qatc
from qatc.errors import ConfigError, DataError, EvaluationError
from qatc.evaluation.evaluate import TaskComparison, TasksConfig, assess_tasks
from qatc.evaluation.scores import Pairing, TaskResults, TaskScore
from qatc.evaluation.tasks import (
    PRESETS,
    _with_those_of_lm_eval,
    evaluate_tasks,
    load_tasks,
    resolve,
)
from qatc.models import load_tokenizer
from qatc.models.preparation import prepare
from qatc.output import load_reference
from qatc.progress import Observer
from qatc.recipe.recipe import Recipe
from qatc.report.tables import numerics_text, task_rows
from qatc.runtime.forward import RUNTIME
from qatc.storage.files import write_json
from tests.conftest import make_llama, make_output
from tests.evaluation.local_tasks import CHOICE, QUESTIONS, TEXTS, write_task, write_tasks

pytest.importorskip("lm_eval.models.huggingface")

NAMES = ["tiny_choice", "tiny_letter", "tiny_text", "tiny_answer"]


@pytest.fixture(scope="module")
def tasks_path(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory of task files, whose data is kept out of the user's cache."""
    import datasets

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("hf"))
        yield write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    return make_output(tmp_path_factory.mktemp("out") / "out", Recipe(), tokenizer=tokenizer)


@pytest.fixture(scope="module")
def found(tasks_path: Path, tokenizer: Any) -> TaskResults:
    """In batches of four, which hold rows of several lengths, with windows of 24 tokens."""
    return run(make_llama(), tokenizer, NAMES, tasks_path, max_length=24)


def run(model: Any, tokenizer: Any, names: list[str], path: Path, **options: Any) -> TaskResults:
    settings: dict[str, Any] = {"batch_size": 4} | options
    return evaluate_tasks(model, tokenizer, names, include_path=path, **settings)


def responses(found: TaskResults, name: str) -> list[Any]:
    """What lm-eval was answered for each item."""
    return [[answer[0] for answer in item["resps"]] for item in found.raw[name]["samples"][name]]


def log_p(model: Any, ids: list[int]) -> torch.Tensor:
    """Of each token but the first, in float64, without padding."""
    logits = copy.deepcopy(model).double()(torch.tensor([ids]), use_cache=False).logits[0, :-1]
    shifted = logits - logits.max(-1, keepdim=True).values
    every = shifted - shifted.exp().sum(-1, keepdim=True).log()
    return every[torch.arange(len(ids) - 1), torch.tensor(ids[1:])]


@pytest.mark.parametrize("name", ["tiny_choice", "tiny_letter"])
@torch.no_grad()
def test_choices(found: TaskResults, tokenizer: Any, name: str) -> None:
    model, right = make_llama(), []
    for item, given in zip(QUESTIONS, responses(found, name), strict=True):
        choices: Any = item["choices"] if name == "tiny_choice" else ["a", "b", "c"]
        start = len(tokenizer(item["question"])["input_ids"])
        expected = []
        for choice in choices:
            ids = tokenizer(f"{item['question']}{choice}")["input_ids"]
            expected.append(float(log_p(model, ids)[start - 1 :].sum()))
        assert [likelihood for likelihood, _ in given] == pytest.approx(expected, abs=1e-4)
        right.append(float(expected.index(max(expected)) == item["label"]))
    (score,) = [score for score in found.scores if score.task == name]
    assert score.metric == "acc" and score.scores == tuple(right) and score.right_or_wrong
    assert score.value == pytest.approx(sum(right) / 3)
    spread = math.sqrt(sum((value - score.value) ** 2 for value in right) / 2 / 3)
    assert score.stderr == pytest.approx(spread)


@torch.no_grad()
def test_whole_texts(found: TaskResults, tokenizer: Any) -> None:
    """A window has as many tokens in front as fit; each token is scored once."""
    model, total = make_llama(), 0.0
    for text, (given,) in zip(TEXTS, responses(found, "tiny_text"), strict=True):
        ids = [tokenizer.bos_token_id, *tokenizer(text)["input_ids"]]
        expected, done = 0.0, 1
        while done < len(ids):
            end = min(done + 24, len(ids))
            window = ids[max(0, end - 25) : end]
            expected += float(log_p(model, window)[-(end - done) :].sum())
            done = end
        assert given == pytest.approx(expected, abs=1e-3)
        total += expected
    (score,) = [score for score in found.scores if score.task == "tiny_text"]
    words = sum(len(text.split()) for text in TEXTS)
    assert score.value == pytest.approx(math.exp(-total / words), rel=1e-4)
    assert score.scores is None and not score.right_or_wrong


def greedy(model: Any, tokenizer: Any, prompt: str) -> str:
    """Nine tokens by the largest logit, from the whole text each time, up to the full stop."""
    ids = tokenizer(prompt)["input_ids"]
    start = len(ids)
    for _ in range(9):
        ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        if ids[-1] == tokenizer.eos_token_id:
            break
    return str(tokenizer.decode(ids[start:], skip_special_tokens=True)).split(".")[0]


@torch.no_grad()
def test_answers(tasks_path: Path, out: Path, tokenizer: Any) -> None:
    """Of all three kinds of model, padded on the left."""
    trained = prepare(load_reference(out), Recipe(), compile=False)
    packed = qatc.load(out, compile=False)
    for model in (make_llama(), trained, packed):
        given = responses(run(model, tokenizer, ["tiny_answer"], tasks_path), "tiny_answer")
        expected = [greedy(model, tokenizer, str(item["question"])) for item in QUESTIONS]
        assert [answer for (answer,) in given] == expected
        assert len(set(expected)) > 1


def test_packed_is_trained(tasks_path: Path, out: Path) -> None:
    names, both = NAMES[:3], list[TaskResults]()
    for runtime in ("trained", "packed"):
        options: dict[str, Any] = {"runtime": runtime, "include_path": tasks_path}
        config = TasksConfig(str(out), tasks=tuple(names), compile=False, **options)
        both.append(assess_tasks(config).model)
        assert hasattr(config.load(), RUNTIME) == (runtime == "packed")
    for name in names:
        trained, packed = (torch.tensor(responses(found, name)).double() for found in both)
        assert torch.allclose(trained, packed, atol=1e-3)
    full = run(make_llama(), load_tokenizer(str(out)), names, tasks_path)
    assert responses(full, "tiny_choice") != responses(both[0], "tiny_choice")
    assert [results.numerics["runtime"] for results in both] == ["trained", "packed"]


def test_beside_a_teacher(tasks_path: Path, out: Path, shared_model_path: Path) -> None:
    config = TasksConfig(
        str(out),
        teacher=str(shared_model_path),
        tasks=tuple(NAMES),
        include_path=tasks_path,
        compile=False,
        limit=2,
    )
    compared = assess_tasks(config)
    assert compared.teacher is not None
    assert set(compared.pairings) == {"tiny_choice", "tiny_letter", "tiny_answer"}
    own, other = (
        {score.task: score for score in results.scores}
        for results in (compared.model, compared.teacher)
    )
    for name, pairing in compared.pairings.items():
        assert pairing.items == 2
        difference = (own[name].value - other[name].value) * 2
        assert pairing.gained - pairing.lost == pytest.approx(difference)
    plain = compared.to_dict(raw=True)
    assert plain["lm_eval"]["tiny_choice"]["samples"]["tiny_choice"][0]["doc"] == QUESTIONS[0]
    assert plain["teacher"]["numerics"]["runtime"] == "full precision"
    assert "lm_eval" not in compared.to_dict()["teacher"]
    text = numerics_text(compared.model.numerics)
    assert (
        ": trained, float32, softmax in float32, batch 8, at most 128 tokens, the first 2" in text
    )
    assert "lm_eval" in text
    assert all(len(row) == 7 for row in task_rows(compared))


def test_beside_the_results_of_an_earlier_run(
    tasks_path: Path, out: Path, shared_model_path: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"include_path": tasks_path, "compile": False, "limit": 2}
    names, file = ("tiny_choice", "tiny_text", "tiny_answer"), tmp_path / "teacher.json"
    teacher = assess_tasks(TasksConfig(str(shared_model_path), tasks=names, **options))
    write_json(file, teacher.to_dict(raw=True))

    def compared(tasks: tuple[str, ...] = names, **changed: Any) -> TaskComparison:
        notes.clear()
        config = TasksConfig(str(out), tasks=tasks, **options | {"teacher": str(file)} | changed)
        return assess_tasks(config, Notes())

    notes: list[str] = []

    class Notes(Observer):
        def note(self, text: str) -> None:
            notes.append(text)

    beside = compared()
    run_again = compared(teacher=str(shared_model_path))
    assert beside.teacher is not None and run_again.teacher is not None
    assert beside.teacher.scores == run_again.teacher.scores
    assert beside.to_dict()["flips"] == run_again.to_dict()["flips"]
    assert set(beside.pairings) == {"tiny_choice", "tiny_answer"} and not notes
    assert set(compared(names[:1]).pairings) == {"tiny_choice"}

    with pytest.raises(ConfigError, match="has the answers to --limit 2"):
        compared(limit=1)
    with pytest.raises(ConfigError, match="no answers to tiny_letter"):
        compared(tuple(NAMES[:2]))
    plain = json.loads(file.read_text())
    plain["lm_eval"]["tiny_choice"]["samples"]["tiny_choice"][0]["doc_hash"] = "another"
    write_json(file, plain)
    assert compared().teacher is None
    assert notes == [f"not compared with {file}: other questions, in tiny_choice"]
    # A group that had other members has other rows; hours of answers are kept all the same.
    found = plain["lm_eval"]["tiny_choice"]
    found["samples"]["gone"] = found["samples"]["tiny_choice"]
    for told in ("results", "n-shot"):
        found[told]["gone"] = found[told]["tiny_choice"]
    write_json(file, plain)
    assert compared().teacher is None
    assert notes == [f"not compared with {file}: other questions, in tiny_choice, gone"]
    for damaged in ("[]", '{"lm_eval": {}}', '{"lm_eval": {"a": {}}, "numerics": {"limit": 1}}'):
        file.write_text(damaged)
        with pytest.raises(DataError, match="does not hold what qatc evaluate"):
            compared()


def score(task: str, right: list[int], metric: str = "acc", stderr: float = 0.1) -> TaskScore:
    items = tuple(map(str, range(len(right))))
    return TaskScore(task, metric, sum(right) / len(right), stderr, 0, items, tuple(right))


def test_flips() -> None:
    own, other = (
        TaskResults((score("a", right), score("b", [1])), {}, {})
        for right in ([1, 0, 0, 1], [0, 1, 1, 1])
    )
    compared = TaskComparison(own, other)
    assert compared.pairings == {"a": Pairing(4, lost=2, gained=1), "b": Pairing(1, 0, 0)}
    assert task_rows(compared)[1][2:] == ["50.0\xa0±\xa010.0", "75.0\xa0±\xa010.0", "2", "1", "1"]
    assert task_rows(compared)[-1][-3:] == ["2", "1", "1"]
    assert compared.to_dict()["flips"]["a"] == {"items": 4, "lost": 2, "gained": 1, "p": 1}


def test_average() -> None:
    perplexity = TaskScore("c", "word_perplexity", 12.0, None, 0, ("0",), None)
    results = TaskResults((score("a", [1, 0]), score("b", [1, 1, 1, 0]), perplexity), {}, {})
    assert results.average is not None
    assert results.average == pytest.approx((0.625, math.sqrt(0.02) / 2))
    assert TaskResults((perplexity,), {}, {}).average is None


def test_presets(tasks_path: Path) -> None:
    assert resolve(["perplexity", "x"]) == {"wikitext": 0, "c4": 0, "x": None}
    local = ["siqa_local", "wikitext2_local", "boolq_local", "mmlu_local"]
    assert list(resolve(["paper"], local))[:4] == ["boolq_local", "piqa", "siqa_local", "hellaswag"]
    assert resolve(["fewshot"], local) == {"mmlu_local": None, "triviaqa": 5}
    assert len(resolve(["paper"])) == 8
    with pytest.raises(ConfigError, match="at least one task, or one of paper, fewshot, perplex"):
        resolve([])


def test_every_task_of_a_preset_is_one_of_lm_eval() -> None:
    known = _with_those_of_lm_eval(None).all_tasks
    assert not [name for names in PRESETS.values() for name in names if name not in known]


def test_shots(tmp_path: Path) -> None:
    """A task that says 0 means it; what another says, or leaves open, can be changed."""

    def shots(own: int | None, number: int | None) -> int:
        said = {} if own is None else {"num_fewshot": own}
        write_task(tmp_path, "shots", QUESTIONS, CHOICE | said)
        loaded = load_tasks(["shots"], tmp_path, number)["shots"]
        return int(loaded["tasks"]["shots"].get_config("num_fewshot"))

    assert (shots(None, None), shots(None, 2)) == (0, 2)
    assert (shots(1, None), shots(1, 2), shots(0, 2)) == (1, 2, 0)


def test_what_cannot_be_asked(tasks_path: Path, tmp_path: Path, tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match="no task 'hellaswagg'; near it are hellaswag, "):
        load_tasks(["hellaswagg"])
    with pytest.raises(ConfigError, match="--include-path takes a directory"):
        load_tasks(["tiny_choice"], tmp_path / "absent")
    for option, number in (("limit", 0), ("batch_size", 0), ("max_length", 0), ("num_fewshot", -1)):
        options: dict[str, Any] = {option: number}
        with pytest.raises(ConfigError, match=f"is too small; got {number}"):
            run(make_llama(), tokenizer, ["tiny_choice"], tasks_path, **options)
    write_task(tmp_path, "long", QUESTIONS, CHOICE | {"doc_to_choice": ["by the bridge"] * 3})
    with pytest.raises(EvaluationError, match="which do not fit into 2; give a larger --length"):
        run(make_llama(), tokenizer, ["long"], tmp_path, max_length=2)
    write_task(tmp_path, "lost", [], {"output_type": "generate_until"})
    (tmp_path / "lost.jsonl").unlink()
    with pytest.raises(DataError, match="data set of the task lost could not be fetched or read"):
        load_tasks(["lost"], tmp_path)
    write_task(tmp_path, "odd", [{}], {"output_type": "dance"})
    with pytest.raises(ConfigError, match="the task odd cannot be set up"):
        load_tasks(["odd"], tmp_path)


def test_an_answer_that_is_no_number(tasks_path: Path, tokenizer: Any) -> None:
    model = make_llama()
    model.model.norm.weight.data.fill_(math.nan)
    with pytest.raises(EvaluationError, match="answers NaN or infinity"):
        run(model, tokenizer, ["tiny_choice"], tasks_path)


def test_runtimes(out: Path, shared_model_path: Path) -> None:
    with pytest.raises(ConfigError, match="is no output of qatc quantize"):
        TasksConfig(str(shared_model_path), tasks=("x",), runtime="packed")
    wrong: Any = "fast"
    with pytest.raises(ConfigError, match="trained or packed; got 'fast'"):
        TasksConfig(str(out), tasks=("x",), runtime=wrong)


def test_without_lm_eval(monkeypatch: pytest.MonkeyPatch, tasks_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.evaluator", None)
    with pytest.raises(ConfigError, match=r"install it with pip install 'qatc\[eval\]'"):
        load_tasks(["tiny_choice"], tasks_path)


def test_a_hub_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is asked once is not asked again, and the libraries are left as they were."""
    import datasets
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    with pytest.raises(DataError, match="the task piqa could not be fetched .* --include-path"):
        load_tasks(["piqa"])
    assert not huggingface_hub.constants.HF_HUB_OFFLINE and not datasets.config.HF_HUB_OFFLINE

"""Tasks of lm-eval that need no network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

QUESTIONS = [
    {"question": f"The {adjective} {noun}", "choices": [" sleeps by", " waits", " x"], "label": i}
    for i, (adjective, noun) in enumerate([("old", "fox"), ("blue", "miller"), ("tired", "river")])
]
"""Of unequal length, so that rows of a batch are padded."""

TEXTS = ["The quiet lantern sings by the window. " * times for times in (1, 12, 3)]

CHOICE: dict[str, Any] = {
    "output_type": "multiple_choice",
    "doc_to_text": "question",
    "doc_to_choice": "choices",
    "doc_to_target": "label",
    "target_delimiter": "",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}

_WORDS = """
def words(doc, results):
    return {"word_perplexity": (results[0], len(doc["text"].split()))}
"""


def write_task(folder: Path, name: str, items: list[Any], config: dict[str, Any]) -> None:
    """A task file and its data."""
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
    own: dict[str, Any] = {"task": name, "dataset_path": "json", "test_split": "test"}
    own["dataset_kwargs"] = {"data_files": {"test": str(data)}}
    text = yaml.safe_dump(own | config).replace("'!function own.words'", "!function own.words")
    (folder / f"{name}.yaml").write_text(text, encoding="utf-8")


def write_tasks(folder: Path) -> Path:
    """Four tasks called tiny_KIND, of which tiny_letter has answers of one token; and a piqa."""
    write_task(folder, "tiny_choice", QUESTIONS, CHOICE)
    write_task(folder, "tiny_letter", QUESTIONS, CHOICE | {"doc_to_choice": ["a", "b", "c"]})
    write_task(folder, "piqa_local", QUESTIONS[:2], CHOICE)
    (folder / "own.py").write_text(_WORDS, encoding="utf-8")
    rolling = {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "text",
        "process_results": "!function own.words",
        "metric_list": [{"metric": "word_perplexity"}],
    }
    write_task(folder, "tiny_text", [{"text": text} for text in TEXTS], rolling)
    answers = [{"question": item["question"], "answer": "sings"} for item in QUESTIONS]
    free = {
        "output_type": "generate_until",
        "doc_to_text": "question",
        "doc_to_target": "answer",
        "generation_kwargs": {"until": ["."], "max_gen_toks": 9, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    write_task(folder, "tiny_answer", answers, free)
    return folder

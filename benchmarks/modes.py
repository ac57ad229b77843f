"""What is trained, at equal time: all of a model, only its scales or norms, or layer after layer.

    python -m benchmarks.modes --model MODEL --steps 100 --steps 300 --seed 0 --seed 1 --seed 2

The time is what so many steps of all of the model take, end to end, once its graphs are compiled:
processor time, of all threads, which does not depend on what else the machine does. Of every other
way it is measured first how its time grows with its steps; it then gets as many as fit. All of them
start from the same rounded student, in one process, on a corpus that the model writes for each
seed, and are measured on the end of it, which nobody trains on. The result is added to
``results/modes-NAME.json``.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import common, models
from qatc.data.config import CorpusConfig
from qatc.data.corpus import Rows
from qatc.data.generate import generate_corpus
from qatc.evaluation.metrics import evaluate
from qatc.models import load_model, load_tokenizer
from qatc.models.centers import center_keys
from qatc.models.preparation import can_compile, prepare
from qatc.ptq.calibrate import batches
from qatc.recipe.recipe import Recipe
from qatc.training.blockwise import BlockwiseTrainer
from qatc.training.config import TrainingConfig, default_learning_rate
from qatc.training.distill import Distiller
from qatc.training.parts import choose_parts, parse_train

HELD_OUT = 256
CALIBRATION = (2, 10)
"""Steps of the two runs that time is measured by, behind one that is not counted."""


@dataclass(frozen=True)
class Way:
    """One way to spend the time.

    Attributes:
        train: as ``--train`` has it.
        by_layer: the share of the time that goes to single layers.
        rate: the learning rate, as a multiple of the default.
    """

    train: str
    by_layer: float = 0.0
    rate: float = 1.0

    @property
    def name(self) -> str:
        """What a result is called."""
        share = f" {self.by_layer:g}" if 0 < self.by_layer < 1 else ""
        return self.train + share + (f", rate x{self.rate:g}" if self.rate != 1 else "")


WAYS = (
    Way("full"),
    Way("scales"),
    Way("scales", rate=4),
    Way("norms", rate=4),
    Way("lora"),
    Way("blockwise", 1.0),
    Way("blockwise+full", 0.25),
)


@dataclass(frozen=True, eq=False)
class Case:
    """A model with its corpus, and what it is after rounding."""

    teacher: Any
    student: Any
    rows: Rows
    held_out: Rows
    seed: int
    compile: bool

    def kl(self, student: Any) -> float:
        """KL to the teacher on held-out text."""
        found = evaluate(
            student, self.held_out, teacher=self.teacher, batch_size=8, compile=self.compile
        )
        assert found.kl is not None
        return found.kl


def main() -> None:
    """Run the benchmark and write its result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--bits", default="4-8-4")
    parser.add_argument("--steps", type=int, action="append", required=True)
    parser.add_argument("--seed", type=int, action="append", required=True)
    parser.add_argument("--samples", type=int, default=1280)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--name", help="of the result; default: the model's")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    model = models.find(arguments.model)
    name = f"modes-{arguments.name or Path(model).resolve().name}"
    file = common.RESULTS / f"{name}.json"
    runs: dict[str, Any] = json.loads(file.read_text())["runs"] if file.exists() else {}
    for seed in arguments.seed:
        with tempfile.TemporaryDirectory(prefix="qatc-modes-") as scratch:
            case = make_case(model, arguments, seed, Path(scratch))
            found = runs.setdefault(str(seed), {})
            found["rounded"] = case.kl(case.student)
            print(f"seed {seed}: rounded {found['rounded']:.4f}", flush=True)
            for steps in arguments.steps:
                found[str(steps)] = compare(case, steps, found["rounded"])
                settings = {"bits": arguments.bits, "preset": "best", "samples": arguments.samples}
                shown = {"model": common.display_path(model), **settings, "runs": runs}
                common.save(name, shown)


def make_case(model: str, arguments: argparse.Namespace, seed: int, scratch: Path) -> Case:
    """The models and the corpus of a seed."""
    teacher = load_model(model, dtype=torch.float32)
    student = load_model(model, dtype=torch.float32).model
    config = CorpusConfig(sequences=arguments.samples, max_length=256, seed=seed)
    compile = can_compile()
    written = generate_corpus(
        teacher, load_tokenizer(model), scratch / "corpus", config, compile=compile
    )
    rows = written.rows(256, slice(None, -HELD_OUT))
    prepare(student, Recipe.from_bits(arguments.bits, preset="best"), compile=compile)
    center_keys(student, teacher.model, *next(batches(student, rows[:16], 16)))
    held_out = written.rows(256, slice(-HELD_OUT, None))
    return Case(teacher.model, student, rows, held_out, seed, compile)


def compare(case: Case, steps: int, rounding_kl: float) -> dict[str, Any]:
    """Every way, in the time of so many steps of the first one."""
    found: dict[str, Any] = {}
    budget = 0.0
    train(case, WAYS[0], (0, CALIBRATION[0]), rounding_kl)  # compiles
    for way in WAYS:
        chosen = steps_of(case, way, budget, rounding_kl) if budget else (0, steps)
        record, seconds = train(case, way, chosen, rounding_kl)
        budget = budget or seconds
        found[way.name] = {
            "steps of a layer": chosen[0],
            "steps": chosen[1],
            "seconds": round(seconds, 2),
            "kl": round(case.kl(record), 5),
        }
        print(f"  {way.name}: {found[way.name]}", flush=True)
    return found


def steps_of(case: Case, way: Way, budget: float, rounding_kl: float) -> tuple[int, int]:
    """Steps of every layer, and end to end, that fit into so many seconds."""
    stages = parse_train(way.train)

    def fitting(make: Callable[[int], tuple[int, int]], seconds: float) -> int:
        few, many = CALIBRATION
        times = [train(case, way, make(n), rounding_kl)[1] for n in (few, few, many)][1:]
        each = (times[1] - times[0]) / (many - few)
        return max(1, round((seconds - times[0]) / each) + few)

    by_layer = fitting(lambda n: (n, 0), budget * way.by_layer) if way.by_layer else 0
    rest = budget * (1 - way.by_layer)
    return by_layer, fitting(lambda n: (0, n), rest) if stages.parts else 0


def train(case: Case, way: Way, steps: Sequence[int], rounding_kl: float) -> tuple[Any, float]:
    """A copy of the student, trained, and the seconds of processor time that it took."""
    student, (by_layer, end_to_end) = copy.deepcopy(case.student), steps
    config = TrainingConfig(seed=case.seed, checkpoint_every=10**6)
    width = case.teacher.config.hidden_size
    rate = way.rate * default_learning_rate(width, rounding_kl)
    config = replace(config, learning_rate=rate)
    with tempfile.TemporaryDirectory(prefix="qatc-modes-") as scratch:
        common_arguments = (student, case.teacher, case.rows)
        started = time.process_time()
        if by_layer:
            layers = replace(config, train="blockwise", blockwise_steps=by_layer)
            BlockwiseTrainer(*common_arguments, layers, Path(scratch)).run()
        if end_to_end:
            parts = parse_train(way.train).parts or "full"
            updates = choose_parts(student, parts, config.lora_rank, config.seed)
            whole = replace(config, steps=end_to_end)
            Distiller(*common_arguments, whole, Path(scratch), compile=case.compile).run()
            if updates is not None:
                updates.merge()
        return student, time.process_time() - started


if __name__ == "__main__":
    main()

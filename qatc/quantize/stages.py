"""The stages from a prepared student to a trained one; what they measure is kept with the run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qatc.data.config import RECORDING, CorpusConfig
from qatc.data.corpus import Corpus, Rows
from qatc.data.generate import generate_corpus
from qatc.data.teacher_logits import Recorded, recorded_as
from qatc.divided.hold import whole_in_each
from qatc.errors import DataError
from qatc.evaluation.metrics import Metrics
from qatc.machine.device import release_memory
from qatc.machine.world import current
from qatc.models.centers import center_keys
from qatc.ptq.calibrate import batches
from qatc.ptq.method import parse_method
from qatc.quantize.given import Given, Setting
from qatc.quantize.pair import Pair, drop_teacher, evaluate_one
from qatc.quantize.settings import QuantizeConfig
from qatc.sensitivity.answers import Answers, probe_rows
from qatc.storage.files import read_json, write_json
from qatc.training.blockwise import BlockwiseTrainer, LayerMetrics
from qatc.training.config import StepMetrics
from qatc.training.distill import Distiller, compiled_layers
from qatc.training.parts import choose_parts, parse_train
from qatc.training.sharding import sharded

CENTERING_ROWS = 16
"""Rows of the corpus on which the mean of the keys is measured; more moves it by little."""

_WHAT = {"scales": "its scales", "norms": "its norms", "lora": "low-rank updates"}

Figures = Mapping[str, Mapping[str, Metrics]]
"""Text name -> model name (``full precision``, ``RTN``, ``QAT``) -> metrics. The last of a text is
the model that is written."""


@dataclass(frozen=True)
class Training:
    """How the training went.

    Attributes:
        rate: the learning rate at its highest.
        history: every step end to end.
        layers: every step of a single layer, before those.
    """

    rate: float
    history: Sequence[StepMetrics]
    layers: Sequence[LayerMetrics] = ()

    @property
    def seconds(self) -> float:
        """Of all steps."""
        end_to_end = sum(step.seconds for step in self.history)
        return sum(step.seconds for step in self.layers) + end_to_end


def write_corpus(setting: Setting, given: Given, pair: Pair, slots: int | None) -> Corpus:
    """The corpus that the teacher writes, or completes.

    Args:
        setting: the run.
        given: with the tokenizer.
        pair: with the teacher.
        slots: sequences to write side by side; None: as many as are fast.
    """
    config, observer = setting.config, setting.observer
    generation, total = config.generation, config.generation.sequences
    if config.training.teacher == "recorded" and generation.record_logits is None:
        there = recorded_as(config.data_directory)
        generation = replace(generation, record_logits=there or RECORDING)
    observer.stage(f"The teacher writes {total} sequences to {config.data_directory}")
    writes = not setting.world.on_first(_is_written, config.data_directory, generation)
    teacher, world = pair.teacher.model, setting.world
    with whole_in_each(world, teacher, setting.device) if writes else nullcontext():
        return generate_corpus(
            pair.teacher,
            given.tokenizer,
            config.data_directory,
            generation,
            compile=setting.compile,
            slots=slots,
            on_progress=lambda sequences, tokens: observer.generated(sequences, total, tokens),
            on_recorded=observer.recorded,
        )


def _is_written(directory: Path, config: CorpusConfig) -> bool:
    """Whether nothing is left to be written, so that the teacher is not run."""
    try:
        corpus = Corpus.open(directory)
        if config.record_logits is not None:
            Recorded.open(corpus)
    except DataError:
        return False
    return True


def center(setting: Setting, pair: Pair, rows: Rows) -> None:
    """Measure where keys lie, if the recipe takes that off them; the same in a resumed run."""
    if not setting.config.recipe.center_keys:
        return
    teacher = pair.teacher.model
    ids, real = next(batches(teacher, rows[:CENTERING_ROWS], CENTERING_ROWS))
    center_keys(pair.student, teacher, ids, real)


def split(
    corpus: Corpus, config: QuantizeConfig, recorded: Recorded | None = None
) -> tuple[Rows, Rows]:
    """Rows to train on, and rows of the corpus' last sequences, which are held out.

    Of conversations, the figures are those of answers, whatever the loss counts. Rows to train on
    come with what is recorded of the teacher, if that is given.
    """
    length, held = config.generation.max_length, config.eval_sequences
    train = corpus.rows(length, slice(None, -held), answers_only=config.loss_on != "all")
    train = train if recorded is None else recorded.attach(train)
    return train, corpus.rows(length, slice(-held, None))


def measure_baselines(setting: Setting, pair: Pair, texts: Mapping[str, Rows]) -> Figures:
    """Full precision and round-to-nearest."""

    file = setting.config.partial / "baselines.json"
    if (kept := _kept(setting, file)) is not None:
        return {t: {m: Metrics(**v) for m, v in r.items()} for t, r in kept.items()}
    setting.observer.stage("Evaluating full precision and round-to-nearest (RTN)")
    figures = {
        name: {
            "full precision": evaluate_one(setting, pair, pair.teacher.model, rows),
            "RTN": evaluate_one(setting, pair, pair.student, rows),
        }
        for name, rows in texts.items()
    }
    setting.world.on_first(write_json, file, plain_figures(figures))
    return figures


def _kept(setting: Setting, file: Path) -> Any:
    """What a stage kept with the run in a file, or None; for all the same that measure together."""
    return setting.world.on_first(lambda: read_json(file) if file.exists() else None)


def train(setting: Setting, pair: Pair, rows: Rows, rounding_kl: float) -> Training:
    """Train the student; its optimizer is gone afterwards, and so is a teacher that is recorded.

    Args:
        setting: the run.
        pair: whose student is trained.
        rows: what it is trained on.
        rounding_kl: KL divergence of the rounded model to the teacher, which the learning rate is
            chosen by.
    """
    config, steps = setting.config, setting.config.training.steps
    stages = parse_train(config.training.train)
    layers = _train_layers(setting, pair, rows, rounding_kl) if stages.by_layer else []
    if stages.parts is None:
        return Training(max(step.learning_rate for step in layers), (), layers)
    updates = choose_parts(
        pair.student, stages.parts, config.training.lora_rank, config.training.seed
    )
    what = f" {_WHAT[stages.parts]}" if stages.parts in _WHAT else ""
    setting.observer.stage(f"Training{what} for {steps} steps")
    models, teacher = [pair.student], pair.teacher.model
    if config.training.teacher == "recorded":
        drop_teacher(pair)
        teacher = None
    else:
        models.append(teacher)
    with (
        compiled_layers(teacher, setting.compile),
        sharded(current(), *models, offload=config.training.offload == "parameters") as (
            student,
            *teachers,
        ),
    ):
        distiller = Distiller(
            student,
            teachers[0] if teachers else None,
            rows,
            config.training,
            config.partial,
            rounding_kl=rounding_kl,
            autocast=pair.autocast,
            compile=setting.compile,
            note=setting.observer.note,
        )
        history = distiller.run(on_step=lambda step: setting.observer.trained(step, steps))
    rate = distiller.rate
    if updates is not None:
        updates.merge()
    del distiller, student, teacher, teachers, models
    pair.student.zero_grad(set_to_none=True)
    release_memory(setting.device)  # of an optimizer, which hooks and models refer to in circles
    return Training(rate, history, layers)


def _train_layers(
    setting: Setting, pair: Pair, rows: Rows, rounding_kl: float
) -> list[LayerMetrics]:
    """Train the student's decoder layers one after the other."""
    config = setting.config
    trainer = BlockwiseTrainer(
        *(pair.student, pair.teacher.model, rows, config.training, config.partial),
        rounding_kl=rounding_kl,
        autocast=pair.autocast,
    )
    layers, steps = len(trainer.layers), trainer.steps
    setting.observer.stage(f"Training {layers} layers, one after the other, for {steps} steps each")
    tokens, width = trainer.rows.tokens.size, pair.teacher.model.config.hidden_size
    held = 2 * tokens * width * pair.compute.itemsize / 1e9
    setting.observer.note(
        f"hidden states of {len(trainer.rows):,} rows are kept in host memory: {held:.1f} GB"
    )
    return trainer.run(lambda step: setting.observer.trained_layer(step, layers, steps))


def measure_student(
    setting: Setting, pair: Pair, texts: Mapping[str, Rows], before: Figures, name: str, file: Path
) -> Figures:
    """The figures before, and behind them those of the student as it is, called ``name``.

    They are kept in ``file``.
    """
    if (kept := _kept(setting, file)) is not None:
        found = {text: Metrics(**plain) for text, plain in kept.items()}
    else:
        setting.observer.stage(f"Evaluating the model after {name}")
        found = {n: evaluate_one(setting, pair, pair.student, r) for n, r in texts.items()}
        plain = {name: metrics.to_dict() for name, metrics in found.items()}
        setting.world.on_first(write_json, file, plain)
    return {text: {**models, name: found[text]} for text, models in before.items()}


def measure_depth(setting: Setting, pair: Pair, rows: Rows) -> list[float]:
    """KL of the teacher to itself behind the student's layers up to each one, on some rows.

    It is kept with the run. Between the layers of a rotated student is what no other model reads:
    then there is none. Nor is there where it fails, which is told, and is no reason to end a run
    that has trained for hours; nor of divided models, of which a process that fails alone would
    leave the others waiting.
    """
    if "rotate" in parse_method(setting.config.method).steps:
        return []
    if setting.divided:
        setting.observer.note("KL layer by layer was not measured: the models are divided")
        return []
    file = setting.config.partial / "depth.json"
    if file.exists():
        kept: list[float] = read_json(file)
        return kept
    some = rows[: max(2, probe_rows(rows.tokens.shape[1]))]
    setting.observer.stage(f"Measuring KL layer by layer on {some.tokens.size:,} tokens")
    try:
        answers = Answers(pair.teacher.model, some, setting.config.training.batch_size)
        found = answers.divergence_by_depth(pair.student, pair.autocast)
    except Exception as error:
        setting.observer.note(f"KL layer by layer was not measured: {error}")
        found = []
    found = found if all(map(math.isfinite, found)) else []
    write_json(file, found)
    return found


def plain_figures(figures: Figures) -> dict[str, dict[str, dict[str, float | None]]]:
    """Figures as plain data."""
    return {t: {m: v.to_dict() for m, v in models.items()} for t, models in figures.items()}

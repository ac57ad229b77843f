"""The main job: a Hugging Face checkpoint in, packed integers out.

Everything a run needs to go on after an interruption is in ``OUTPUT.partial``: its settings, the
figures measured so far and the checkpoints. The corpus is in ``OUTPUT.data`` (or wherever
``data`` says) and stays. ``OUTPUT`` itself appears in one piece, at the end.
"""

from __future__ import annotations

import importlib.metadata
import shutil
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qatc.data import Corpus, Rows, is_complete, pack_rows, read_text, text_rows
from qatc.device import device_name, pick_device, pick_dtype, release_memory
from qatc.distill import Distiller, StepMetrics
from qatc.errors import ConfigError, PassError
from qatc.evaluate import Metrics, evaluate
from qatc.export.codes import QuantizedWeight
from qatc.export.directory import loads_elsewhere, write_model
from qatc.files import complete_directory, read_json, refuse_existing, write_json
from qatc.generate import generate_corpus
from qatc.models import LoadedModel, load_config, load_model, load_tokenizer
from qatc.models.load import check_length
from qatc.parity import verify
from qatc.preparation import (
    can_compile,
    prepare,
    prepared_state,
    quantized_specs,
    why_no_integer_forward,
)
from qatc.progress import Observer
from qatc.report import write_report
from qatc.runtime import load
from qatc.settings import QuantizeConfig, begin_run, check_run
from qatc.usage import kernel_report, memory
from qatc.vocabulary import tying_note

GENERATED = "generated"
"""Name of the held-out generated text in the figures."""


@dataclass(frozen=True)
class QuantizeResult:
    """What :func:`quantize` made.

    Attributes:
        output: the directory.
        data: the corpus that it was trained on.
        figures: text name -> model name (``full precision``, ``RTN``, ``QAT``) -> metrics.
    """

    output: Path
    data: Path
    figures: dict[str, dict[str, Metrics]]


def quantize(config: QuantizeConfig, observer: Observer | None = None) -> QuantizeResult:
    """Quantize a model by data-free quantization-aware training.

    Raises:
        QatcError: with the way out; an interrupted or failed run goes on when it is started again
            with the same settings.
    """
    refuse_existing(config.output, config.overwrite)
    check_run(config)
    return _Run(config, observer or Observer()).run()


class _Run:
    """One run: each stage reads what the ones before it left."""

    def __init__(self, config: QuantizeConfig, observer: Observer) -> None:
        self.config, self.observer = config, observer
        self.device = pick_device(config.device)
        self.compile = can_compile() if config.compile is None else config.compile

    def run(self) -> QuantizeResult:
        config, observer = self.config, self.observer
        observer.stage(f"Loading {config.model}")
        texts = self._texts()
        corpus = self._given_corpus()
        self._load()
        observer.stage(f"Capturing and rewriting the layers for {config.recipe.bits}")
        self._prepare()
        begin_run(config)
        corpus = corpus or self._generate()
        train, held_out = _split(corpus, config)
        texts = {GENERATED: held_out, **texts}
        figures = self._baselines(texts)
        rate, history = self._train(train, figures[GENERATED]["RTN"].kl or 0.0)
        self._round_unquantized()
        observer.stage("Evaluating the trained model")
        for name, rows in texts.items():
            figures[name]["QAT"] = self._evaluate(self.student, rows)
        observer.stage(f"Writing {config.output}")
        metadata = {
            **_provenance(config, corpus),
            "compute_dtype": str(self.compute).removeprefix("torch."),
            "integer_forward": self.integer_forward,
            "device": device_name(self.device),
            "learning_rate": rate,
            "training_seconds": round(sum(r.seconds for r in history), 1),
            "row_utilization": round(train.utilization, 4),
            "figures": {t: {m: v.to_dict() for m, v in r.items()} for t, r in figures.items()},
        }
        self._write(figures, metadata, history)
        shutil.rmtree(config.partial, ignore_errors=True)
        return QuantizeResult(config.output, config.data_directory, figures)

    def _texts(self) -> dict[str, Rows]:
        """Load the tokenizer and the evaluation text, and find what is wrong with either early."""
        config = self.config
        trust, length = config.trust_remote_code, config.generation.max_length
        model_config = load_config(config.model, trust_remote_code=trust)
        check_length(config.model, model_config, length)
        self.compute = pick_dtype(config.dtype, self.device, model_config)
        self.tokenizer = load_tokenizer(config.model, trust_remote_code=trust)
        if config.eval_text is None:
            return {}
        text = read_text(config.eval_text)
        return {str(config.eval_text): text_rows(text, self.tokenizer, length, config.eval_tokens)}

    def _given_corpus(self) -> Corpus | None:
        """The corpus that the user has, or None if the teacher is to write or complete one."""
        config = self.config
        corpus, sequences = None, config.generation.sequences
        if config.data is not None and is_complete(config.data):
            corpus = Corpus.open(config.data)
            corpus.require_tokenizer(self.tokenizer)
            sequences = int(corpus.manifest["sequences"])
            self.observer.note(f"training on the corpus {config.data}, {sequences:,} sequences")
        if sequences < 2 * config.eval_sequences:
            raise ConfigError(
                f"{sequences} sequences are too few to hold out {config.eval_sequences} for"
                " evaluation; generate more (--samples), or lower --eval-samples"
            )
        return corpus

    def _load(self) -> None:
        def load(dtype: torch.dtype) -> LoadedModel:
            trust = self.config.trust_remote_code
            return load_model(
                self.config.model, dtype=dtype, device=self.device, trust_remote_code=trust
            )

        student = load(torch.float32)
        self.student, self.stored = student.model, student.dtype
        self.teacher = load(self.compute)
        if not self.compile:
            asked = self.config.compile is False
            reason = "as --no-compile asks" if asked else "as there is no C++ compiler: slower"
            self.observer.note(f"running uncompiled, {reason}")

    def _prepare(self) -> None:
        """Put the quantized graph under the student and decide what is trained."""
        masters = next(self.student.parameters()).dtype
        compute = None if self.compute is masters else self.compute
        recipe, wanted = self.config.recipe, self.config.integer_forward
        prepare(
            self.student,
            recipe,
            compile=self.compile,
            compute_dtype=compute,
            integer_forward=wanted,
        )
        self.integer_forward = prepared_state(self.student).integer_forward
        if not self.integer_forward:
            obstacle = why_no_integer_forward(recipe, torch.device(self.device))
            self.observer.note(f"linears computed in float: {obstacle or 'as asked'}")
        self.quantized = quantized_specs(self.student)
        if (note := tying_note(self.student, recipe)) is not None:
            self.observer.note(note)
        if not self.config.train_embeddings:
            _share_embeddings(self.student, self.teacher.model)

    def _generate(self) -> Corpus:
        """The corpus that the teacher writes, or completes."""
        config, observer = self.config, self.observer
        total = config.generation.sequences
        observer.stage(f"The teacher writes {total} sequences to {config.data_directory}")
        return generate_corpus(
            self.teacher,
            self.tokenizer,
            config.data_directory,
            config.generation,
            compile=self.compile,
            on_progress=lambda sequences, tokens: observer.generated(sequences, total, tokens),
        )

    def _baselines(self, texts: dict[str, Rows]) -> dict[str, dict[str, Metrics]]:
        """Full precision and round-to-nearest, measured once and kept with the run."""
        file = self.config.partial / "baselines.json"
        if file.exists():
            return {t: {m: Metrics(**v) for m, v in r.items()} for t, r in read_json(file).items()}
        self.observer.stage("Evaluating full precision and round-to-nearest (RTN)")
        figures = {
            name: {
                "full precision": self._evaluate(self.teacher.model, rows),
                "RTN": self._evaluate(self.student, rows),
            }
            for name, rows in texts.items()
        }
        write_json(file, {t: {m: v.to_dict() for m, v in r.items()} for t, r in figures.items()})
        return figures

    def _train(self, rows: Rows, rounding_kl: float) -> tuple[float, list[StepMetrics]]:
        """Train the student; its optimizer is gone afterwards. Its rate, and all steps."""
        config, steps = self.config, self.config.training.steps
        self.observer.stage(f"Training for {steps} steps")
        distiller = Distiller(
            self.student,
            self.teacher.model,
            rows,
            config.training,
            config.partial,
            rounding_kl=rounding_kl,
            autocast=self._autocast,
        )
        history = distiller.run(on_step=lambda metrics: self.observer.trained(metrics, steps))
        self.student.zero_grad(set_to_none=True)
        return distiller.rate, history

    def _evaluate(self, model: nn.Module, rows: Rows) -> Metrics:
        return evaluate(
            model,
            rows,
            teacher=self.teacher.model,
            batch_size=self.config.training.batch_size,
            autocast=self._autocast if model is self.student else nullcontext,
            on_progress=self.observer.evaluated,
        )

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.compute is torch.float32:
            return nullcontext()
        return torch.autocast(torch.device(self.device).type, dtype=self.compute)

    @torch.no_grad()
    def _round_unquantized(self) -> None:
        """Round what is stored in float to its stored dtype, so that what ships is evaluated."""
        # Of a tied weight that only one of its users quantizes, the other one stores the float.
        for name, parameter in self.student.named_parameters(remove_duplicate=False):
            if name not in self.quantized:
                parameter.copy_(parameter.to(self.stored).to(parameter.dtype))

    def _write(
        self,
        figures: dict[str, dict[str, Metrics]],
        metadata: dict[str, Any],
        history: list[StepMetrics],
    ) -> None:
        config = self.config
        with complete_directory(config.output, overwrite=config.overwrite) as staging:
            masters = self._write_student(staging, metadata)
            if not loads_elsewhere(staging):
                self.observer.note(
                    "head and embedding are stored as qatc alone loads them; for transformers:"
                    " qatc export"
                )
            shutil.copyfile(config.partial / "metrics.jsonl", staging / "metrics.jsonl")
            del self.teacher, self.student
            release_memory(self.device)  # two more models are about to be loaded
            metadata = metadata | self._verify(staging, masters)
            write_json(staging / "qatc.json", read_json(staging / "qatc.json") | metadata)
            write_report(staging, metadata, figures, history)

    def _write_student(self, staging: Path, metadata: dict[str, Any]) -> dict[str, torch.Tensor]:
        """Write the student; what its codes were made from is returned."""
        model, recipe = self.student, self.config.recipe
        state = model.state_dict()
        masters = {name: state.pop(name) for name in self.quantized}
        floats = {
            name: value.to(self.stored) if value.is_floating_point() else value
            for name, value in state.items()
        }
        for owner, value in prepared_state(model).use_cache:
            owner.use_cache = value
        write_model(
            staging,
            config=model.config,
            state=floats,
            weights={
                name: QuantizedWeight.from_float(master, self.quantized[name])
                for name, master in masters.items()
            },
            recipe=recipe,
            metadata=metadata,
            generation_config=model.generation_config,
            tokenizer=self.tokenizer,
        )
        return masters

    def _verify(self, staging: Path, masters: dict[str, torch.Tensor]) -> dict[str, Any]:
        """Hold what was written against what was trained, before it is called complete.

        Raises:
            ParityError: it does not compute what was trained.
        """
        self.observer.stage("Verifying that the integer model computes what was trained")
        try:
            report = verify(staging, trained=masters, device=self.device)
            release_memory(self.device)
            model = load(staging, device=self.device, compile=False)
        except PassError as error:
            self.observer.note(f"not verified, as it does not run on integers: {error}")
            return {"parity": {"passed": None, "reason": str(error)}}
        report.require(str(self.config.output))
        self.observer.note(f"{len(report.checks)} checks passed")
        return {
            "parity": report.to_dict(),
            "memory": asdict(memory(model)),
            "kernels": [asdict(use) for use in kernel_report(model)],
        }


def _share_embeddings(student: nn.Module, teacher: nn.Module) -> None:
    """Freeze the student's embeddings and head, and let them use the teacher's memory."""
    for get in ("get_input_embeddings", "get_output_embeddings"):
        own, source = getattr(student, get)(), getattr(teacher, get)()
        if own is None:
            continue
        own.weight.requires_grad_(False)
        if own.weight.dtype is source.weight.dtype:
            own.weight.data = source.weight.data


def _split(corpus: Corpus, config: QuantizeConfig) -> tuple[Rows, Rows]:
    """Rows to train on, and rows of the corpus' last sequences, which are held out."""
    sequences, held = corpus.sequences(), config.eval_sequences
    length, prompt = config.generation.max_length, corpus.prompt_tokens
    train, held_out = sequences[:-held], sequences[-held:]
    return pack_rows(train, length, prompt), pack_rows(held_out, length, prompt)


def _provenance(config: QuantizeConfig, corpus: Corpus) -> dict[str, Any]:
    packages = ("qatc", "torch", "torchao", "transformers", "safetensors")
    return {
        "model": config.model,
        "run": config.to_dict(),
        "data": {
            "fingerprint": corpus.fingerprint,
            **{
                key: corpus.manifest[key]
                for key in ("model", "strategy", "seed", "sequences", "max_length", "greedy_tokens")
            },
        },
        "versions": {name: package_version(name) for name in packages},
    }


def package_version(package: str) -> str:
    """The installed version of a package, or ``not installed``."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"

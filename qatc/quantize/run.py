"""The main job: a Hugging Face checkpoint in, packed integers out.

Everything a run needs to go on after an interruption is in ``OUTPUT.partial``: its settings, the
figures measured so far and the checkpoints. The corpus is in ``OUTPUT.data`` (or wherever
``data`` says) and stays. ``OUTPUT`` itself appears in one piece, at the end.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import nn

from qatc.data.corpus import (
    Corpus,
    Rows,
    is_complete,
    pack_rows,
    read_text,
    require_known,
    text_rows,
)
from qatc.data.generate import (
    check_corpus,
    corpus_place,
    describe,
    generate_corpus,
    measure_speed,
    model_fingerprint,
)
from qatc.errors import ConfigError, ParityError, PassError, QatcError
from qatc.evaluation.metrics import Metrics, evaluate
from qatc.evaluation.parity import verify
from qatc.graph import compilation
from qatc.machine.device import (
    device_name,
    peak_memory,
    pick_device,
    pick_dtype,
    release_memory,
    total_memory,
)
from qatc.models import LoadedModel, load_config, load_model, load_tokenizer
from qatc.models.load import check_length
from qatc.models.pipelines import why_no_integer_forward
from qatc.models.preparation import can_compile, prepare, prepared_state, quantized_specs
from qatc.models.vocabulary import tying_note
from qatc.output.codes import QuantizedWeight
from qatc.output.directory import write_model
from qatc.output.model_card import write_card
from qatc.output.reading import loads_elsewhere
from qatc.progress import Observer
from qatc.quantize.provenance import provenance, versions
from qatc.quantize.settings import (
    QuantizeConfig,
    as_options,
    begin_run,
    check_places,
    check_run,
    end_run,
    recorded_inputs,
    trained_file,
)
from qatc.report.estimate import (
    Phase,
    measure_step,
    memory_text,
    optimizer_bytes,
    rows_cost,
    training_floor,
)
from qatc.report.markdown import write_report
from qatc.report.usage import decoding_report, kernel_report, memory
from qatc.runtime.model import load
from qatc.storage.directories import complete_directory, refuse_existing
from qatc.storage.files import read_json, write_json
from qatc.storage.locks import locked
from qatc.training.checkpoint import Checkpoints
from qatc.training.distill import Distiller, StepMetrics, distillation_losses

_LESS_MEMORY = "--batch-size, --max-length, --no-train-embeddings"

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
    check_places(config)
    with locked(config.output), ExitStack() as corpus_lock:
        refuse_existing(config.output, config.overwrite)
        check_run(config, versions())
        if not is_complete(config.data_directory):
            corpus_lock.enter_context(corpus_place(config.data_directory, config.model))
        return _Run(config, observer or Observer(), corpus_lock).run()


class _Run:
    """One run: each stage reads what the ones before it left."""

    def __init__(self, config: QuantizeConfig, observer: Observer, corpus_lock: ExitStack) -> None:
        self.config, self.observer, self.corpus_lock = config, observer, corpus_lock
        self.inputs = versions()
        self.device = pick_device(config.device)
        self.compile = can_compile() if config.compile is None else config.compile
        self.slots: int | None = None

    def run(self) -> QuantizeResult:
        config, observer = self.config, self.observer
        observer.stage(f"Loading {config.model}")
        texts = self._texts()
        corpus = self._given_corpus()
        check_run(config, self.inputs)
        self._load()
        self._require_known(texts, corpus)
        observer.stage(f"Capturing and rewriting the layers for {config.recipe.bits}")
        self._prepare()
        self._begin(corpus)
        self._estimate(corpus, texts)
        corpus = corpus or self._generate()
        self._begin(corpus)
        train, held_out = _split(corpus, config)
        texts = {GENERATED: held_out, **texts}
        figures = self._baselines(texts)
        rate, history = self._train(train, figures[GENERATED]["RTN"].kl or 0.0)
        with self._kept():
            return self._finish(texts, figures, corpus, train, rate, history)

    def _finish(
        self,
        texts: dict[str, Rows],
        figures: dict[str, dict[str, Metrics]],
        corpus: Corpus,
        train: Rows,
        rate: float,
        history: list[StepMetrics],
    ) -> QuantizeResult:
        """Evaluate, write and verify the trained student."""
        config, observer = self.config, self.observer
        self._round_unquantized()
        for name, trained in self._trained(texts).items():
            figures[name]["QAT"] = trained
        observer.stage(f"Writing {config.output}")
        metadata = {
            **provenance(config, corpus, recorded_inputs(config)),
            "compute_dtype": str(self.compute).removeprefix("torch."),
            "integer_forward": self.integer_forward,
            "device": device_name(self.device),
            "learning_rate": rate,
            "training_seconds": round(sum(r.seconds for r in history), 1),
            "row_utilization": round(train.utilization, 4),
            "figures": {t: {m: v.to_dict() for m, v in r.items()} for t, r in figures.items()},
        }
        self._write(figures, metadata, history)
        end_run(config)
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
        rows = text_rows(text, self.tokenizer, length, config.eval_tokens)
        digest = hashlib.sha256(text.encode() + rows.tokens.tobytes())  # of the tokenizer as well
        self.inputs[f"the evaluation text {config.eval_text}"] = digest.hexdigest()
        return {str(config.eval_text): rows}

    def _given_corpus(self) -> Corpus | None:
        """The corpus that the user has, or None if the teacher is to write or complete one."""
        config = self.config
        corpus, sequences = None, config.generation.sequences
        if config.data is not None and is_complete(config.data):
            corpus = Corpus.open(config.data)
            corpus.require_tokenizer(self.tokenizer)
            self.inputs[f"the corpus {config.data}"] = corpus.fingerprint
            sequences = int(corpus.manifest["sequences"])
            self.observer.note(f"training on the corpus {config.data}, {sequences:,} sequences")
        if sequences < 2 * config.eval_sequences:
            raise ConfigError(
                f"{sequences} sequences are too few to hold out {config.eval_sequences} for"
                " evaluation; generate more (--samples), or lower --eval-samples"
            )
        return corpus

    def _require_known(self, texts: dict[str, Rows], corpus: Corpus | None) -> None:
        """Find tokens that the model has no embedding for before one is looked up."""
        given = {f"the text {name}": rows.tokens for name, rows in texts.items()}
        if corpus is not None:
            given[f"the corpus {corpus.path}"] = np.concatenate(corpus.sequences())
        for what, tokens in given.items():
            name = self.config.model
            require_known(tokens, self.tokenizer, self.teacher.model, what=what, name=name)

    def _load(self) -> None:
        def load(dtype: torch.dtype) -> LoadedModel:
            trust = self.config.trust_remote_code
            return load_model(
                self.config.model, dtype=dtype, device=self.device, trust_remote_code=trust
            )

        student = load(torch.float32)
        self.student, self.stored = student.model, student.dtype
        self.teacher = load(self.compute)
        self.inputs[f"the model {self.config.model}"] = model_fingerprint(self.student)
        check_run(self.config, self.inputs)
        if not self.compile:
            asked = self.config.compile is False
            reason = "as --no-compile asks" if asked else f"as {compilation.obstacle()}: slower"
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

    def _estimate(self, corpus: Corpus | None, texts: dict[str, Rows]) -> None:
        """Say what is ahead: tokens, memory and time, as the first steps take them."""
        config, training = self.config, self.config.training
        done = Checkpoints(config.partial / "checkpoints", training.keep_checkpoints).latest() or 0
        if done >= training.steps:
            return
        self.observer.stage("Measuring the first steps")
        length, vocabulary = config.generation.max_length, self.teacher.model.config.vocab_size
        batch = training.batch_size * length
        floor = training_floor(self.student, self.teacher.model, batch, vocabulary)
        self._warn_of_memory(floor)
        cost = measure_step(
            lambda ids, real: distillation_losses(
                *(self.student, self.teacher.model, ids, real),
                autocast=self._autocast,
                compile=self.compile,
            ),
            self.student,
            *(training.batch_size, length, vocabulary),
        )
        phases = [] if corpus is not None else [self._generation_phase()]
        steps = training.steps - done
        passes = steps * training.accumulate
        held_out = config.eval_sequences + sum(len(rows) for rows in texts.values())
        needed = max(floor, peak_memory(self.device) + optimizer_bytes(self.student))
        phases += [
            Phase(
                f"training {steps} steps of {training.batch_size * training.accumulate} x {length}",
                passes * batch, passes * cost.step, "--steps",
            ),
            Phase(
                "evaluating it three times", 3 * held_out * length,
                3 * rows_cost(cost, held_out, training.batch_size), "--eval-samples",
            ),
        ]  # fmt: skip
        for phase in phases:
            self.observer.note(str(phase))
        self.observer.note(memory_text(needed, self.device, _LESS_MEMORY))

    def _generation_phase(self) -> Phase:
        """The corpus that is still to be written, at the speed of some of its steps."""
        config, place = self.config, self.config.data_directory
        speed = measure_speed(self.teacher, place, config.generation, compile=self.compile)
        self.slots = speed.slots
        tokens = speed.sequences * config.generation.max_length
        title = f"writing at most {speed.sequences} sequences, {speed.slots} side by side"
        seconds = tokens / speed.tokens_per_second
        return Phase(title, tokens, seconds, "--samples, --max-length, --data")

    def _warn_of_memory(self, floor: int) -> None:
        """Before memory is taken that is not there: the system ends such a process unheard."""
        total = total_memory(self.device)
        if total is not None and floor > total:
            self.observer.note(memory_text(floor, self.device, _LESS_MEMORY))

    def _begin(self, corpus: Corpus | None) -> None:
        """Begin or go on, once everything known of what goes into the run is what it was."""
        config = self.config
        if corpus is None:
            place, settings = config.data_directory, config.generation
            check_corpus(place, describe(self.teacher, self.tokenizer, settings, self.compile))
        else:
            self.inputs[f"the corpus {corpus.path}"] = corpus.fingerprint
        changes = check_run(config, self.inputs)
        if changes:
            self.observer.note(f"starting over: {'; '.join(changes)}")
        begin_run(config, self.inputs)

    def _generate(self) -> Corpus:
        """The corpus that the teacher writes, or completes."""
        config, observer = self.config, self.observer
        total = config.generation.sequences
        observer.stage(f"The teacher writes {total} sequences to {config.data_directory}")
        corpus = generate_corpus(
            self.teacher,
            self.tokenizer,
            config.data_directory,
            config.generation,
            compile=self.compile,
            slots=self.slots,
            on_progress=lambda sequences, tokens: observer.generated(sequences, total, tokens),
        )
        self.corpus_lock.close()
        return corpus

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
            compile=self.compile,
        )
        history = distiller.run(on_step=lambda metrics: self.observer.trained(metrics, steps))
        self.student.zero_grad(set_to_none=True)
        return distiller.rate, history

    def _trained(self, texts: dict[str, Rows]) -> dict[str, Metrics]:
        """The trained model's figures by text, measured once and kept with the run."""
        file = trained_file(self.config)
        if file.exists():
            return {text: Metrics(**plain) for text, plain in read_json(file).items()}
        self.observer.stage("Evaluating the trained model")
        figures = {name: self._evaluate(self.student, rows) for name, rows in texts.items()}
        write_json(file, {name: metrics.to_dict() for name, metrics in figures.items()})
        return figures

    @contextmanager
    def _kept(self) -> Iterator[None]:
        """Whatever fails in the block says that the training is not lost."""
        kept = (
            f"the trained model is kept in {self.config.partial}: the same command goes on from"
            " there, without training again"
        )
        try:
            yield
        except ParityError as error:
            raise ParityError(
                f"{error}; {kept}, and with --no-verify it writes it as it is"
            ) from error
        except QatcError as error:
            raise type(error)(f"{error}; {kept}") from error
        except BaseException:
            self.observer.note(kept)
            raise

    def _evaluate(self, model: nn.Module, rows: Rows) -> Metrics:
        return evaluate(
            model,
            rows,
            teacher=self.teacher.model,
            batch_size=self.config.training.batch_size,
            autocast=self._autocast if model is self.student else nullcontext,
            compile=self.compile,
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
            if (options := as_options(config)) is not None:
                (staging / "run.yaml").write_text(yaml.safe_dump(options, sort_keys=False), "utf-8")
            del self.teacher, self.student
            release_memory(self.device)  # two more models are about to be loaded
            metadata = metadata | self._verify(staging, masters)
            write_json(staging / "qatc.json", read_json(staging / "qatc.json") | metadata)
            write_card(staging)
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
            trust_remote_code=self.config.trust_remote_code,
        )
        return masters

    def _verify(self, staging: Path, masters: dict[str, torch.Tensor]) -> dict[str, Any]:
        """Hold what was written against what was trained, before it is called complete.

        Raises:
            ParityError: it does not compute what was trained.
        """
        if not self.config.verify:
            reason = "--no-verify asked for it"
            self.observer.note(f"not verified, as {reason}")
            return {"parity": {"passed": None, "reason": reason}}
        self.observer.stage("Verifying that the integer model computes what was trained")
        try:
            trust = self.config.trust_remote_code
            report = verify(staging, trained=masters, device=self.device, trust_remote_code=trust)
            release_memory(self.device)
            model = load(staging, device=self.device, compile=False, trust_remote_code=trust)
        except PassError as error:
            self.observer.note(f"not verified, as it does not run on integers: {error}")
            return {"parity": {"passed": None, "reason": str(error)}}
        report.require(str(self.config.output))
        self.observer.note(f"{len(report.checks)} checks passed")
        return {
            "parity": report.to_dict(),
            "memory": asdict(memory(model)),
            "kernels": [asdict(use) for use in kernel_report(model)],
            "decoding": decoding_report(model),
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

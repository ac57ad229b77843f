"""The main job: a Hugging Face checkpoint in, packed integers out.

Everything a run needs to go on after an interruption is in ``OUTPUT.partial``: its settings, the
figures measured so far and the checkpoints. The corpus is in ``OUTPUT.data`` (or wherever
``data`` says) and stays. ``OUTPUT`` itself appears in one piece, at the end.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import shutil
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import nn

from qatc.data import MANIFEST, Corpus, Rows, pack_rows, text_rows
from qatc.distill import Distiller, TrainingConfig, default_learning_rate
from qatc.errors import ConfigError, DataError
from qatc.evaluate import Metrics, evaluate
from qatc.export.codes import QuantizedWeight
from qatc.export.directory import write_model
from qatc.files import complete_directory, read_json, refuse_existing, write_json, writing_to
from qatc.generate import GenerationConfig, generate_corpus
from qatc.models import LoadedModel, load_config, load_model, load_tokenizer
from qatc.prepare import can_compile, prepare, prepared_state, quantized_parameters
from qatc.progress import Observer
from qatc.recipe import Recipe
from qatc.report import write_report

DType = Literal["auto", "float32", "bfloat16"]

GENERATED = "generated"
"""Name of the held-out generated text in the figures."""


@dataclass(frozen=True)
class QuantizeConfig:
    """One run of :func:`quantize`.

    Args:
        model: hub name or directory of the full-precision model.
        output: directory to write.
        recipe: what is quantized and how.
        generation: how the corpus is generated, unless ``data`` has one already.
        training: how the student is trained.
        data: directory of the corpus; ``None`` for ``OUTPUT.data``.
        eval_text: a text file for a second evaluation.
        eval_sequences: generated sequences held out of training.
        eval_tokens: tokens of ``eval_text`` to evaluate on, at most.
        dtype: compute dtype; ``auto``: bf16 on a GPU, and on a CPU that multiplies bf16 natively
            for models of hidden size 512 and more; otherwise fp32. Masters are always fp32.
        device: torch device; ``auto`` for a GPU if there is one.
        train_embeddings: train embeddings and output head as well, instead of sharing the
            teacher's.
        compile: compile the graphs; ``None``: if this machine can.
        overwrite: replace an existing ``output`` (only when the new one is complete).
        trust_remote_code: run code that comes with the model.
    """

    model: str
    output: Path
    recipe: Recipe = field(default_factory=Recipe)
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    data: Path | None = None
    eval_text: Path | None = None
    eval_sequences: int = 256
    eval_tokens: int = 65_536
    dtype: DType = "auto"
    device: str = "auto"
    train_embeddings: bool = True
    compile: bool | None = None
    overwrite: bool = False
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in get_args(DType):
            raise ConfigError(
                f"dtype must be one of {', '.join(get_args(DType))}; got {self.dtype!r}"
            )
        if not self.recipe.quantizes:
            raise ConfigError("the recipe quantizes nothing (16-16-16); choose e.g. --bits 4-8-4")
        if self.eval_sequences < 1:
            raise ConfigError(f"eval_sequences must be at least 1; got {self.eval_sequences}")

    @property
    def partial(self) -> Path:
        """Directory of the unfinished run."""
        return self.output.with_name(self.output.name + ".partial")

    @property
    def data_directory(self) -> Path:
        """Directory of the corpus."""
        return self.data or self.output.with_name(self.output.name + ".data")

    def to_dict(self) -> dict[str, Any]:
        """What decides the result, as plain data."""
        plain = dataclasses.asdict(self)
        for name in ("output", "overwrite", "trust_remote_code", "recipe"):
            del plain[name]
        for name in ("checkpoint_every", "keep_checkpoints"):
            del plain["training"][name]
        plain["recipe"] = self.recipe.to_dict()
        result: dict[str, Any] = json.loads(json.dumps(plain, default=str))
        return result


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
    observer = observer or Observer()
    refuse_existing(config.output, config.overwrite)
    _begin(config)
    return _Run(config, observer).run()


def _begin(config: QuantizeConfig) -> None:
    """Create the partial directory, or check that the one there is of the same run."""
    settings = config.to_dict()
    file = config.partial / "run.json"
    if config.partial.exists():
        found = read_json(file) if file.exists() else {}
        if found == settings:
            return
        if not config.overwrite and found:
            changed = ", ".join(sorted(k for k in settings if found.get(k) != settings[k]))
            raise ConfigError(
                f"{config.partial} holds an unfinished run with other settings ({changed});"
                " repeat its command to finish it, or pass --overwrite to start over"
            )
        shutil.rmtree(config.partial)
    with writing_to(config.partial):
        config.partial.mkdir(parents=True)
    write_json(file, settings)


class _Run:
    """One run: each stage reads what the ones before it left."""

    def __init__(self, config: QuantizeConfig, observer: Observer) -> None:
        self.config, self.observer = config, observer
        self.started = time.time()
        self.device = pick_device(config.device)
        self.compile = can_compile() if config.compile is None else config.compile

    def run(self) -> QuantizeResult:
        config, observer = self.config, self.observer
        observer.stage(f"Loading {config.model}")
        trust = config.trust_remote_code
        text = _read_text(config.eval_text)
        self.tokenizer = load_tokenizer(config.model, trust_remote_code=trust)
        student = load_model(
            config.model, dtype=torch.float32, device=self.device, trust_remote_code=trust
        )
        self.compute = pick_dtype(config.dtype, self.device, student.model.config)
        self.teacher = load_model(
            config.model, dtype=self.compute, device=self.device, trust_remote_code=trust
        )
        if not self.compile:
            observer.note(
                "running uncompiled: no C++ compiler was found, or --no-compile was given"
            )
        observer.stage(f"Capturing and rewriting the layers for {config.recipe.bits}")
        self.student = student.model
        self._prepare()
        corpus = self._corpus()
        train, held_out = _split(corpus, config)
        texts = {GENERATED: held_out}
        if text is not None:
            length = config.generation.max_length
            rows = text_rows(text, self.tokenizer, length, config.eval_tokens)
            texts[str(config.eval_text)] = rows
        figures = self._baselines(texts)
        observer.stage(f"Training for {config.training.steps} steps")
        distiller = Distiller(
            self.student,
            self.teacher.model,
            train,
            config.training,
            config.partial,
            autocast=self._autocast,
        )
        history = distiller.run(
            on_step=lambda metrics: observer.trained(metrics, config.training.steps)
        )
        self._round_unquantized(student.dtype)
        observer.stage("Evaluating the trained model")
        for name, rows in texts.items():
            figures[name]["QAT"] = self._evaluate(self.student, rows)
        observer.stage(f"Writing {config.output}")
        metadata = {
            **_provenance(config, corpus),
            "compute_dtype": str(self.compute).removeprefix("torch."),
            "device": _device_name(self.device),
            "learning_rate": distiller.rate,
            "training_seconds": round(sum(r.seconds for r in history), 1),
            "row_utilization": round(train.utilization, 4),
            "figures": {t: {m: v.to_dict() for m, v in r.items()} for t, r in figures.items()},
        }
        self._write(figures, metadata, history)
        shutil.rmtree(config.partial, ignore_errors=True)
        return QuantizeResult(config.output, config.data_directory, figures)

    def _prepare(self) -> None:
        """Put the quantized graph under the student and decide what is trained."""
        masters = next(self.student.parameters()).dtype
        compute = None if self.compute is masters else self.compute
        prepare(self.student, self.config.recipe, compile=self.compile, compute_dtype=compute)
        self.quantized = quantized_parameters(self.student)
        if not self.config.train_embeddings:
            _share_embeddings(self.student, self.teacher.model)

    def _corpus(self) -> Corpus:
        config, observer = self.config, self.observer
        directory = config.data_directory
        if config.data is not None and (directory / MANIFEST).exists():
            corpus = Corpus.open(directory)
            corpus.require_tokenizer(self.tokenizer)
            observer.note(f"training on the corpus {directory} of {corpus.manifest['model']}")
            return corpus
        observer.stage(f"The teacher writes {config.generation.sequences} sequences to {directory}")
        generator = LoadedModel(self.teacher.model, config.model, self.teacher.dtype)
        total = config.generation.sequences
        return generate_corpus(
            generator,
            self.tokenizer,
            directory,
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
    def _round_unquantized(self, stored: torch.dtype) -> None:
        """Round what is stored in float to its stored dtype, so that what ships is evaluated."""
        quantized = set(self.quantized)
        for name, parameter in self.student.named_parameters():
            if name not in quantized:
                parameter.copy_(parameter.to(stored).to(parameter.dtype))
        self.stored = stored

    def _write(
        self, figures: dict[str, dict[str, Metrics]], metadata: dict[str, Any], history: list[Any]
    ) -> None:
        config, model = self.config, self.student
        state = model.state_dict()
        weights = {}
        if config.recipe.weights.quantizes:
            weights = {
                name: QuantizedWeight.from_float(
                    state[name].to(self.compute), config.recipe.weights
                )
                for name in self.quantized
            }
        floats = {
            name: value.to(self.stored) if value.is_floating_point() else value
            for name, value in state.items()
            if name not in weights
        }
        for owner, value in prepared_state(model).use_cache:
            owner.use_cache = value
        with complete_directory(config.output, overwrite=config.overwrite) as staging:
            write_model(
                staging,
                config=model.config,
                state=floats,
                weights=weights,
                recipe=config.recipe,
                metadata=metadata,
                generation_config=model.generation_config,
                tokenizer=self.tokenizer,
            )
            shutil.copyfile(config.partial / "metrics.jsonl", staging / "metrics.jsonl")
            write_report(staging, metadata, figures, history)


def load_teacher(
    name: str, *, dtype: str = "auto", device: str = "auto", trust_remote_code: bool = False
) -> LoadedModel:
    """Load a full-precision model in the dtype that :func:`quantize` would compute in."""
    if dtype not in get_args(DType):
        raise ConfigError(f"dtype must be one of {', '.join(get_args(DType))}; got {dtype!r}")
    device = pick_device(device)
    config = load_config(name, trust_remote_code=trust_remote_code)
    compute = pick_dtype(dtype, device, config)  # type: ignore[arg-type]
    return load_model(name, dtype=compute, device=device, trust_remote_code=trust_remote_code)


def pick_device(device: str) -> str:
    """The device that ``auto`` stands for; another one is checked."""
    if device != "auto":
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            raise ConfigError(f"cannot use the device {device!r}: {reason}") from error
        return device
    return "cuda" if torch.cuda.is_available() else "cpu"


def pick_dtype(dtype: DType, device: str, config: Any) -> torch.dtype:
    """The compute dtype that ``auto`` stands for."""
    if dtype != "auto":
        chosen: torch.dtype = getattr(torch, dtype)
        return chosen
    if torch.device(device).type != "cpu":
        return torch.bfloat16
    wide = getattr(config, "hidden_size", 0) >= 512
    return torch.bfloat16 if wide and _cpu_multiplies_bf16() else torch.float32


def _cpu_multiplies_bf16() -> bool:
    flags = Path("/proc/cpuinfo")
    text = flags.read_text(encoding="utf-8") if flags.exists() else ""
    return "avx512_bf16" in text or "amx_bf16" in text


def _device_name(device: str) -> str:
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name()
    return f"CPU, {torch.get_num_threads()} threads"


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
    sequences = corpus.sequences()
    held = config.eval_sequences
    if len(sequences) < 2 * held:
        raise DataError(
            f"the corpus has {len(sequences)} sequences, too few to hold out {held} for evaluation;"
            " generate more (--samples), or lower --eval-samples"
        )
    length = config.generation.max_length
    pack: Callable[[list[Any]], Rows] = lambda s: pack_rows(s, length, corpus.prompt_tokens)  # noqa: E731
    return pack(sequences[:-held]), pack(sequences[-held:])


def _read_text(path: Path | None) -> str | None:
    if path is None:
        return None
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the text {path}: {error}") from error


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
        "versions": {name: _version(name) for name in packages},
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


__all__ = ["QuantizeConfig", "QuantizeResult", "default_learning_rate", "quantize"]

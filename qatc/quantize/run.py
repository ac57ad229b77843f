"""The main job: a Hugging Face checkpoint in, packed integers out.

Everything a run needs to go on after an interruption is in ``OUTPUT.partial``: its settings, the
figures measured so far and the checkpoints. The corpus is in ``OUTPUT.data`` (or wherever
``data`` says) and stays. ``OUTPUT`` itself appears in one piece, at the end.

Where several processes do a run together (:mod:`qatc.machine.world`), models are divided among them
from loading to packing (:mod:`qatc.divided`), and all take part wherever one is run. Where
that cannot be (:func:`qatc.quantize.given.why_whole`), each has whole ones; they write the corpus
and train together, and all else the first one does and keeps with the run, where others find it.

Each stage is a function whose result the next ones take:

1. :mod:`qatc.quantize.given`: tokenizer, evaluation text, corpus;
2. :mod:`qatc.quantize.pair`: teacher and student;
3. :mod:`qatc.quantize.forecast`: what is ahead;
4. :mod:`qatc.quantize.stages`: corpus, baselines, training, figures;
   before baselines :mod:`qatc.quantize.bit_budget`: bits of single weights, if they are to be
   chosen; between baselines and training :mod:`qatc.quantize.post_training`: methods without
   training;
5. :mod:`qatc.quantize.writing`: the output, verified.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ParamSpec, TypeVar

from qatc.data.corpus import Corpus, Rows, is_complete
from qatc.data.generate import check_corpus, corpus_place, describe
from qatc.errors import ParityError, QatcError
from qatc.evaluation.metrics import Metrics
from qatc.graph import captures
from qatc.machine.device import device_name
from qatc.machine.world import current
from qatc.progress import Observer
from qatc.ptq.method import parse_method
from qatc.quantize.bit_budget import choose_weight_bits, chosen
from qatc.quantize.forecast import forecast
from qatc.quantize.given import (
    Given,
    Setting,
    open_recorded,
    read_given,
    recorded_teacher,
    require_known_tokens,
    require_recorded,
)
from qatc.quantize.pair import (
    Pair,
    drop_teacher,
    load_dropped_teacher,
    load_models,
    make_pair,
    round_unquantized,
)
from qatc.quantize.post_training import apply_method
from qatc.quantize.provenance import provenance, versions
from qatc.quantize.settings import QuantizeConfig, check_places
from qatc.quantize.stages import (
    Figures,
    Training,
    center,
    measure_baselines,
    measure_depth,
    measure_student,
    plain_figures,
    split,
    train,
    write_corpus,
)
from qatc.quantize.unfinished import begin_run, check_run, end_run, recorded_inputs, trained_file
from qatc.quantize.writing import Trained, take_output, write
from qatc.storage.directories import refuse_existing
from qatc.storage.files import read_json, write_json
from qatc.storage.locks import locked
from qatc.training.sharding import check_training

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True)
class QuantizeResult:
    """What :func:`quantize` made.

    Attributes:
        output: the directory.
        data: the corpus that it was trained on.
        figures: text name -> model name (``full precision``, ``RTN``, ``QAT``, or what the method
            is called) -> metrics; the last model is the one in ``output``.
    """

    output: Path
    data: Path
    figures: Mapping[str, Mapping[str, Metrics]]


@captures.shared()
def quantize(config: QuantizeConfig, observer: Observer | None = None) -> QuantizeResult:
    """Quantize a model by data-free quantization-aware training.

    Raises:
        QatcError: with the way out; an interrupted or failed run goes on when it is started again
            with the same settings.
    """
    world = current()
    recipe = config.recipe
    check_training(world, config.training, recipe.weights.learned or recipe.kv.learned)
    check_places(config)
    with ExitStack() as held, ExitStack() as corpus_lock:
        world.on_first(_take_places, config, held, corpus_lock)
        setting = Setting.of(config, (observer if world.first else None) or Observer())
        # The models are gone with its frame.
        setting, figures, trained = _trained(setting, corpus_lock)
        with _kept(setting):
            setting.observer.stage(f"Writing {config.output}")
            world.on_first(write, setting, *trained)
        world.on_first(end_run, config)
        return QuantizeResult(config.output, config.data_directory, figures)


def _take_places(config: QuantizeConfig, held: ExitStack, corpus_lock: ExitStack) -> None:
    """Hold the places that the run writes to, if it may."""
    held.enter_context(locked(config.output))
    refuse_existing(config.output, config.overwrite)
    check_run(config, versions())
    if not is_complete(config.data_directory):
        corpus_lock.enter_context(corpus_place(config.data_directory, config.model))


def _trained(setting: Setting, corpus_lock: ExitStack) -> tuple[Setting, Figures, list[Trained]]:
    """All stages up to the trained model, and the run with all that it has chosen by then.

    ``corpus_lock`` is held until the corpus is complete. The first process alone has the model.
    """
    world, config, observer = current(), setting.config, setting.observer
    observer.stage(f"Loading {config.model}")
    given = read_given(setting)
    inputs = {**versions(), **given.inputs}
    starts_over = bool(world.on_first(check_run, config, inputs))
    place = config.partial / "teacher.json"  # the same one when the run goes on
    goes_on = place.exists() and not starts_over
    in_host = read_json(place)["in_host"] if goes_on else given.recorded is not None
    loaded = load_models(setting, given.compute, in_host)
    inputs |= loaded.inputs
    world.on_first(check_run, config, inputs)
    if given.recorded is not None:
        require_recorded(given.recorded, loaded.teacher)
    require_known_tokens(given, loaded.teacher.model, config.model)
    observer.stage(f"Capturing and rewriting the layers for {config.recipe.bits}")
    pair = make_pair(setting, loaded, given.compute)
    world.on_first(_begin, setting, given, pair, inputs, given.corpus)
    world.on_first(write_json, place, {"in_host": in_host})
    ahead = (setting, pair, given.corpus, given.texts)
    slots = forecast(*ahead) if setting.divided else world.on_first(forecast, *ahead)
    corpus = given.corpus or write_corpus(setting, given, pair, slots)
    corpus_lock.close()
    recorded = given.recorded or open_recorded(config, corpus)
    world.on_first(_begin, setting, given, pair, inputs | recorded_teacher(recorded), corpus)
    rows, held_out = split(corpus, config, recorded)
    texts = {corpus.held_out_name: held_out, **given.texts}
    setting, pair = world.first_before_others(choose_weight_bits, setting, pair, rows)
    config = setting.config
    center(setting, pair, rows)
    baselines = _together(setting, measure_baselines, setting, pair, texts)
    method = parse_method(config.method)
    if method.steps:
        pair = world.first_before_others(apply_method, setting, pair, rows)
        center(setting, pair, rows)
    if method.steps and method.trains:
        file = config.partial / "post-training.json"
        measured = (pair, texts, baselines, method.name, file)
        baselines = world.first_before_others(measure_student, setting, *measured)
    training = Training(0.0, ())
    if method.trains:
        *_, rounded = baselines[corpus.held_out_name].values()
        training = train(setting, pair, rows, rounded.kl or 0.0)
    with _kept(setting):
        if world.first or setting.divided:  # others read what it measures
            pair = load_dropped_teacher(setting, pair)
        round_unquantized(pair)
        name, file = "QAT" if method.trains else method.name or "RTN", trained_file(config)
        by_layer = _together(setting, measure_depth, setting, pair, held_out)
        measured = (pair, texts, baselines, name, file)
        figures = _together(setting, measure_student, setting, *measured)
        if not (world.first or setting.divided):
            return setting, figures, []
        metadata = _metadata(setting, pair, corpus, rows, training, figures)
        metadata["divergence_by_layer"] = by_layer
        drop_teacher(pair)
        output, masters = take_output(setting, pair, metadata)
        if not world.first:
            return setting, figures, []
    trained = Trained(output, masters, given.tokenizer, figures, training)
    return setting, figures, [trained]


def _together(setting: Setting, act: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """What a stage gives that runs models and keeps what it finds.

    Those that are divided all processes run at once; of whole ones, the first runs its own, and
    others find what it has kept.
    """
    if setting.divided:
        return act(*args, **kwargs)
    return current().first_before_others(act, *args, **kwargs)


def _begin(
    setting: Setting, given: Given, pair: Pair, inputs: Mapping[str, str], corpus: Corpus | None
) -> None:
    """Begin or go on, once everything known of what goes into the run is what it was."""
    config = setting.config
    if corpus is None:
        described = describe(pair.teacher, given.tokenizer, config.generation, setting.compile)
        check_corpus(config.data_directory, described)
    else:
        inputs = {**inputs, f"the corpus {corpus.path}": corpus.fingerprint}
    changes = check_run(config, inputs)
    if changes:
        setting.observer.note(f"starting over: {'; '.join(changes)}")
    begin_run(config, inputs)


def _metadata(
    setting: Setting, pair: Pair, corpus: Corpus, rows: Rows, training: Training, figures: Figures
) -> dict[str, object]:
    """What ``qatc.json`` says of the run."""
    return {
        **provenance(setting.config, corpus, recorded_inputs(setting.config)),
        **chosen(setting.config),
        "compute_dtype": str(pair.compute).removeprefix("torch."),
        "integer_forward": pair.integer_forward,
        "device": device_name(setting.device),
        "learning_rate": training.rate,
        "training_seconds": round(training.seconds, 1),
        "row_utilization": round(rows.utilization, 4),
        "figures": plain_figures(figures),
    }


@contextmanager
def _kept(setting: Setting) -> Iterator[None]:
    """Whatever fails in the block says that the training is not lost."""
    kept = (
        f"the trained model is kept in {setting.config.partial}: the same command goes on from"
        " there, without training again"
    )
    try:
        yield
    except ParityError as error:
        raise ParityError(f"{error}; {kept}, and with --no-verify it writes it as it is") from error
    except QatcError as error:
        raise type(error)(f"{error}; {kept}") from error
    except BaseException:
        setting.observer.note(kept)
        raise

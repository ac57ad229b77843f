"""Shared by the tests: a tiny random model with a real tokenizer, and the text it knows."""

from __future__ import annotations

import fcntl
import itertools
import os
import shutil
import signal
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BloomConfig,
    BloomForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from qatc.evaluation.parity import verify
from qatc.graph import captures
from qatc.models.preparation import prepare, quantized_specs, restore
from qatc.output import Output, QuantizedWeight, write_output
from qatc.recipe.recipe import Recipe

torch.set_num_threads(1)

TEXT = " ".join(
    f"The {adjective} {noun} {verb} by the {place}, and nobody asked why."
    for adjective in ("old", "quiet", "blue", "tired")
    for noun in ("fox", "miller", "lantern", "river")
    for verb in ("sleeps", "waits", "sings")
    for place in ("bridge", "orchard", "window")
)
"""What the tokenizer is trained on; about 1,900 tokens."""


def make_tokenizer(size: int = 112, *, bos: bool = True) -> PreTrainedTokenizerFast:
    """A byte-pair tokenizer of ``size`` tokens which puts <s> before every text, or does not."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<s>", "</s>"], show_progress=False
    )
    core.train_from_iterator([TEXT], trainer)
    if bos:
        core.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", core.token_to_id("<s>"))]
        )
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")


def make_llama(vocabulary: int = 112, seed: int = 0, **changes: Any) -> Any:
    """A random Llama of two layers; large weights, so that its logits have something to say."""
    settings: dict[str, Any] = {
        "vocab_size": vocabulary,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "initializer_range": 0.2,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "attn_implementation": "sdpa",
    }
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**(settings | changes))).eval()


def make_small(kind: str = "llama", attention: str = "sdpa", **changes: Any) -> Any:
    """A random model of two layers, of the architecture that transformers calls ``kind``."""
    settings: dict[str, Any] = {
        "vocab_size": 40,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **(settings | changes))
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()


def load_with_transformers(directory: Path) -> Any:
    """The model, of which no weight may be missing and none left over."""
    loaded: Any = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    model, info = loaded
    assert not any(info.values()), info
    return model


def save(directory: Path, model: PreTrainedModel, tokenizer: Any = None) -> Path:
    """Write a model directory."""
    model.save_pretrained(directory)
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)
    return directory


def make_output(directory: Path, recipe: Recipe, model: Any = None, tokenizer: Any = None) -> Path:
    """An output directory as ``qatc quantize`` writes it, of a model that was not trained."""
    model = model or make_llama()
    prepare(model, recipe, compile=False)
    weights = {
        name: QuantizedWeight.from_float(model.state_dict()[name], spec)
        for name, spec in quantized_specs(model).items()
    }
    restore(model)
    directory.mkdir(parents=True)
    output = Output(
        model.config,
        recipe,
        weights,
        model.state_dict(),
        generation_config=model.generation_config,
    )
    write_output(directory, output, tokenizer=tokenizer)
    return directory


@pytest.fixture(autouse=True)
def signals_as_at_a_terminal() -> Iterator[None]:
    """Under ``nohup`` and in the background a test starts with SIGHUP and SIGINT ignored."""
    usual: dict[int, Any] = {
        signal.SIGHUP: signal.SIG_DFL,
        signal.SIGINT: signal.default_int_handler,
    }
    ignored = [number for number in usual if signal.getsignal(number) is signal.SIG_IGN]
    for number in ignored:
        signal.signal(number, usual[number])
    yield
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)


@pytest.fixture(scope="session", autouse=True)
def _one_capture_of_a_structure() -> Iterator[None]:
    """All tests of a process share captures, as the models of one run do: a third of a second each.

    Those of :mod:`qatc.graph` capture anew. So has a test which changes code that is captured.
    """
    with pytest.MonkeyPatch.context() as patch, captures.shared():
        patch.setattr(captures, "LARGEST", 512)
        yield


@pytest.fixture
def captured_anew() -> Iterator[None]:
    """The test shares captures with no other."""
    token = captures._SHARED.set(None)
    yield
    captures._SHARED.reset(token)


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """The tokenizer of ``model_path``."""
    return make_tokenizer()


LONGEST = (
    *("test_in_a_world", "test_cli", "test_examples", "test_decode_program", "test_deep_parity"),
    *("test_post_training", "test_parity", "test_resume", "test_remote_code", "test_reduction"),
)
"""Files that take 20 s and more: begun last, they would leave a process alone with one of them."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files are run first."""
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else 99)


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """A directory for all processes that run tests: the first to ask for it lets ``make`` fill it.

    The others wait for it, and no test changes it.
    """
    base = factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    directory, finished = base / name, base / f"{name}.finished"
    with (base / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not finished.exists():
            shutil.rmtree(directory, ignore_errors=True)
            directory.mkdir()
            make(directory)
            finished.touch()
    return directory


@pytest.fixture(scope="session")
def shared_model_path(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """A model directory that no test changes."""
    directory = made_once(
        tmp_path_factory, "shared", lambda made: save(made / "tiny", make_llama(), tokenizer)
    )
    return directory / "tiny"


@pytest.fixture(scope="session")
def in_a_world(tmp_path_factory: pytest.TempPathFactory, shared_model_path: Path) -> Path:
    """What two processes did together, and beside it what one did alone."""
    from tests.in_a_world import begin
    from tests.ranks import ended, start_ranks

    def make(directory: Path) -> None:
        begin(directory, shared_model_path)
        found = ended(start_ranks("-m", "tests.in_a_world", str(directory), str(shared_model_path)))
        told = "".join(err for _, _, err in found)
        assert told.endswith("error: all is done, and the second process ends\n"), told
        assert told.count("error:") == 1 and [status for status, _, _ in found] == [1, 2]

    return made_once(tmp_path_factory, "world", make)


@pytest.fixture
def model_path(shared_model_path: Path, tmp_path: Path) -> Path:
    """A model directory that the test may damage."""
    return Path(shutil.copytree(shared_model_path, tmp_path / "tiny"))


@pytest.fixture(scope="session")
def other_tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose tokenizer is another one."""
    path = tmp_path_factory.mktemp("models") / "other"
    return save(path, make_llama(90), make_tokenizer(90))


@pytest.fixture(scope="session")
def bloom_path(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """A model whose attention transformers does not route through SDPA."""
    config = BloomConfig(vocab_size=112, hidden_size=32, n_layer=2, n_head=4)
    path = tmp_path_factory.mktemp("models") / "bloom"
    return save(path, BloomForCausalLM(config), tokenizer)


@pytest.fixture(scope="session")
def falcon_path(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """A model whose linear layers are no ``aten.linear``."""
    config = FalconConfig(
        vocab_size=112, hidden_size=32, num_hidden_layers=2, num_attention_heads=4
    )
    path = tmp_path_factory.mktemp("models") / "falcon"
    return save(path, FalconForCausalLM(config), tokenizer)


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``TEXT`` in a file."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.fixture(scope="session", autouse=True)
def _no_second_process() -> Iterator[None]:
    """Runs in this process verify their output without loading it in a new one (10 s each).

    The command line, which the tests start as a process, does both.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qatc.quantize.writing.verify", partial(verify, reload=False))
        yield


def run_until_killed(function: Callable[[], object], by: int = signal.SIGKILL) -> None:
    """Run ``function`` in a copy of this process, where it has to end by the signal ``by``."""
    child = os.fork()
    if child == 0:
        try:
            function()
        except BaseException:
            traceback.print_exc()
        os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == by, "it was not killed"


def kill_at_call(function: Callable[..., Any], number: int = 1) -> Callable[..., Any]:
    """``function``, but its ``number``-th call kills the process instead."""
    calls = itertools.count(1)

    def killing(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)

    return killing


_DISK_CALLS = ("mkdir", "fsync", "rename", "replace", "unlink", "rmdir")
"""Functions of :mod:`os` that change what is on the disk, or wait for it."""


def at_disk_call(
    patch: pytest.MonkeyPatch, number: int = 0, act: Callable[[], object] = lambda: None
) -> list[str]:
    """Do ``act`` just before the ``number``-th call that changes the disk; returns the calls."""
    calls: list[str] = []

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append(real.__name__)
            if len(calls) == number:
                act()
            return real(*args, **kwargs)

        return call

    for name in _DISK_CALLS:
        patch.setattr(os, name, counted(getattr(os, name)))
    return calls


def contents(directory: Path) -> dict[str, bytes]:
    """Every file of a directory, by relative path."""
    return {
        str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()
    }

"""Layers that are trained one after the other: what each reads, what it lowers, and going on."""

from __future__ import annotations

import json
import signal
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from torch import Tensor

from qatc.errors import CheckpointError, ConfigError, TrainingError
from qatc.losses.distances import relative_error
from qatc.machine.device import move
from qatc.models.preparation import prepare, prepared_state
from qatc.recipe.recipe import Recipe
from qatc.training.blockwise import BlockwiseTrainer, LayerMetrics
from qatc.training.config import TrainingConfig, schedule
from qatc.training.streams import Stream
from tests.conftest import kill_at_call, make_llama, make_small, run_until_killed
from tests.training.conftest import VOCABULARY, assert_equal, make_rows, weights

CONFIG = TrainingConfig(
    train="blockwise",
    blockwise_steps=6,
    blockwise_rows=14,  # of which three batches are used
    batch_size=4,
    learning_rate=1e-3,
    checkpoint_every=2,
)


def make(seed: int = 0) -> Any:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 3}
    return make_llama(VOCABULARY, seed, tie_word_embeddings=False, **sizes)


def trainer(directory: Path, config: TrainingConfig = CONFIG, student: Any = None) -> Any:
    student = student or prepare(make(0), Recipe.from_bits("4-8-4"), compile=False)
    return BlockwiseTrainer(student, make(0), make_rows(), config, directory)


def plain(history: list[LayerMetrics]) -> list[LayerMetrics]:
    """All but the seconds."""
    return [replace(record, seconds=0.0) for record in history]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """An uninterrupted run."""
    run = trainer(tmp_path_factory.mktemp("blockwise"))
    run.run()
    return run


def layer_inputs(model: Any, ids: Tensor) -> list[Tensor]:
    """What the layers of a model read, and what the last one gives."""
    seen: list[Tensor] = []
    layers = model.model.layers
    hooks = [
        layer.register_forward_pre_hook(lambda _, args: seen.append(args[0])) for layer in layers
    ]
    hooks.append(layers[-1].register_forward_hook(lambda _, args, out: seen.append(out)))
    with torch.no_grad():
        model(input_ids=ids)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("quantized", [False, True])
def test_a_stream_is_what_layers_read(quantized: bool) -> None:
    model, rows = make(0), make_rows()[:8]
    if quantized:
        prepare(model, Recipe.from_bits("4-8-4"), compile=False)
    wanted = layer_inputs(model, torch.from_numpy(rows.tokens).long())
    stream = Stream(model, rows, 4, torch.float32)
    for number, hidden in enumerate(wanted):
        torch.testing.assert_close(stream.hidden, hidden, rtol=1e-5, atol=1e-5)
        if number < 3:
            stream.advance(number)


def test_layers_that_read_the_text_itself_are_refused() -> None:
    model = make(0)
    text: dict[str, Any] = {}
    model.model.register_forward_pre_hook(
        lambda _, args, kwargs: text.update(text=kwargs["input_ids"].float()), with_kwargs=True
    )
    model.model.layers[1].register_forward_pre_hook(
        lambda _, args, kwargs: (args, kwargs | text), with_kwargs=True
    )
    with pytest.raises(ConfigError, match=r"layers.1 reads something of the text .*--train full"):
        Stream(model, make_rows()[:4], 4, torch.float32)


def test_layers_that_skip_one_are_refused() -> None:
    model = make(0)
    model.model.layers[1].register_forward_pre_hook(lambda _, args: (args[0] + 1, *args[1:]))
    with pytest.raises(ConfigError, match=r"layers.1 reads something else than what the layer"):
        Stream(model, make_rows()[:4], 4, torch.float32)


def test_one_layer_of_both_is_on_the_device(
    tmp_path: Path, whole: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a device that is played: what is moved is copied, and noted."""
    monkeypatch.setattr("qatc.machine.device._at", lambda tensor, device: tensor.clone())
    run = trainer(tmp_path)
    models = run.student, run.teacher
    run.student.lm_head.weight.requires_grad_(False).data = run.teacher.lm_head.weight.data
    there = {id(t) for model in models for t in tensors(model)}
    counts: list[int] = []

    def moving(stay: bool) -> Any:
        def act(modules: Any) -> None:
            move(modules, run.device)
            change = {id(t) for module in modules for t in tensors(module)}
            there.symmetric_difference_update(change - there if stay else change & there)

        return act

    def computes(layer: Any, args: Any) -> None:
        assert {id(t) for t in tensors(layer)} <= there
        counts.append(len(there))

    run._bring, run._send = moving(True), moving(False)
    for model in models:
        for layer in model.model.layers:
            layer.register_forward_pre_hook(computes)
    assert plain(run.run()) == plain(whole.records.history)
    assert_equal(weights(run.student), weights(whole.student))
    layer = sum(len(tensors(model.model.layers[0])) for model in models)
    # Both models are there while it is noted what layers read.
    assert set(counts) == {len(there), layer} and counts[-1] == layer
    assert run.student.lm_head.weight.data_ptr() == run.teacher.lm_head.weight.data_ptr()


def tensors(module: Any) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def test_on_a_cpu_nothing_is_moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qatc.training.blockwise.move", lambda *_, **__: pytest.fail("moved"))
    trainer(tmp_path, replace(CONFIG, blockwise_steps=1)).run()


def test_graphs_are_those_that_the_model_has() -> None:
    """Layers of two kinds, with masks of their own, and rows of one length."""
    model, teacher = (
        make_small("gemma3_text", sliding_window=4, num_hidden_layers=4) for _ in "ab"
    )
    prepare(model, Recipe.from_bits("4-8-4"), compile=False)
    rows = make_rows()
    model(input_ids=torch.from_numpy(rows.tokens[:4]).long())
    before = {id(template) for template in prepared_state(model).templates()}
    with TemporaryDirectory() as directory:
        config = replace(CONFIG, blockwise_steps=1)
        BlockwiseTrainer(model, teacher, rows, config, Path(directory)).run()
    assert {id(template) for template in prepared_state(model).templates()} == before


def test_steps_equal_a_reference(tmp_path: Path) -> None:
    """In fp64, without qatc's graphs, streams and losses."""
    config = replace(CONFIG, blockwise_steps=3, accumulate=2, gradient_clip=0.05)
    student, rows = make(1), make_rows()
    run = BlockwiseTrainer(student, make(0), rows, config, tmp_path)
    history = run.run()
    mine, its = make(1).double(), make(0).double()
    tokens, real = torch.from_numpy(rows.tokens[:12]).long(), torch.from_numpy(rows.real[:12])
    for number in range(3):
        with torch.no_grad():
            wanted = layer_outputs(its, tokens)[number]
        parameters = list(mine.model.layers[number].parameters())
        optimizer = torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0)
        for step in range(1, 4):
            chosen = torch.cat(list(run._batches(number, step)))
            given, target = layer_outputs(mine, tokens[chosen])[number], wanted[chosen]
            errors = (given - target).square().sum(-1) / target.square().sum(-1)
            loss = errors[real[chosen]].mean()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(parameters, 0.05)
            record = history[3 * number + step - 1]
            assert record.loss == pytest.approx(loss.item(), rel=1e-4)
            assert record.gradient_norm == pytest.approx(float(norm), rel=1e-3)
            assert record.tokens == int(real[chosen].sum())
            optimizer.param_groups[0]["lr"] = 1e-3 * schedule(step, replace(config, steps=3))
            assert record.learning_rate == optimizer.param_groups[0]["lr"]
            optimizer.step()
            mine.zero_grad()
    expected = {name: value.float() for name, value in weights(mine).items()}
    assert_equal(weights(student), expected, rtol=1e-2, atol=2e-4)


def layer_outputs(model: Any, ids: Tensor) -> list[Tensor]:
    """What every layer gives, with gradients."""
    seen: list[Tensor] = []
    hooks = [
        layer.register_forward_hook(lambda _, args, out: seen.append(out))
        for layer in model.model.layers
    ]
    model(input_ids=ids)
    for hook in hooks:
        hook.remove()
    return seen


def test_layers_alone_are_trained_and_come_closer(whole: Any) -> None:
    history = whole.records.history
    assert [(r.layer, r.step) for r in history] == [(i, s) for i in (1, 2, 3) for s in range(1, 7)]
    rows = make_rows()
    ids, real = torch.from_numpy(rows.tokens).long(), torch.from_numpy(rows.real)
    untrained = prepare(make(0), Recipe.from_bits("4-8-4"), compile=False)
    with torch.no_grad():
        last = [layer_outputs(m, ids)[-1] for m in (make(0), untrained, whole.student)]
    before, after = (float(relative_error(given, last[0], real)) for given in last[1:])
    assert after < 0.9 * before
    trained, start = dict(whole.student.named_parameters()), dict(make(0).named_parameters())
    same = {n for n, p in trained.items() if torch.equal(p, start[n])}
    assert same == {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}


class TestResume:
    def finish(self, directory: Path, whole: Any) -> None:
        run = trainer(directory)
        assert plain(run.run()) == plain(whole.records.history)
        assert_equal(weights(run.student), weights(whole.student))
        lines = (directory / "blockwise.jsonl").read_text().splitlines()
        assert len(lines) == 18 and json.loads(lines[-1])["layer"] == 3

    @pytest.mark.parametrize("step", [1, 6, 9])
    def test_killed_after_a_step(self, tmp_path: Path, whole: Any, step: int) -> None:
        kill = kill_at_call(lambda _: None, step)
        run_until_killed(lambda: trainer(tmp_path).run(kill))
        self.finish(tmp_path, whole)

    def test_ctrl_c_finishes_the_step_and_writes_a_checkpoint(
        self, tmp_path: Path, whole: Any
    ) -> None:
        run = trainer(tmp_path)

        def press(record: LayerMetrics) -> None:
            if (record.layer, record.step) == (2, 3):
                signal.raise_signal(signal.SIGINT)

        with pytest.raises(KeyboardInterrupt):
            run.run(press)
        assert [run._checkpoints(n).latest() for n in range(3)] == [6, 3, None]
        self.finish(tmp_path, whole)

    def test_nothing_is_left_to_do(self, whole: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(
            "qatc.training.blockwise.Stream", lambda *args: pytest.fail("computed again")
        )
        run = trainer(whole.records.file.parent)
        assert run.run(lambda record: pytest.fail("trained on")) == whole.records.history
        assert_equal(weights(run.student), weights(whole.student))

    def test_steps_without_their_record(self, tmp_path: Path) -> None:
        trainer(tmp_path).run()
        (tmp_path / "blockwise.jsonl").write_text("")
        with pytest.raises(CheckpointError, match="records 0 steps, but the checkpoints are of 18"):
            trainer(tmp_path).run()


def test_an_error_that_is_no_number_keeps_the_layers_before(tmp_path: Path) -> None:
    student: Any = prepare(make(0), Recipe.from_bits("4-8-4"), compile=False)
    with torch.no_grad():
        student.model.layers[1].mlp.down_proj.weight[0, 0] = torch.inf
    run = trainer(tmp_path, student=student)
    with pytest.raises(
        TrainingError, match=r"error of layer 2 is not a number at its step 1; .*lo"
    ):
        run.run()
    assert [run._checkpoints(n).latest() for n in range(3)] == [6, None, None]


def test_fewer_rows_than_a_batch(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there are 3 rows .* fewer than one batch of 4"):
        trainer(tmp_path, replace(CONFIG, blockwise_rows=3))


def test_every_epoch_has_every_row_once(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    epochs = [
        torch.cat([rows for step in steps for rows in run._batches(number, step)]).tolist()
        for number in (0, 1)
        for steps in ((1, 2, 3), (4, 5, 6))
    ]
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs)
    assert len({*map(tuple, epochs)}) == 4, "orders of their own"

"""What two processes do with models that are divided between them from the start."""

from __future__ import annotations

import shutil
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qatc.divided import hold, load
from qatc.divided.hold import is_released, release, whole_in_each
from qatc.divided.load import load_divided
from qatc.errors import CheckpointError, ConfigError
from qatc.machine.world import World, current
from qatc.models import load_model
from qatc.models.load import model_fingerprint
from qatc.quantize import pair, stages, writing
from qatc.training.sharding import first_row, own_rows

NAN = "model.layers.1.mlp.up_proj.weight"


def lay_out_checkpoints(directory: Path, model: Path) -> None:
    """One whose tensors have other names than the model's, and one with NaN in the last row."""
    for name in ("renamed", "with nan"):
        shutil.copytree(model, directory / name)
    tensors = load_file(model / "model.safetensors")
    inner = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    save_file(inner, directory / "renamed" / "model.safetensors", {"format": "pt"})
    tensors[NAN][-1, 3] = torch.nan
    save_file(tensors, directory / "with nan" / "model.safetensors", {"format": "pt"})


def load_together(world: World, directory: Path, model: Path) -> None:
    """Every process has its rows of what one process loads, and runs the same model."""
    for place in (model, directory / "renamed"):
        for dtype in (torch.float32, torch.bfloat16):
            notes: list[str] = []
            usual = load_model(str(place), dtype=dtype)
            own = load_divided(world, str(place), dtype=dtype, device="cpu", note=notes.append)
            assert len(notes) == (place != model), notes
            assert_divided(own.model, usual.model)
            assert own.fingerprint == model_fingerprint(usual.model)
            assert own.dtype == usual.dtype
            assert own.model.generation_config.to_dict() == usual.model.generation_config.to_dict()
            assert_runs_as(world, own.model, usual.model)
    assert "whole into the host's memory" in notes[0]
    frozen = load_divided(world, str(model), dtype=dtype, device="cpu", train_ends=False).model
    assert not frozen.lm_head.weight.requires_grad and frozen.model.norm.weight.requires_grad
    try:
        load_divided(world, str(directory / "with nan"), dtype=dtype, device="cpu")
    except CheckpointError as error:
        assert f"the tensor {NAN}" in str(error) and "[63, 3]" in str(error), error
    else:
        raise AssertionError("NaN was loaded")
    with patch.object(hold, "available_memory", lambda _: None if world.first else 0):
        try:
            with whole_in_each(world, frozen, "cpu"):
                raise AssertionError("there is no room in the second process")
        except ConfigError as error:
            assert "qatc generate-data" in str(error) and "--data" in str(error)
    release(frozen)
    assert is_released(frozen)


def assert_divided(model: Any, usual: Any) -> None:
    """Half of the rows of all parameters, bit for bit, and whole buffers."""
    pairs = zip(model.named_parameters(), usual.named_parameters(), strict=True)
    held = 0
    for (name, part), (other, whole) in pairs:
        rows, first = own_rows(part.detach()), first_row(part)
        assert name == other and rows.dtype == whole.dtype
        assert len(rows) <= -(-len(whole) // 2)
        assert torch.equal(rows, whole.detach()[first : first + len(rows)]), name
        held += rows.untyped_storage().nbytes()
    assert 2 * held <= 1.05 * sum(p.nbytes for p in usual.parameters())
    assert model.lm_head.weight is model.model.embed_tokens.weight
    for (name, buffer), (other, usual_one) in zip(
        model.named_buffers(), usual.named_buffers(), strict=True
    ):
        assert name == other and buffer.dtype == usual_one.dtype and torch.equal(buffer, usual_one)


@torch.no_grad()
def assert_runs_as(world: World, model: Any, usual: Any) -> None:
    """Together, and by itself while it is whole, as often as each process likes."""
    ids = torch.arange(16).view(2, 8)
    wanted = usual(input_ids=ids, use_cache=False).logits
    assert torch.equal(model(input_ids=ids, use_cache=False).logits, wanted)
    with whole_in_each(world, model, "cpu"):
        for _ in range(1 + world.rank):
            assert torch.equal(model(input_ids=ids, use_cache=False).logits, wanted)
    assert_sharded(model)
    assert torch.equal(model(input_ids=ids, use_cache=False).logits, wanted)


def assert_sharded(model: Any) -> None:
    whole = [name for name, p in model.named_parameters() if not hasattr(p, "to_local")]
    assert not whole, f"whole: {whole}"


@contextmanager
def never_whole() -> Iterator[None]:
    """Inside the block, a run fails that holds a whole model, or whole weights for long."""
    evaluate, gather = pair.evaluate_one, hold.gathered
    whole: list[weakref.ref[Tensor]] = []

    def refused(*_: Any, **__: Any) -> None:
        raise AssertionError("a whole model is loaded")

    def evaluated(setting: Any, both: Any, model: Any, rows: Any) -> Any:
        found = evaluate(setting, both, model, rows)
        assert_sharded(both.student)
        assert_sharded(both.teacher.model)
        return found

    def gathered(tensor: Any) -> Tensor:
        alive = sum(found() is not None for found in whole)
        assert current().first or not alive, f"{alive} whole weights"
        whole.append(weakref.ref(found := gather(tensor)))
        return found

    with ExitStack() as patched:
        for module in (pair, load):
            patched.enter_context(patch.object(module, "load_model", refused))
        patched.enter_context(patch.object(stages, "evaluate_one", evaluated))
        patched.enter_context(patch.object(writing, "gathered", gathered))
        yield
    assert whole, "nothing was packed"

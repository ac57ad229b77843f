"""What a training loop of one's own leaves is an output, as a run's is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import qatc
from qatc.errors import CheckpointError, ConfigError
from qatc.export import prepared
from qatc.output import QuantizedWeight, read_metadata
from qatc.recipe.recipe import Recipe
from tests.conftest import make_llama, make_tokenizer

IDS = torch.randint(2, 112, (2, 12), generator=torch.Generator().manual_seed(3))


def trained(recipe: Recipe, steps: int = 2) -> nn.Module:
    """A prepared model whose weights have moved."""
    model = make_llama()
    qatc.prepare(model, recipe, compile=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(steps):
        model(IDS, use_cache=False).logits.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe.from_bits("4-8-4", preset="best"),
        Recipe.from_bits("4-8-16", head_bits=8, embedding_bits=8, skip=("*o_proj*",)),
    ],
    ids=["best", "ends"],
)
def test_what_is_saved_computes_what_was_trained(recipe: Recipe, tmp_path: Path) -> None:
    model = trained(recipe)
    with torch.no_grad():
        wanted = model(IDS, use_cache=False).logits
    masters = {name: value.clone() for name, value in model.state_dict().items()}
    out = qatc.save(model, tmp_path / "out", tokenizer=make_tokenizer())
    for name, weight in qatc.load_codes(out).items():
        made = QuantizedWeight.from_state(masters, name, weight.spec)
        assert torch.equal(made.codes, weight.codes) and torch.equal(made.scale, weight.scale)
    loaded = qatc.load(out, dtype=torch.float32, compile=False)
    found = loaded(IDS, use_cache=False).logits
    assert (found - wanted).abs().max() <= 1e-3 * wanted.abs().max()
    assert loaded.config.use_cache and (out / "tokenizer.json").exists()
    with pytest.raises(ConfigError, match="not prepared"):
        qatc.restore(model)
    card = (out / "README.md").read_text()
    assert "quantization-aware-training" in card and "data-free" not in card
    assert "model" not in read_metadata(out)


def test_what_cannot_be_saved(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not prepared"):
        qatc.save(make_llama(), tmp_path / "out")
    with pytest.raises(ConfigError, match="is a transformers model, and this module is none"):
        qatc.save(nn.Linear(2, 2), tmp_path / "out")
    model = trained(Recipe.from_bits("4-8-16"), steps=1)
    with pytest.raises(ConfigError, match="run the model once"):
        qatc.save(model.train(), tmp_path / "out")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").touch()
    with pytest.raises(ConfigError, match="out"):
        qatc.save(model.eval(), tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]
    qatc.restore(model)  # it is still prepared


def test_adapters_are_to_be_merged_first(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = trained(Recipe.from_bits("4-8-16"))
    config = peft.LoraConfig(r=2, target_modules=["q_proj"])
    wrapped = peft.get_peft_model(model, config)
    for one in (wrapped, model):
        with pytest.raises(ConfigError, match="merge them into its weights first"):
            qatc.save(one, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_failure_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Learned scales are still there, and a second call writes them."""
    model = trained(Recipe.from_bits("4-8-4", preset="best"))

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    before = {name: value.clone() for name, value in model.state_dict().items()}
    with monkeypatch.context() as patched:
        patched.setattr(prepared, "write_output", full)
        with pytest.raises((OSError, CheckpointError)):
            qatc.save(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    qatc.save(model, tmp_path / "out")

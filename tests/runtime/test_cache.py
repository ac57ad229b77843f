"""The packed cache: the same logits in any pieces, of any length."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import DynamicCache, StaticCache

import qatc
from qatc.errors import CaptureError, ConfigError
from qatc.evaluation.parity import verify
from qatc.recipe.recipe import Recipe
from qatc.runtime.cache import SLOTS, PackedLayer, round_up
from tests.conftest import make_output
from tests.runtime.conftest import IDS, RECIPES, in_chunks, left_padded, logits, trained


@torch.no_grad()
@pytest.mark.parametrize("name", ["4-8-4", "4-8-16"])
def test_rows_of_different_lengths(outputs: dict[str, Path], name: str) -> None:
    lengths = [11, 4, 7]
    reference, model = trained(outputs[name]), qatc.load(outputs[name], compile=False)
    batch = left_padded(lengths)
    out = model(**batch, use_cache=True)
    new = IDS[:, 20:21]
    step = model(
        input_ids=new,
        attention_mask=torch.cat([batch["attention_mask"], torch.ones(3, 1, dtype=torch.long)], 1),
        position_ids=batch["position_ids"][:, -1:] + 1,
        past_key_values=out.past_key_values,
        use_cache=True,
    ).logits
    for row, length in enumerate(lengths):
        alone = torch.cat([IDS[row, :length], new[row]])[None]
        wanted = logits(reference, alone)[0]
        got = torch.cat([out.logits[row, -length:], step[row]])
        assert (got - wanted).abs().max().item() <= 1e-4 * wanted.abs().max().item()


def test_the_cache_is_packed_whoever_makes_it(outputs: dict[str, Path]) -> None:
    model = qatc.load(outputs["4-8-4"], compile=False)
    cache = DynamicCache()
    model(input_ids=IDS, past_key_values=cache, use_cache=True)
    assert all(isinstance(layer, PackedLayer) for layer in cache.layers)
    assert cache.get_seq_length() == 21
    cache.crop(-4)
    again = model(input_ids=IDS[:, 17:], past_key_values=cache, use_cache=True).logits
    wanted = logits(model, IDS)[:, 17:]
    assert (again - wanted).abs().max().item() <= 1e-4 * wanted.abs().max().item()
    with pytest.raises(CaptureError, match="StaticCache"):
        model(
            input_ids=IDS,
            past_key_values=StaticCache(model.config, max_cache_len=32),
            use_cache=True,
        )


def test_a_cache_of_another_batch(outputs: dict[str, Path]) -> None:
    model = qatc.load(outputs["4-8-4"], compile=False)
    cache = model(input_ids=IDS, use_cache=True).past_key_values
    with pytest.raises(CaptureError, match="holds 3 rows"):
        model(input_ids=IDS[:1, :1], past_key_values=cache, use_cache=True)
    cache.reset()
    got = model(input_ids=IDS[:1], past_key_values=cache, use_cache=True).logits
    wanted = logits(model, IDS[:1])
    assert (got - wanted).abs().max().item() <= 1e-4 * wanted.abs().max().item()


def test_no_slots_more_than_a_full_block() -> None:
    rounded = [round_up(n) for n in (1, SLOTS - 1, SLOTS, SLOTS + 1, 3 * SLOTS)]
    assert rounded == [SLOTS, SLOTS, SLOTS, 2 * SLOTS, 3 * SLOTS]


def test_a_cache_grows_past_its_window(outputs: dict[str, Path]) -> None:
    model = qatc.load(outputs["8-8-8"], compile=False)
    ids = torch.randint(2, 112, (2, 100), generator=torch.Generator().manual_seed(1))
    wanted = logits(model, ids)
    got = in_chunks(model, ids, [60] + [1] * 10 + [30])
    assert (got - wanted).abs().max().item() <= 1e-4 * wanted.abs().max().item()


@pytest.mark.parametrize("kind", ["mistral", "gemma3_text"])
def test_a_sliding_window_is_all_that_is_kept(kind: str, tmp_path: Path) -> None:
    window = 12
    settings: dict[str, Any] = {
        "vocab_size": 112, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
        "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 1, "sliding_window": 12,
    }  # fmt: skip
    if kind == "gemma3_text":
        settings |= {"head_dim": 8, "layer_types": ["sliding_attention", "full_attention"]}
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **settings)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    output = make_output(tmp_path / kind, RECIPES["4-8-4"], model)
    ids = torch.randint(2, 112, (2, 120), generator=torch.Generator().manual_seed(0))
    wanted = logits(trained(output), ids)
    lowered: Any = qatc.load(output, compile=False)
    for chunks in ([120], [90] + [1] * 30, [7, 30, 60, 3] + [1] * 20):
        got = in_chunks(lowered, ids, chunks)
        assert (got - wanted).abs().max().item() <= 1e-4 * wanted.abs().max().item()
    assert verify(output, reload=False).passed
    out = lowered(input_ids=ids, use_cache=True)
    sliding = out.past_key_values.layers[0]
    assert (sliding.length, sliding.forgotten) == (window - 1, 120 - window + 1)
    assert sliding.tensors[0].shape[2] <= 2 * 64 + 1 and sliding.get_seq_length() == 120
    with pytest.raises(CaptureError, match="cannot go back"):
        sliding.crop(-1)
    recorded = lowered(input_ids=ids[:, :5], use_cache=True).past_key_values
    recorded.activate_past_recording()
    lowered(input_ids=ids[:, 5:100], past_key_values=recorded, use_cache=True)
    recorded.crop(-40)
    got = in_chunks(lowered, ids[:, 60:], [20] + [1] * 40, recorded)
    assert (got - wanted[:, 60:]).abs().max().item() <= 1e-4 * wanted.abs().max().item()
    recorded.crop(-2)
    assert recorded.layers[0].length < window + 64 and recorded.get_seq_length() == 118
    guessed = {"max_new_tokens": 100, "prompt_lookup_num_tokens": 3, "eos_token_id": -1}
    plain = {"max_new_tokens": 100, "eos_token_id": -1, "do_sample": False}
    one = {"input_ids": ids[:1, :30], "attention_mask": torch.ones_like(ids[:1, :30])}
    assert torch.equal(lowered.generate(**one, **plain | guessed), lowered.generate(**one, **plain))
    if kind == "gemma3_text":
        assert out.past_key_values.layers[1].length == 120


@torch.no_grad()
@pytest.mark.parametrize("bits", ["4-8-4", "4-8-16"])
def test_no_tokens_are_an_error(bits: str, tmp_path: Path) -> None:
    model = qatc.load(make_output(tmp_path / "o", Recipe.from_bits(bits)), compile=False)
    ids = torch.randint(2, 112, (2, 3))
    cache = model(input_ids=ids, use_cache=True).past_key_values
    for past in (None, cache):
        with pytest.raises(ConfigError, match="called with no tokens"):
            model(input_ids=ids[:, :0], past_key_values=past, use_cache=True)
    assert model(input_ids=ids[:, :1], past_key_values=cache).logits.shape[:2] == (2, 1)

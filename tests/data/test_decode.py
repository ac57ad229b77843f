"""Decoding token by token gives the logits of one full forward."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from qatc.data.decode import decoding
from qatc.errors import CaptureError, QatcError
from qatc.models.preparation import can_compile
from tests.conftest import make_small


def full(model: Any, row: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(input_ids=row[None], use_cache=False).logits[0]
    return logits


def check_rows_at_different_positions(model: Any, *, compile: bool, length: int = 24) -> None:
    """Rows start in different steps, and a row starts anew in a slot that was used."""
    texts = torch.randint(3, 40, (3, 12), generator=torch.Generator().manual_seed(1))
    wanted = [full(model, text) for text in texts]
    starts = [0, 3, 5]
    with decoding(model, 3, length, compile=compile) as decoder:
        for step in range(12):
            positions = torch.tensor([(step - start) % 12 for start in starts])
            tokens = texts[torch.arange(3), positions]
            logits = decoder.step(tokens, positions, int(positions.max()))
            for row, start in enumerate(starts):
                if step >= start:
                    expected = wanted[row][positions[row]]
                    torch.testing.assert_close(logits[row], expected, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(full(model, texts[0]), wanted[0], atol=0, rtol=0)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_rows_at_different_positions(kv_heads: int) -> None:
    check_rows_at_different_positions(
        make_small("llama", num_key_value_heads=kv_heads), compile=False
    )


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("gpt_neox", {}),
        ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
        ("qwen3", {"head_dim": 16}),
        ("gemma", {"head_dim": 8}),
        ("starcoder2", {}),
    ],
)
def test_other_architectures(kind: str, changes: dict[str, Any]) -> None:
    check_rows_at_different_positions(make_small(kind, **changes), compile=False)


@pytest.mark.skipif(not can_compile(), reason="no C++ compiler")
def test_compiled_once_for_all_layers_windows_and_rows() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = make_small("llama", max_position_embeddings=96)
    text = torch.randint(3, 40, (4, 80), generator=torch.Generator().manual_seed(1))
    wanted = [full(model, row) for row in text]
    with decoding(model, 4, 96, compile=True) as decoder:
        for step in range(80):
            rows = 4 - step // 30
            logits = decoder.step(text[:rows, step], torch.full((rows,), step), step)
            for row in range(rows):
                torch.testing.assert_close(logits[row], wanted[row][step], atol=2e-5, rtol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_a_row_that_starts_anew_ignores_what_was_there() -> None:
    model = make_small("llama")
    one, other = torch.randint(3, 40, (2, 6), generator=torch.Generator().manual_seed(2))
    wanted = full(model, other)
    with decoding(model, 1, 8, compile=False) as decoder:
        for text in (one, other):
            steps = [
                decoder.step(token[None], torch.tensor([t]), t)[0] for t, token in enumerate(text)
            ]
    torch.testing.assert_close(torch.stack(steps), wanted, atol=2e-5, rtol=1e-5)


def test_a_row_that_moves_goes_on_where_it_is() -> None:
    model = make_small("llama")
    texts = torch.randint(3, 40, (3, 8), generator=torch.Generator().manual_seed(2))
    wanted = full(model, texts[2])
    with decoding(model, 3, 8, compile=False) as decoder:
        for t in range(5):
            decoder.step(texts[:, t], torch.full((3,), t), t)
        decoder.move(2, 0, 5)
        for t in range(5, 8):
            tokens = torch.stack([texts[2, t], texts[1, t]])
            logits = decoder.step(tokens, torch.full((2,), t), t)
            torch.testing.assert_close(logits[0], wanted[t], atol=2e-5, rtol=1e-5)


def test_caches_of_another_number_of_rows() -> None:
    model = make_small("llama")
    text = torch.randint(3, 40, (4,), generator=torch.Generator().manual_seed(2))
    wanted = full(model, text)
    with decoding(model, 1, 8, compile=False) as decoder:
        sizes = []
        for rows in (1, 5, 2):
            decoder.resize(rows)
            for t, token in enumerate(text):
                logits = decoder.step(token.repeat(rows), torch.full((rows,), t), t)
                torch.testing.assert_close(logits[-1], wanted[t], atol=2e-5, rtol=1e-5)
            sizes.append(decoder.row_bytes)
    # Two layers of K and V, two heads of 8 values in fp32, and a slot that is never read.
    assert sizes == [2 * 2 * 2 * 8 * 4 * (8 + 1)] * 3


@pytest.mark.parametrize("kind", ["mistral", "starcoder2"])
def test_a_sliding_window_shorter_than_the_cache_is_refused(kind: str) -> None:
    model = make_small(kind, sliding_window=8)
    with pytest.raises(CaptureError, match="window of 8 tokens.*use --max-length 8 or less"):
        with decoding(model, 2, 9, compile=False):
            raise AssertionError("entered")
    check_within_the_window(model)


def check_within_the_window(model: Any) -> None:
    text = torch.randint(3, 40, (8,), generator=torch.Generator().manual_seed(3))
    wanted = full(model, text)
    with decoding(model, 1, 8, compile=False) as decoder:
        for t, token in enumerate(text):
            logits = decoder.step(token[None], torch.tensor([t]), t)[0]
            torch.testing.assert_close(logits, wanted[t], atol=2e-5, rtol=1e-5)


def test_a_window_that_the_config_names_but_the_layers_do_not_use() -> None:
    """Qwen2 as it is published: sliding_window is set, use_sliding_window is not."""
    model = make_small("qwen2", sliding_window=8, use_sliding_window=False)
    check_rows_at_different_positions(model, compile=False)


def test_positions_in_the_attention_scores_are_refused() -> None:
    """BLOOM's ALiBi is no position embedding: a cache alone does not do."""
    config = AutoConfig.for_model("bloom", vocab_size=40, hidden_size=32, n_layer=1, n_head=4)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with pytest.raises(QatcError):
        with decoding(model, 1, 8, compile=False) as decoder:
            decoder.step(torch.tensor([3]), torch.tensor([0]), 0)


def test_the_model_is_as_it_was_after_an_error() -> None:
    model = make_small("llama")
    before = full(model, torch.tensor([3, 4, 5]))
    with pytest.raises(RuntimeError, match="on the way"):
        with decoding(model, 1, 8, compile=False):
            raise RuntimeError("on the way")
    assert not any("forward" in vars(module) for module in model.modules())
    assert torch.equal(full(model, torch.tensor([3, 4, 5])), before)


def test_a_cache_goes_with_its_decoder() -> None:
    model = make_small()
    gc.disable()  # what is in a cycle would stay
    try:
        with decoding(model, rows=2, length=8, compile=False) as decoder:
            decoder.step(torch.tensor([3, 4]), torch.tensor([0, 0]), 0)
            caches = [weakref.ref(cache) for cache in decoder._caches()]
            assert all(cache() is not None for cache in caches)
        del decoder
        assert caches and not any(cache() is not None for cache in caches)
    finally:
        gc.enable()

"""Replayed decoding steps, with something on the CPU in the place of CUDA graphs."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import DynamicCache

from qatc.recipe.recipe import Recipe
from qatc.report.usage import decoding_report
from qatc.runtime.cuda import arena, graphed
from tests.conftest import make_llama, make_output, make_small
from tests.runtime.conftest import RECIPES
from tests.runtime.replaying import IDS, graphed_and_plain, steps

pytestmark = pytest.mark.usefixtures("small_buckets")


def test_buckets_are_few_and_waste_little() -> None:
    arena_of = {n: arena.bucket(n) for n in range(1, 2000)}
    assert sorted(set(arena_of.values()))[:6] == [8, 16, 24, 32, 48, 64]
    assert all(found >= n and (n <= 8 or found < 2 * n) for n, found in arena_of.items())
    assert len(set(arena_of.values())) < 20


@pytest.mark.parametrize("name", ["4-8-4", "4-8-16", "4-8-K8V3"])
def test_replayed_steps_are_the_models_own(name: str, tmp_path: Path) -> None:
    model, forward, plain = graphed_and_plain(make_output(tmp_path / "o", RECIPES[name]))
    for rows in (1, 3):
        wanted = steps(plain, IDS[:rows], 5)
        assert torch.equal(steps(model, IDS[:rows], 5), wanted)
    # Buckets of 8 to 48 slots, and the memory of the cache grew in between.
    assert forward.reason is None and forward.recorded == 2 * 5 and forward.replayed == 2 * 30
    assert decoding_report(model).startswith("a CUDA graph of all layers")


def test_a_new_cache_needs_no_new_recording(tmp_path: Path) -> None:
    model, forward, plain = graphed_and_plain(make_output(tmp_path / "o", Recipe()))
    steps(model, IDS[:1], 5)
    recorded = forward.recorded
    for row in IDS[1:].split(1):
        assert torch.equal(steps(model, row[:, :30], 9), steps(plain, row[:, :30], 9))
    assert forward.recorded <= recorded + 3  # of shorter steps in the last memory, once


def test_caches_that_live_side_by_side_do_not_mix(tmp_path: Path) -> None:
    model, forward, plain = graphed_and_plain(make_output(tmp_path / "o", Recipe()))
    with torch.no_grad():
        caches = [
            [m(input_ids=row[:, :6], use_cache=True).past_key_values for m in (model, plain)]
            for row in IDS.split(1)
        ]
        for position in range(6, 20):
            for (mine, others), row in zip(caches, IDS.split(1), strict=True):
                new = row[:, position : position + 1]
                got, wanted = (
                    m(input_ids=new, past_key_values=cache, use_cache=True).logits
                    for m, cache in ((model, mine), (plain, others))
                )
                assert torch.equal(got, wanted)
    # Three caches for two places: recording them again and again is given up for a while.
    assert forward.reason is not None and "more often" in forward.reason
    assert "no CUDA graph: caches change" in decoding_report(model)


@torch.no_grad()
def test_copies_and_rewound_caches_go_on_from_where_they_are(tmp_path: Path) -> None:
    model, forward, plain = graphed_and_plain(make_output(tmp_path / "o", Recipe()))
    found = []
    for m in (model, plain):
        cache = m(input_ids=IDS[:2, :6], use_cache=True).past_key_values
        m(input_ids=IDS[:2, 6:7], past_key_values=cache, use_cache=True)
        copied, shared = copy.deepcopy(cache), copy.copy(cache)
        steps(m, IDS[:2, 7:12], 1, cache)
        cache.crop(-2)
        outs = [steps(m, IDS[:2, 12:20], 1, cache), steps(m, IDS[:2, 20:26], 1, copied)]
        cache.reorder_cache(torch.tensor([1, 0]))
        outs.append(steps(m, IDS[:2, 20:26], 1, cache))
        del cache, copied
        steps(m, IDS[:2], 30)  # another cache, while a copy has the memory of the first one
        outs.append(steps(m, IDS[:2, 26:30], 1, shared))
        found.append(torch.cat(outs, 1))
    assert torch.equal(*found) and forward.reason is None and forward.replayed > 20


def test_generate_writes_the_same(tmp_path: Path) -> None:
    model, forward, plain = graphed_and_plain(make_output(tmp_path / "o", Recipe()))
    for options in ({"do_sample": False}, {"do_sample": True}, {"num_beams": 3}):
        found = []
        for m in (plain, model):
            torch.manual_seed(0)
            found.append(m.generate(IDS[:2, :8], max_new_tokens=24, eos_token_id=None, **options))
        assert torch.equal(*found), options
    assert forward.reason is None and forward.replayed > 30


@torch.no_grad()
def test_other_calls_are_the_models_own(tmp_path: Path) -> None:
    model, forward, plain = graphed_and_plain(make_output(tmp_path / "o", Recipe()))
    padded = torch.ones((2, 11), dtype=torch.long)
    padded[1, :3] = 0
    for options in (
        {"attention_mask": padded},
        {"output_hidden_states": True},
        {"position_ids": torch.tensor([[3, 4]]), "input_ids": IDS[:2, 10:12]},
    ):
        caches = [m(input_ids=IDS[:2, :10], use_cache=True).past_key_values for m in (model, plain)]
        got, wanted = (
            m(**{"input_ids": IDS[:2, 10:11]} | options, past_key_values=cache).logits
            for m, cache in zip((model, plain), caches, strict=True)
        )
        assert torch.equal(got, wanted)
    assert forward.recorded == 0 and forward.reason is None


def test_own_positions_are_read(tmp_path: Path) -> None:
    model, forward, plain = graphed_and_plain(make_output(tmp_path / "o", Recipe()))
    positions = {"position_ids": torch.tensor([[17], [4]])}
    wanted = steps(plain, IDS[:2, :20], 5, **positions)
    assert torch.equal(steps(model, IDS[:2, :20], 5, **positions), wanted) and forward.replayed


def test_windows_are_replayed_while_all_is_in_sight(tmp_path: Path) -> None:
    small = make_small("mistral", sliding_window=12)
    model, forward, plain = graphed_and_plain(make_output(tmp_path / "o", Recipe(), small))
    ids = IDS[:2] % 40
    assert torch.equal(steps(model, ids, 5), steps(plain, ids, 5))
    assert forward.recorded == 2 and forward.replayed == 5  # of 12 tokens, the first 5 a prompt


def test_a_cache_that_knows_no_window_gets_the_models_own_steps(tmp_path: Path) -> None:
    small = make_small("mistral", sliding_window=12)
    model, forward, plain = graphed_and_plain(make_output(tmp_path / "o", Recipe(), small))
    ids = IDS[:2] % 40
    wanted = steps(plain, ids, 5)
    torch.testing.assert_close(steps(model, ids, 5, DynamicCache()), wanted, rtol=0.1, atol=0.1)
    assert torch.equal(steps(model, ids, 5, DynamicCache()), steps(plain, ids, 5, DynamicCache()))
    assert forward.recorded == 0 and forward.reason is None


def test_moved_parameters_are_recorded_anew(tmp_path: Path) -> None:
    model, forward, plain = graphed_and_plain(make_output(tmp_path / "o", Recipe()))
    steps(model, IDS[:1, :20], 5)
    recorded = forward.recorded
    model.model.norm.weight.data = 2 * model.model.norm.weight.data
    assert torch.equal(steps(model, IDS[:1, :20], 5), steps(plain, IDS[:1, :20], 5))
    assert forward.recorded == 2 * recorded


@torch.no_grad()
def test_replaced_parts_are_recorded_anew(tmp_path: Path) -> None:
    model, forward, plain = graphed_and_plain(make_output(tmp_path / "o", Recipe()))
    steps(model, IDS[:1, :12], 5)
    norm, recorded = model.model.norm, forward.recorded
    other = copy.deepcopy(norm)
    other.weight.mul_(2)
    twice = {"weight": 3 * norm.weight}
    for replace in (
        lambda: setattr(norm, "weight", nn.Parameter(2 * norm.weight, requires_grad=False)),
        lambda: norm.load_state_dict(twice, assign=True),
        lambda: setattr(model.model, "norm", other),
    ):
        replace()
        assert torch.equal(steps(model, IDS[:1, :12], 5), steps(plain, IDS[:1, :12], 5))
    assert forward.recorded == 4 * recorded


def test_hooks_are_heard(tmp_path: Path) -> None:
    model, forward, _ = graphed_and_plain(make_output(tmp_path / "o", Recipe()))
    steps(model, IDS[:1, :8], 5)
    heard: list[int] = []
    model.model.norm.register_forward_hook(lambda *_: heard.append(1))
    before = forward.replayed
    steps(model, IDS[:1, :12], 5)
    assert len(heard) == 8 and forward.replayed == before


def test_a_cache_of_inference_mode_goes_on_outside(tmp_path: Path) -> None:
    model, forward, plain = graphed_and_plain(make_output(tmp_path / "o", Recipe(), make_llama()))
    with torch.inference_mode():
        steps(model, IDS[:1, :20], 5)
    assert torch.equal(steps(model, IDS[:1, :20], 5), steps(plain, IDS[:1, :20], 5))
    assert forward.reason is None and forward.replayed > 10 and graphed.ARENAS == 2

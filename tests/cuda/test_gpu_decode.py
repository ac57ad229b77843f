"""On a GPU: replayed decoding steps against the model's own, and the loop that waits for none."""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import GenerationConfig, LogitsProcessorList

import qatc
from qatc.report.usage import decoding_report
from qatc.runtime.cuda.graphed import GraphedForward
from qatc.runtime.cuda.loop import decoding_loop
from qatc.runtime.forward import runtime_of
from qatc.runtime.generate_text import Writer
from tests.conftest import make_llama, make_output
from tests.runtime.conftest import RECIPES

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")

IDS = torch.randint(2, 112, (4, 900), generator=torch.Generator().manual_seed(3))


def model_of(folder: Path, name: str, **options: Any) -> Any:
    """A loaded model, whose context is long enough for several buckets."""
    small = make_llama(
        hidden_size=256, intermediate_size=512, head_dim=64, max_position_embeddings=2048
    )
    output = make_output(folder / name, RECIPES[name], small)
    settings: dict[str, Any] = {"device": "cuda", "compile": False, "decode_program": True}
    return qatc.load(output, **settings | options)


def graphed(model: Any) -> GraphedForward:
    decode = runtime_of(model).decode
    assert isinstance(decode, GraphedForward) and model.forward is decode
    return decode


@contextmanager
def waiting_is_an_error() -> Iterator[None]:
    """Inside the block, what makes the processor wait for the GPU raises."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@torch.no_grad()
def compare(model: Any, ids: Tensor, prompt: int) -> list[float]:
    """How far replayed steps are from the model's own, each from the very same cache."""
    own = copy.copy(model)
    own.__dict__.pop("forward")
    cache = own(input_ids=ids[:, :prompt], use_cache=True).past_key_values
    found = []
    for new in ids[:, prompt:].split(1, 1):
        other = copy.deepcopy(cache)
        wanted = own(input_ids=new, past_key_values=other, use_cache=True).logits.float()
        got = model(input_ids=new, past_key_values=cache, use_cache=True).logits.float()
        found.append(float((got - wanted).norm() / wanted.norm()))
    return found


@pytest.mark.parametrize("name", ["4-8-4", "8-8-8", "4-8-16", "groups"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_replayed_steps_are_the_models_own(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = model_of(tmp_path, name, dtype=dtype)
    limit = 1e-4 if dtype is torch.float32 else 2e-2
    for rows in (1, 4):
        differences = compare(model, IDS[:rows, :275].cuda(), 240)
        # A code on a rounding tie may fall the other way; a bug moves them all.
        near = sum(difference <= limit for difference in differences)
        assert near >= 0.85 * len(differences), differences
    decode = graphed(model)
    assert decode.reason is None, decode.reason
    assert decode.recorded >= 4 and decode.replayed >= 60


def test_compiled_steps_are_recorded(tmp_path: Path) -> None:
    model = model_of(tmp_path, "4-8-4", compile=True, dtype=torch.bfloat16)
    differences = compare(model, IDS[:1, :275].cuda(), 250)
    assert sum(d <= 2e-2 for d in differences) >= 0.85 * len(differences), differences
    assert graphed(model).reason is None, graphed(model).reason
    assert graphed(model).recorded == 2 and graphed(model).replayed == 23


@torch.no_grad()
def test_no_step_waits(tmp_path: Path) -> None:
    model = model_of(tmp_path, "4-8-4", dtype=torch.bfloat16)
    for rows in (1, 4):
        ids = IDS[:rows].cuda()
        cache = model(input_ids=ids[:, :20], use_cache=True).past_key_values
        token = model(input_ids=ids[:, 20:21], past_key_values=cache, use_cache=True).logits
        before = graphed(model).replayed
        with waiting_is_an_error():
            for _ in range(10):
                token = model(
                    input_ids=token[:, -1].argmax(-1, keepdim=True),
                    past_key_values=cache,
                    use_cache=True,
                ).logits
        assert graphed(model).replayed == before + 10
        assert cache.get_seq_length() == 31


@torch.no_grad()
def test_greedy_tokens_are_those_of_eager_decoding(tmp_path: Path) -> None:
    model = model_of(tmp_path, "4-8-4", dtype=torch.float32)
    own = copy.copy(model)
    own.__dict__.pop("forward")
    options = {"max_new_tokens": 300, "do_sample": False, "eos_token_id": None}
    for rows in (1, 4):
        ids = IDS[:rows, :200].cuda()
        got, wanted = model.generate(ids, **options), own.generate(ids, **options)
        for row in range(rows):
            differ = (got[row] != wanted[row]).nonzero()
            if len(differ):  # only where two tokens are as likely; the rest is another text
                place = int(differ[0])
                logits = own(input_ids=wanted[row : row + 1, :place]).logits[0, -1].float()
                ahead = logits[wanted[row, place]] - logits[got[row, place]]
                assert float(ahead) <= 0.05 * float(logits.std()), (row, place, float(ahead))
    assert graphed(model).reason is None and graphed(model).replayed > 500


@torch.no_grad()
def test_the_loop_waits_for_nothing_but_the_last_token(tmp_path: Path) -> None:
    model = model_of(tmp_path, "4-8-4", dtype=torch.float32)
    taken: list[int] = []

    def take(token: int) -> bool:
        taken.append(token)
        return False

    loop = decoding_loop(40, set(), take)
    ids = IDS[:1, :20].cuda()
    options: dict[str, Any] = {"max_new_tokens": 40, "eos_token_id": None}
    for do_sample in (False, True):
        found = []
        for way in ({}, {"custom_generate": loop}):
            torch.manual_seed(0)
            found.append(model.generate(ids, do_sample=do_sample, **options, **way))
        assert torch.equal(*found)
        assert taken[-40:] == found[0][0, 20:].tolist()
    taken.clear()
    gc.collect()
    with waiting_is_an_error():  # in the memory that the last text was in
        loop(model, ids, LogitsProcessorList(), None, GenerationConfig(do_sample=True))
    assert len(taken) == 40 and graphed(model).reason is None


@torch.no_grad()
@pytest.mark.parametrize("name", ["4-8-4", "4-8-16"])
def test_a_prefill_attends_in_a_fused_kernel(name: str, tmp_path: Path) -> None:
    model = model_of(tmp_path, name, dtype=torch.bfloat16)
    ids = IDS[:2, :300].cuda()
    wanted = model(input_ids=ids, use_cache=False).logits.float()
    with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):  # an error where it cannot be
        out = model(input_ids=ids[:, :200], use_cache=True)
        rest = model(input_ids=ids[:, 200:], past_key_values=out.past_key_values, use_cache=True)
    got = torch.cat([out.logits, rest.logits], 1).float()
    assert float((got - wanted).norm() / wanted.norm()) < 5e-2


def test_text_is_written(tmp_path: Path, tokenizer: Any) -> None:
    output = make_output(tmp_path / "o", RECIPES["4-8-4"], make_llama(), tokenizer)
    writer = Writer(output, device="cuda", compile=False, temperature=0.7, max_new_tokens=30)
    writer.ends = set()
    shown: list[str] = []
    written = writer.write("The old fox", shown.append)
    assert written.new_tokens == 30 and "".join(shown).endswith(written.text)
    assert written.decode_tokens_per_second is not None


def test_what_a_report_says(tmp_path: Path) -> None:
    assert decoding_report(model_of(tmp_path, "4-8-4")).startswith("a CUDA graph")

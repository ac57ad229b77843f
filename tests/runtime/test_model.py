"""Models that run on integers: they compute what was trained, however they are called."""

from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import TextStreamer

import qatc
from qatc.errors import CheckpointError, ConfigError, PassError
from qatc.kernels import native
from qatc.models.preparation import can_compile
from qatc.passes import pass_records
from qatc.report.usage import kernel_report, memory
from qatc.runtime.forward import runtime_of
from tests.conftest import make_llama, make_output
from tests.runtime.conftest import IDS, RECIPES, in_chunks, left_padded, logits, trained


@pytest.mark.parametrize("name", RECIPES)
def test_it_computes_what_was_trained(outputs: dict[str, Path], name: str) -> None:
    wanted = logits(trained(outputs[name]), IDS)
    model = qatc.load(outputs[name], compile=False)
    # amax / 127.5 puts the largest value of every row on a tie, where the last bit decides.
    tolerance = (0.05 if name == "full" else 1e-4) * wanted.abs().max().item()
    for got in (
        logits(model, IDS),
        in_chunks(model, IDS, [21]),
        in_chunks(model, IDS, [5, 9, 7]),
        in_chunks(model, IDS, [4] + [1] * 17),
        in_chunks(model, IDS[:1], [1] * 21),
    ):
        assert (got - wanted[: len(got)]).abs().max().item() <= tolerance


@pytest.mark.skipif(not can_compile(), reason="no C++ compiler")
def test_compiled_it_computes_the_same(outputs: dict[str, Path]) -> None:
    wanted = logits(trained(outputs["4-8-4"]), IDS)
    model = qatc.load(outputs["4-8-4"], compile=True)
    for got in (logits(model, IDS), in_chunks(model, IDS, [4] + [1] * 17)):
        assert (got - wanted).abs().max().item() <= 1e-4 * wanted.abs().max().item()


def test_nothing_keeps_a_float_copy(outputs: dict[str, Path]) -> None:
    model = qatc.load(outputs["4-8-4"], compile=False)
    names = [name for name, _ in [*model.named_parameters(), *model.named_buffers()]]
    assert not any(name.endswith("proj.weight") for name in names)
    assert sum(name.endswith("proj.weight_packed") for name in names) == 14
    held = memory(model)
    weights = 2 * (4 * 32 * 32 - 2 * 16 * 32 + 3 * 64 * 32)
    rows = 2 * (32 + 16 + 16 + 32 + 64 + 64 + 32)
    assert held.bf16_quantized == 2 * weights
    assert held.quantized == weights // 2 + 4 * rows
    assert held.cache_per_token == 2 * 2 * 2 * (4 + 4)
    assert held.bf16_cache_per_token == 2 * 2 * 2 * 8 * 2
    cache = model(input_ids=IDS, use_cache=True).past_key_values
    assert sum(layer.nbytes for layer in cache.layers) == 3 * 21 * held.cache_per_token


def test_four_bits_take_at_most_0_27_of_bf16(tmp_path: Path) -> None:
    big = make_llama(hidden_size=256, intermediate_size=512, num_hidden_layers=1)
    held = memory(qatc.load(make_output(tmp_path / "o", RECIPES["4-8-4"], big), compile=False))
    assert held.quantized <= 0.27 * held.bf16_quantized


def test_generate(outputs: dict[str, Path], capsys: Any, tokenizer: Any) -> None:
    model: Any = qatc.load(outputs["4-8-4"], compile=False)
    options: dict[str, Any] = {"max_new_tokens": 12, "eos_token_id": None, "pad_token_id": 0}
    prompt = {"input_ids": IDS[:1, :5], "attention_mask": torch.ones(1, 5, dtype=torch.long)}
    greedy = model.generate(**prompt, do_sample=False, **options)
    recomputed = model.generate(**prompt, do_sample=False, use_cache=False, **options)
    assert torch.equal(greedy, recomputed) and greedy.shape == (1, 17)
    for beams in (1, 3):
        padded = {k: v for k, v in left_padded([9, 4, 7]).items() if k != "position_ids"}
        batch = model.generate(**padded, do_sample=False, num_beams=beams, **options)
        for row, length in enumerate([9, 4, 7]):
            one = {"input_ids": IDS[row : row + 1, :length]}
            mask = torch.ones(1, length, dtype=torch.long)
            alone = model.generate(
                **one, attention_mask=mask, do_sample=False, num_beams=beams, **options
            )
            assert torch.equal(batch[row, -12:], alone[0, -12:])
    torch.manual_seed(0)
    streamer = TextStreamer(tokenizer)
    model.generate(**prompt, do_sample=True, streamer=streamer, **options)
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize("compile", [False, True])
def test_one_model_for_several_threads(outputs: dict[str, Path], compile: bool) -> None:
    """With masks and without, of different lengths and batches: no call sees another one's."""
    if compile and not can_compile():
        pytest.skip("no C++ compiler")
    model: Any = qatc.load(outputs["4-8-4"], compile=compile)

    def write(number: int) -> Tensor:
        ids = IDS[: 1 + number % 3, : 5 + 3 * number]
        mask = torch.ones_like(ids)
        mask[-1, : number % 2] = 0
        found: Tensor = model.generate(
            input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=12, eos_token_id=-1
        )
        return found

    # Graphs are captured by one thread first: torch.export is not safe beside others, see the docs.
    alone = [write(number) for number in range(2 if compile else 6)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(write, range(len(alone))))
    assert all(torch.equal(found, own) for found, own in zip(together, alone, strict=True))


ARCHITECTURES = ["qwen2", "gemma", "phi3", "gpt_neox"]


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_architectures(kind: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "vocab_size": 112, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
        "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 1,
    }  # fmt: skip
    if kind in ("opt", "gpt_neox"):
        settings.pop("num_key_value_heads")
    if kind == "opt":
        settings |= {"ffn_dim": 48, "word_embed_proj_dim": 32}
    else:
        settings |= {"head_dim": 8} if kind in ("gemma", "qwen3") else {}
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **settings)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    output = make_output(tmp_path / kind, RECIPES["4-8-4"], model)
    wanted = logits(trained(output), IDS)
    lowered = qatc.load(output, compile=False)
    for got in (logits(lowered, IDS), in_chunks(lowered, IDS, [6, 5] + [1] * 10)):
        assert (got - wanted).abs().max().item() <= 1e-4 * wanted.abs().max().item()


def test_reports(outputs: dict[str, Path]) -> None:
    model = qatc.load(outputs["4-8-4"], compile=False)
    uses = kernel_report(model)
    used = {(u.phase, u.kernel) for u in uses}
    if native.obstacle() is None:
        assert used == {("prefill", "packed product"), ("decode", "packed product")}
    else:
        assert used == {("prefill", "unpack + int_mm"), ("decode", "fused unpack")}
    assert len(uses) == 14 and uses[0].weight == "self_attn.q_proj.weight"
    template = next(iter(runtime_of(model).cached))
    passes = [record.name for record in pass_records(template.graph_module)]
    assert passes[-2:] == ["LowerLinear", "InsertKVCache"]


def test_the_projection_site_names_the_way_out(tmp_path: Path) -> None:
    recipe = dataclasses.replace(RECIPES["4-8-4"], kv_site="projection")
    output = make_output(tmp_path / "o", recipe)
    with pytest.raises(PassError, match="--kv-site cache"):
        qatc.load(output, compile=False)


def test_bad_input(tmp_path: Path, shared_model_path: Path) -> None:
    with pytest.raises(CheckpointError, match="qatc quantize"):
        qatc.load(shared_model_path)
    with pytest.raises(ConfigError, match=r"qatc\.load"):
        memory(make_llama())


def test_modules_that_another_thread_builds_meanwhile_are_its_own(
    outputs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loading builds without storage; whoever builds at the same time is none of its business."""
    found = []
    build: Any = transformers.AutoModelForCausalLM.from_config

    def slow(*args: Any, **kwargs: Any) -> Any:
        with ThreadPoolExecutor(1) as pool:
            found.append(pool.submit(torch.nn.Linear, 4, 4).result())
        return build(*args, **kwargs)

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_config", slow)
    with ThreadPoolExecutor(2) as pool:
        models = list(pool.map(lambda name: qatc.load(outputs[name], compile=False), ["4-8-4"] * 2))
    assert [linear.weight.device.type for linear in found] == ["cpu", "cpu"]
    assert torch.nn.Linear(4, 4).weight.device.type == "cpu"
    assert torch.equal(*(logits(model, IDS) for model in models))


def test_a_mixture_of_experts_whose_experts_are_skipped(tmp_path: Path) -> None:
    """Its routers were trained in float, and are written and run so."""
    config = transformers.MixtralConfig(
        vocab_size=112, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=4,
        max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    recipe = dataclasses.replace(RECIPES["4-8-4"], skip=("*lm_head*", "*embed*", "*.experts.*"))
    directory = make_output(tmp_path / "moe", recipe, model)
    loaded = qatc.load(directory, compile=False)
    wanted = logits(trained(directory), IDS)
    for got in (logits(loaded, IDS), in_chunks(loaded, IDS, [9, 12])):
        assert (got - wanted).abs().max().item() <= 1e-4 * wanted.abs().max().item()

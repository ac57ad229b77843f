"""Decoding programs: the same tokens as the graphs that they were translated from."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import qatc
from qatc.evaluation.parity import verify
from qatc.recipe.recipe import Recipe
from qatc.recipe.spec import QuantSpec
from qatc.report.usage import decoding_report
from qatc.runtime import program
from qatc.runtime.decode_program import DecodeProgram
from qatc.runtime.forward import runtime_of
from tests.conftest import make_llama, make_output

pytestmark = pytest.mark.skipif(program.obstacle() is not None, reason="no C compiler")

IDS = torch.randint(2, 112, (1, 40), generator=torch.Generator().manual_seed(3))
SIZES: dict[str, Any] = {
    "vocab_size": 112, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
    "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip


def make(kind: str, **changes: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **SIZES | changes)
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()


@torch.no_grad()
def compare(output: Path, ids: Tensor, prompt: int, dtype: torch.dtype) -> tuple[Tensor, float]:
    """Decode by graphs, and every step from the very same cache by a program.

    Returns:
        The largest difference of the logits, relative to their largest, for every step, and the
        share of codes of the first layer's cache that are other ones.
    """
    graphs = qatc.load(output, dtype=dtype, compile=False)
    programmed = qatc.load(output, dtype=dtype, compile=False, decode_program=True)
    decode = runtime_of(programmed).decode
    assert decode is not None and decode.program() is not None, decode and decode.reason
    cache = graphs(input_ids=ids[:, :prompt], use_cache=True).past_key_values
    differences, other = [], 0.0
    for new in ids[:, prompt:].split(1, 1):
        own = copy.deepcopy(cache)
        wanted = graphs(input_ids=new, past_key_values=cache, use_cache=True).logits
        got = programmed(input_ids=new, past_key_values=own, use_cache=True).logits
        assert got.shape == wanted.shape and got.dtype is wanted.dtype
        differences.append(float((got - wanted).abs().max() / wanted.abs().max()))
        assert own.get_seq_length() == cache.get_seq_length()
        for mine, others in zip(own.layers[0].tensors, cache.layers[0].tensors, strict=True):
            if not mine.is_floating_point():
                held = own.layers[0].length
                other += float((mine[:, :, :held] != others[:, :, :held]).double().mean())
    return torch.tensor(differences), other / len(differences)


def agrees(differences: Tensor, other: float, limit: float) -> bool:
    """A code on a rounding tie may fall the other way, and moves one step; a bug moves them all."""
    return bool((differences <= limit).double().mean() >= 0.85) and other <= 1e-3


RECIPES = ["4-8-4", "8-8-8", "3-6-2", "2-7-4", "5-5-8"]


KEYS_AND_VALUES: list[tuple[str, str | None, int | None]] = [
    ("4-8-4", "asymmetric", None),
    ("4-8-4", "full", None),
    ("4-8-4", "signed", None),
    ("4-8-8", None, 4),
    ("4-8-3", "asymmetric", 8),
    ("4-8-4", "full", 2),
]
"""Bits, the range of keys and values, and the bits of values where keys have others."""


@pytest.mark.parametrize(
    ("bits", "kv_range", "value_bits"), [*((b, None, None) for b in RECIPES), *KEYS_AND_VALUES]
)
def test_it_decodes_what_the_graphs_do(
    bits: str, kv_range: str | None, value_bits: int | None, tmp_path: Path
) -> None:
    recipe = Recipe.from_bits(bits, kv_range=kv_range, value_bits=value_bits)
    output = make_output(tmp_path / "o", recipe)
    assert agrees(*compare(output, IDS, 5, torch.float32), 1e-4)
    assert agrees(*compare(output, IDS, 5, torch.bfloat16), 2e-2)


@pytest.mark.parametrize(
    ("width", "bits", "value_bits"), [(64, 8, 4), (128, 8, 4), (128, 4, 4), (64, 8, 8), (64, 4, 8)]
)
def test_heads_of_the_usual_sizes(width: int, bits: int, value_bits: int, tmp_path: Path) -> None:
    """For which the program in C has loops of its own."""
    recipe = Recipe.from_bits(f"4-8-{bits}", value_bits=value_bits)
    output = make_output(tmp_path / "o", recipe, make_llama(head_dim=width))
    assert agrees(*compare(output, IDS, 5, torch.float32), 1e-4)


ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "mistral": {"sliding_window": 12},
    "gemma": {"head_dim": 8},
    "gemma3_text": {
        "head_dim": 8, "sliding_window": 12, "layer_types": ["sliding_attention", "full_attention"]
    },
    "phi3": {},
    "gpt_neox": {},
    "stablelm": {},
    "olmo2": {},
    "granite": {"logits_scaling": 2.0, "embedding_multiplier": 3.0},
    "starcoder2": {},
}  # fmt: skip


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_architectures(kind: str, tmp_path: Path) -> None:
    output = make_output(
        tmp_path / "o", Recipe.from_bits("4-8-4"), make(kind, **ARCHITECTURES[kind])
    )
    assert agrees(*compare(output, IDS, 5, torch.float32), 1e-4)


BUGS: dict[str, Any] = {
    "the position of the token before": lambda run: (
        lambda self, token, position, cache: run(self, token, max(0, position - 1), cache)
    ),
    "another token": lambda run: (
        lambda self, token, position, cache: run(self, (token + 1) % 112, position, cache)
    ),
    "logits of a float more": lambda run: (
        lambda self, token, position, cache: run(self, token, position, cache) * 1.5
    ),
}


@pytest.mark.parametrize("bug", BUGS)
def test_the_gate_finds_a_program_that_is_wrong(
    bug: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = make_output(tmp_path / "o", Recipe.from_bits("4-8-4"))
    monkeypatch.setattr(DecodeProgram, "__call__", BUGS[bug](DecodeProgram.__call__))
    failed = [c.what for c in verify(output, reload=False).checks if not c.passed]
    assert failed == ["the KL divergence of the decoding program from the graphs, step by step"]


@pytest.mark.parametrize("kv_range", [None, "asymmetric"])
def test_the_gate_passes_a_program_that_is_right(kv_range: str | None, tmp_path: Path) -> None:
    recipe = Recipe.from_bits("4-8-4", kv_range=kv_range)
    report = verify(make_output(tmp_path / "o", recipe), reload=False)
    assert report.passed and any("the decoding program" in c.what for c in report.checks)


def test_what_a_program_does_not_do_goes_to_the_graphs(tmp_path: Path) -> None:
    model = qatc.load(make_output(tmp_path / "o", Recipe.from_bits("4-8-4")), compile=False)
    programmed = qatc.load(tmp_path / "o", compile=False, decode_program=True)
    decode = runtime_of(programmed).decode
    assert decode is not None and decode.program() is not None
    calls: list[Any] = []
    program: Any = decode.program()
    program.program = calls.append
    seen: list[Any] = []
    mask = torch.ones(1, 6, dtype=torch.long)
    mask[0, 0] = 0
    with torch.no_grad():
        hook = programmed.model.norm.register_forward_hook(lambda *inputs: seen.append(inputs))
        cache = programmed(input_ids=IDS[:, :5], use_cache=True).past_key_values
        programmed(input_ids=IDS[:, 5:6], past_key_values=cache, use_cache=True)
        assert len(seen) == 2 and not calls
        hook.remove()
        programmed(input_ids=IDS[:, 6:7], past_key_values=cache, use_cache=True)
        assert len(calls) == 1
        # The second leaves hooks of transformers in the model, which the graphs then serve.
        for options in ({"attention_mask": mask}, {"output_hidden_states": True}):
            outs = []
            for each in (model, programmed):
                cache = each(input_ids=IDS[:, :5], use_cache=True).past_key_values
                new = IDS[:, 5:6]
                outs.append(each(input_ids=new, past_key_values=cache, use_cache=True, **options))
            assert torch.equal(outs[0].logits, outs[1].logits)
    assert len(calls) == 1


def test_a_cache_that_knows_no_window_goes_to_the_graphs(tmp_path: Path) -> None:
    output = make_output(
        tmp_path / "o", Recipe.from_bits("4-8-4"), make("mistral", sliding_window=12)
    )
    found = []
    for wanted in (False, True):
        model: Any = qatc.load(output, compile=False, decode_program=wanted)
        cache = transformers.DynamicCache()
        with torch.no_grad():
            outs = [model(input_ids=IDS[:, :10], past_key_values=cache, use_cache=True)]
            for new in IDS[:, 10:30].split(1, 1):
                outs.append(model(input_ids=new, past_key_values=cache, use_cache=True))
        found.append(torch.cat([out.logits for out in outs], 1))
    assert torch.equal(*found)


@torch.no_grad()
def test_a_program_of_other_parameters_is_not_used(tmp_path: Path) -> None:
    model: Any = qatc.load(
        make_output(tmp_path / "o", Recipe.from_bits("4-8-4")), compile=False, decode_program=True
    )
    own, norm = copy.copy(model), model.model.norm
    own.__dict__.pop("forward")
    cache = model(input_ids=IDS[:, :5], use_cache=True).past_key_values
    model(input_ids=IDS[:, 5:6], past_key_values=cache, use_cache=True)
    for replace in (
        lambda: norm.load_state_dict({"weight": 2 * norm.weight}, assign=True),
        lambda: setattr(model.model, "norm", copy.deepcopy(norm).requires_grad_(False)),
    ):
        replace()
        model.model.norm.weight.mul_(2)
        one, other = (
            m(input_ids=IDS[:, 6:7], past_key_values=copy.deepcopy(cache), use_cache=True).logits
            for m in (model, own)
        )
        assert torch.equal(one, other)


def test_generate_is_the_same(tmp_path: Path) -> None:
    output = make_output(tmp_path / "o", Recipe.from_bits("8-8-8"))
    options: dict[str, Any] = {"max_new_tokens": 90, "do_sample": False, "eos_token_id": None}
    prompt = {"input_ids": IDS[:, :5], "attention_mask": torch.ones(1, 5, dtype=torch.long)}
    models: list[Any] = [
        qatc.load(output, compile=False, decode_program=wanted) for wanted in (False, True)
    ]
    one, other = (model.generate(**prompt, **options) for model in models)
    assert torch.equal(one, other) and one.shape == (1, 95)


def test_why_there_is_no_program(tmp_path: Path) -> None:
    zeros = Recipe(QuantSpec(4), QuantSpec(8, range="affine"), QuantSpec(8))
    for recipe, why in (
        (Recipe.from_bits("4-8-16"), "K and V are not quantized"),
        (Recipe.from_bits("4-16-8"), "inputs are not quantized"),
        (zeros, "inputs with a zero point"),
    ):
        model = qatc.load(make_output(tmp_path / recipe.bits, recipe), compile=False)
        decode = runtime_of(model).decode
        assert decode is not None and decode.program() is None and why in str(decode.reason)
        assert why in decoding_report(model)
    assert "in C" in decoding_report(
        qatc.load(make_output(tmp_path / "c", Recipe.from_bits("4-8-4")))
    )

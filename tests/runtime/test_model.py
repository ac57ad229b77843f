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
from transformers import DynamicCache, StaticCache, TextStreamer

import qatc
from qatc.errors import CaptureError, CheckpointError, ConfigError, PassError
from qatc.evaluation.parity import verify
from qatc.kernels import native
from qatc.models.pipelines import recipe_allows_integers
from qatc.models.preparation import can_compile, prepare
from qatc.output import load_reference, open_output
from qatc.passes import pass_records
from qatc.recipe.recipe import Recipe
from qatc.recipe.spec import QuantSpec
from qatc.report.usage import kernel_report, memory
from qatc.runtime.cache import SLOTS, PackedLayer, round_up
from qatc.runtime.forward import SIGNATURES, runtime_of
from tests.conftest import make_llama, make_output

RECIPES = {
    "4-8-4": Recipe.from_bits("4-8-4"),
    "8-8-8": Recipe.from_bits("8-8-8"),
    "3-6-5": Recipe.from_bits("3-6-5"),
    "4-8-16": Recipe.from_bits("4-8-16"),
    "4-16-8": Recipe.from_bits("4-16-8"),
    "16-8-2": Recipe.from_bits("16-8-2"),
    "groups": dataclasses.replace(Recipe.from_bits("4-8-4"), weights=QuantSpec(4, 16)),
    "full": dataclasses.replace(
        Recipe.from_bits("4-8-8"),
        activations=QuantSpec(8, None, "full"),
        kv=QuantSpec(8, None, "full"),
    ),
}
IDS = torch.randint(2, 112, (3, 21), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> dict[str, Path]:
    """One output for every recipe."""
    root = tmp_path_factory.mktemp("outputs")
    return {
        name: make_output(root / name, recipe, tokenizer=tokenizer)
        for name, recipe in RECIPES.items()
    }


def trained(directory: Path) -> Any:
    """The graph that was trained, uncompiled, with its integer forward where it has one."""
    recipe = open_output(directory).recipe
    integers = recipe_allows_integers(recipe)
    return prepare(load_reference(directory), recipe, compile=False, integer_forward=integers)


@torch.no_grad()
def logits(model: Any, ids: Tensor, **options: Any) -> Tensor:
    result: Tensor = model(input_ids=ids, use_cache=False, **options).logits
    return result


@torch.no_grad()
def in_chunks(model: Any, ids: Tensor, chunks: list[int], cache: Any = None) -> Tensor:
    """The logits of a text that is fed in pieces, through a cache."""
    found, start = [], 0
    for size in chunks:
        out = model(input_ids=ids[:, start : start + size], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        found.append(out.logits)
        start += size
    return torch.cat(found, 1)


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


def left_padded(lengths: list[int]) -> dict[str, Tensor]:
    width = max(lengths)
    ids, mask = (
        torch.zeros(len(lengths), width, dtype=torch.long),
        torch.zeros(len(lengths), width, dtype=torch.long),
    )
    for row, length in enumerate(lengths):
        ids[row, width - length :] = IDS[row, :length]
        mask[row, width - length :] = 1
    return {
        "input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)
    }  # fmt: skip


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
    model = qatc.load(outputs["4-8-4"], compile=False)
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


@pytest.mark.parametrize("compile", [False, True])
def test_one_model_for_several_threads(outputs: dict[str, Path], compile: bool) -> None:
    """With masks and without, of different lengths and batches: no call sees another one's."""
    if compile and not can_compile():
        pytest.skip("no C++ compiler")
    model = qatc.load(outputs["4-8-4"], compile=compile)

    def write(number: int) -> Tensor:
        ids = IDS[: 1 + number % 3, : 5 + 3 * number]
        mask = torch.ones_like(ids)
        mask[-1, : number % 2] = 0
        found: Tensor = model.generate(
            input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=12, eos_token_id=-1
        )
        return found

    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(write, range(4 if compile else 6)))
    assert all(torch.equal(found, write(number)) for number, found in enumerate(together))


def test_a_model_that_was_cast_or_moved(outputs: dict[str, Path]) -> None:
    model = qatc.load(outputs["4-8-4"], compile=False)
    with pytest.raises(ConfigError, match=r"loaded for torch.float32 on cpu.*qatc\.load\(OUT"):
        model.to(torch.float64)(input_ids=IDS)


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
    window, settings = 12, {
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
    lowered = qatc.load(output, compile=False)
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


class Compiles:
    """Counts the graphs that Inductor gets."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, gm: Any) -> Any:
        def backend(graph: Any, example_inputs: Any) -> Any:
            self.count += 1
            return graph.forward

        return torch.compile(gm, backend=backend)


@torch.no_grad()
def compile_count(layers: int, directory: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    torch._dynamo.reset()
    output = make_output(directory, RECIPES["4-8-4"], make_llama(num_hidden_layers=layers))
    counter = Compiles()
    monkeypatch.setattr("qatc.runtime.forward.inductor", counter)
    model = qatc.load(output, compile=True, decode_program=False)
    for prompt in (5, 9, 30):
        model.generate(
            input_ids=IDS[:1, :1].expand(1, prompt).contiguous(), max_new_tokens=20,
            attention_mask=torch.ones(1, prompt, dtype=torch.long),
            do_sample=False, eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
    return counter.count


def test_prefill_and_decode_are_two_graphs_at_any_depth(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert compile_count(2, tmp_path / "2", monkeypatch) == 2
    assert compile_count(6, tmp_path / "6", monkeypatch) == 2


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
    build = transformers.AutoModelForCausalLM.from_config

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


def test_its_user_may_compile_a_loaded_model(outputs: dict[str, Path]) -> None:
    model = qatc.load(outputs["4-8-4"], compile=False)
    wanted = logits(model, IDS)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    assert torch.equal(logits(compiled, IDS), wanted)
    for got in (in_chunks(compiled, IDS, [9, 12]), in_chunks(compiled, IDS, [19, 1, 1])):
        assert (got - wanted).abs().max().item() <= 1e-4 * wanted.abs().max().item()


def test_hooks_inside_a_loaded_layer_are_refused(outputs: dict[str, Path]) -> None:
    model = qatc.load(outputs["4-8-4"], compile=False)
    model.model.layers[1].mlp.register_forward_hook(lambda *_: None)
    with pytest.raises(CaptureError, match=r"hooks on model\.layers\.1\.mlp, which"):
        logits(model, IDS)


def test_an_argument_that_changes_does_not_fill_the_memory(outputs: dict[str, Path]) -> None:
    model = qatc.load(outputs["4-8-4"], compile=False)
    wanted = logits(model, IDS[:, :4])
    for step in range(SIGNATURES + 5):
        assert torch.equal(logits(model, IDS[:, :4], items=step), wanted)
    runtime = runtime_of(model)
    assert all(len(forward._found) <= SIGNATURES + 1 for forward in runtime.forwards)
    assert len(list(runtime.scoring)) == 2, "with the argument and without it"


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

"""What inspect says about a tiny model, against figures worked out by hand.

The model of ``conftest``: 2 layers, hidden 32, MLP 64, 4 heads of size 8 over 2, vocabulary 112,
embeddings tied, fp32. The linears of a layer, as rows x inputs: q 32 x 32, k and v 16 x 32, o 32 x
32, gate and up 64 x 32, down 32 x 64.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import MixtralConfig, MixtralForCausalLM

from qatc.errors import CaptureError, ConfigError, PassError
from qatc.recipe.recipe import DEFAULT_SKIP, Recipe
from qatc.report.plan import inspect_model
from tests.conftest import make_llama, save

LINEARS = 1024 + 512 + 512 + 1024 + 2048 + 2048 + 2048
CHANNELS = 32 + 16 + 16 + 32 + 64 + 64 + 32
EMBEDDINGS, NORMS = 112 * 32, 5 * 32
LENGTH = 2048
ATTENTION = 2 * 2 * 4 * 8 * LENGTH**2
"""MACs of q @ k and of p @ v over both layers."""


def test_counts_and_sizes(shared_model_path: Path) -> None:
    plan = inspect_model(str(shared_model_path), Recipe())
    assert (plan.bits, plan.parameters) == ("4-8-4", 2 * LINEARS + EMBEDDINGS + NORMS)
    full = 4 * (2 * LINEARS + EMBEDDINGS + NORMS)
    packed = 2 * (LINEARS / 2 + 4 * CHANNELS) + 4 * (EMBEDDINGS + NORMS)
    assert plan.size_gb == pytest.approx((full / 1e9, packed / 1e9))
    # K and V of 2 heads of 8 values in 2 layers; 4 bits each and a scale of 2 bytes.
    assert plan.kv_bytes_per_token == (2 * 2 * 2 * 8 * 4, 2 * 2 * 2 * (4 + 4))
    other = inspect_model(str(shared_model_path), Recipe.from_bits("4-8-8", value_bits=4))
    assert other.bits == "4-8-K8V4"
    assert other.kv_bytes_per_token[1] == 2 * 2 * ((8 + 4) + (4 + 4))
    assert other.operations[1] - plan.operations[1] == ATTENTION * 16 * 2
    bits = {s.kind: s.bits for s in other.kinds[0].sites if s.kind in ("key", "value")}
    assert bits == {"key": 8, "value": 4}
    macs, head = 2 * LINEARS * LENGTH, EMBEDDINGS * LENGTH
    assert plan.operations == (
        (macs + ATTENTION + head) * 256,
        macs * 4 * 8 + ATTENTION * 16 * 4 + head * 256,
    )


def test_groups_cost_more_scales(shared_model_path: Path) -> None:
    plan = inspect_model(str(shared_model_path), Recipe.from_bits("8-8-16", group_size=16))
    packed = 2 * (LINEARS + 4 * LINEARS / 16) + 4 * (EMBEDDINGS + NORMS)
    assert plan.size_gb[1] == pytest.approx(packed / 1e9)
    assert plan.kv_bytes_per_token[0] == plan.kv_bytes_per_token[1]


def test_the_sites_of_a_layer(shared_model_path: Path) -> None:
    (kind,) = inspect_model(str(shared_model_path), Recipe()).kinds
    assert (kind.name, kind.layers) == ("LlamaDecoderLayer", ("model.layers.0", "model.layers.1"))
    q, k, v, o = (f"self_attn.{n}_proj" for n in "qkvo")
    inputs = {s.where: s.shape for s in kind.sites if s.kind == "input"}
    assert inputs == {
        f"{q}, {k}, {v}": ("B", "T", 32),
        o: ("B", "T", 32),
        "mlp.gate_proj, mlp.up_proj": ("B", "T", 32),
        "mlp.down_proj": ("B", "T", 64),
    }
    weights = {s.where: (s.shape, s.bits) for s in kind.sites if s.kind == "weight"}
    assert len(weights) == 7 and weights[f"{k}.weight"] == ((16, 32), 4)
    assert [(s.kind, s.shape, s.bits) for s in kind.sites[-2:]] == [
        ("key", ("B", 2, "T", 8), 4),
        ("value", ("B", 2, "T", 8), 4),
    ]
    assert [(r["name"], r["matched"]) for r in kind.passes[1:]] == [
        ("QuantizeLinearInputs", 4),
        ("QuantizeWeights", 7),
        ("QuantizeKV", 2),
    ]


def test_the_projection_site(shared_model_path: Path) -> None:
    plan = inspect_model(str(shared_model_path), Recipe.from_bits("16-16-8", kv_site="projection"))
    assert [(s.kind, s.where, s.shape, s.bits) for s in plan.kinds[0].sites] == [
        ("key", "the output of self_attn.k_proj.weight", ("B", "T", 16), 8),
        ("value", "the output of self_attn.v_proj.weight", ("B", "T", 16), 8),
    ]
    assert plan.kv_bytes_per_token[1] == 2 * 2 * (2 * 8 + 4)


def test_what_is_skipped_and_why(shared_model_path: Path) -> None:
    recipe = Recipe(skip=(*DEFAULT_SKIP, "*.layers.1.*"))
    plan = inspect_model(str(shared_model_path), recipe)
    assert [kind.layers for kind in plan.kinds] == [("model.layers.0",), ("model.layers.1",)]
    assert plan.skipped["model.embed_tokens.weight"] == "matches --skip *embed*"
    assert plan.skipped["model.layers.1.mlp.up_proj.weight"] == "matches --skip *.layers.1.*"
    assert plan.skipped["model.norm.weight"] == "not the weight of a linear layer"
    assert plan.operations[1] == (
        LINEARS * LENGTH * (4 * 8 + 256) + ATTENTION * 16 * 4 + EMBEDDINGS * LENGTH * 256
    )


def test_loads_no_weights(model_path: Path) -> None:
    (model_path / "model.safetensors").unlink()
    assert inspect_model(str(model_path), Recipe()).parameters > 0


def test_what_cannot_be_inspected(shared_model_path: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no model directory"):
        inspect_model(str(tmp_path / "absent"), Recipe())
    with pytest.raises(PassError, match="group_size 7 does not divide"):
        inspect_model(str(shared_model_path), Recipe.from_bits("4-8-4", group_size=7))


def test_a_model_without_capturable_layers(falcon_path: Path, tmp_path: Path) -> None:
    with pytest.raises((CaptureError, PassError), match="FalconDecoderLayer"):
        inspect_model(str(falcon_path), Recipe())


def test_a_wide_vocabulary_untied(tmp_path: Path) -> None:
    path = save(tmp_path / "untied", make_llama(200, tie_word_embeddings=False))
    plan = inspect_model(str(path), Recipe())
    assert plan.parameters == 2 * LINEARS + 2 * 200 * 32 + NORMS
    assert plan.skipped["lm_head.weight"] == "matches --skip *lm_head*"


def test_routers_have_a_line(tmp_path: Path) -> None:
    config = MixtralConfig(
        vocab_size=112, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=4,
    )  # fmt: skip
    path = save(tmp_path / "moe", MixtralForCausalLM(config))
    plan = inspect_model(str(path), Recipe(skip=(*DEFAULT_SKIP, "*.experts.*")))
    assert plan.skipped["model.layers.1.mlp.gate.weight"] == "the router of a mixture of experts"
    assert not any(site.where == "mlp.gate.weight" for site in plan.kinds[0].sites)


@pytest.mark.parametrize(
    ("head", "embedding", "ends"),
    [
        (8, 8, EMBEDDINGS + 4 * 112),
        (4, 4, EMBEDDINGS / 2 + 4 * 112),
        (8, 16, EMBEDDINGS + 4 * 112 + 4 * EMBEDDINGS),  # tied, and stored in two forms
    ],
)
def test_head_and_embedding(
    head: int, embedding: int, ends: float, shared_model_path: Path
) -> None:
    recipe = Recipe.from_bits("4-8-4", head_bits=head, embedding_bits=embedding)
    plan = inspect_model(str(shared_model_path), recipe)
    assert plan.ends_gb == pytest.approx((4 * EMBEDDINGS / 1e9, ends / 1e9))
    layers = 2 * (LINEARS / 2 + 4 * CHANNELS) + 4 * NORMS
    assert plan.size_gb[1] == pytest.approx((layers + ends) / 1e9)
    kinds = {kind.layers: kind.sites for kind in plan.kinds[1:]}
    sites = [(s.kind, s.shape, s.bits) for s in kinds["lm_head",]]
    assert sites == [("input", ("B", "T", 32), 8), ("weight", (112, 32), head)]
    if embedding != 16:
        (site,) = kinds["model.embed_tokens",]
        assert (site.kind, site.shape, site.bits) == ("embedding", ("B", "T", 32), embedding)
    assert len(kinds) == (1 if embedding == 16 else 2)
    assert ("model.embed_tokens.weight" in plan.skipped) == (embedding == 16)
    assert "lm_head.weight" not in plan.skipped
    plain = inspect_model(str(shared_model_path), Recipe.from_bits("4-8-4"))
    saved = EMBEDDINGS * LENGTH * (256 - head * 8)
    assert plain.operations[1] - plan.operations[1] == saved

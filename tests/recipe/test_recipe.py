from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from qatc.errors import ConfigError
from qatc.recipe.exceptions import Exceptions
from qatc.recipe.recipe import Recipe
from qatc.recipe.spec import VALID_BITS, QuantSpec
from qatc.recipe.weight_bits import describe

bits = st.sampled_from(VALID_BITS)
specs = st.builds(
    QuantSpec,
    bits=bits,
    group_size=st.none() | st.integers(min_value=1),
    range=st.sampled_from(["restricted", "full"]),
)
quantizing = specs.filter(lambda spec: spec.quantizes)
others = st.dictionaries(st.text(), bits).map(lambda found: tuple(found.items()))
coded = bits.filter(lambda own: own != 16)
cached = st.builds(Recipe, kv=st.builds(QuantSpec, bits=coded), value_bits=st.none() | coded)
recipes = st.builds(Recipe, weights=quantizing, weight_bits=others) | cached
recipes |= st.builds(
    Recipe,
    weights=specs,
    activations=specs,
    kv=specs,
    kv_site=st.sampled_from(["cache", "projection"]),
    skip=st.lists(st.text()).map(tuple),
    head=specs,
    embedding=specs,
)


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_default_is_the_recipe_of_the_paper() -> None:
    recipe = Recipe()
    assert recipe.bits == "4-8-4"
    assert recipe.kv_site == "cache"
    assert recipe == Recipe.from_bits("4-8-4")


@given(weights=bits, activations=bits, kv=bits, group_size=st.none() | st.integers(1, 4096))
def test_bits_spelling_round_trip(
    weights: int, activations: int, kv: int, group_size: int | None
) -> None:
    spelling = f"{weights}-{activations}-{kv}"
    recipe = Recipe.from_bits(spelling, group_size=group_size)
    assert recipe.bits == spelling
    assert recipe.weights == QuantSpec(weights, group_size=group_size)
    assert recipe.activations == QuantSpec(activations)
    assert recipe.kv == QuantSpec(kv)
    assert recipe.quantizes == (spelling != "16-16-16")


def test_head_and_embedding_are_off_unless_asked_for() -> None:
    assert not Recipe().head.quantizes and not Recipe().embedding.quantizes
    recipe = Recipe.from_bits("4-8-4", head_bits=8, embedding_bits=4, group_size=64)
    assert (recipe.head, recipe.embedding) == (QuantSpec(8), QuantSpec(4))
    assert recipe.bits == "4-8-4"
    assert Recipe.from_bits("16-16-16", head_bits=8).quantizes
    assert not Recipe.from_bits("16-16-16", head_bits=16).quantizes
    assert Recipe.from_dict({"head": {"bits": 8}}) == Recipe(head=QuantSpec(8))


def test_head_and_embedding_follow_the_weights_of_a_target() -> None:
    blocks = Recipe.from_bits("4-8-4", head_bits=8, target="llama.cpp")
    wanted = QuantSpec(8, 32, scale_dtype="float16")
    assert blocks.head == wanted and not blocks.embedding.quantizes
    assert Recipe.from_dict({"target": "llama.cpp", "head": {"bits": 8}}).head == wanted


def test_from_bits_takes_any_other_field() -> None:
    recipe = Recipe.from_bits(" 4-8-16 ", kv_site="projection", skip=("*.0.*",))
    assert (recipe.bits, recipe.kv_site, recipe.skip) == ("4-8-16", "projection", ("*.0.*",))


@pytest.mark.parametrize("spelling", ["", "4-8", "4-8-4-4", "w4-a8-kv4", "4,8,4", "4--8-4", "4-8-"])
def test_bad_spelling_is_quoted(spelling: str) -> None:
    with pytest.raises(ConfigError, match="such as 4-8-4") as raised:
        Recipe.from_bits(spelling)
    assert str(raised.value).endswith(f"got {spelling!r}")


def test_bad_bits_are_quoted() -> None:
    with pytest.raises(ConfigError, match="got 9$"):
        Recipe.from_bits("4-9-4")


def test_bad_kv_site_is_quoted_and_the_valid_ones_listed() -> None:
    with pytest.raises(ConfigError) as raised:
        Recipe(kv_site="heads")  # type: ignore[arg-type]
    assert str(raised.value) == "kv_site must be one of cache, projection; got 'heads'"


@pytest.mark.parametrize("site", ["activations", "kv"])
def test_only_weights_have_a_dtype_of_scales(site: str) -> None:
    spec = {"bits": 8, "scale_dtype": "float16"}
    assert Recipe.from_dict({"weights": spec}).weights.scale_dtype == "float16"
    with pytest.raises(ConfigError, match=f"{site}.scale_dtype is 'float16', and only the scales"):
        Recipe.from_dict({site: spec})


@pytest.mark.parametrize(
    ("plain", "message"),
    [
        ({"kv": {"bits": 8, "range": "affine"}}, "kv.range is 'affine', .* take 'asymmetric'"),
        ({"weights": {"bits": 8, "range": "affine"}}, "weights.range .*'full' or 'signed'"),
        ({"activations": {"bits": 8, "range": "asymmetric"}}, "take .*'affine', which has a zero"),
        (
            {"activations": {"bits": 8, "range": "affine", "group_size": 8}},
            "group_size is 8; leave",
        ),
        ({"activations": {"bits": 8, "range": "affine", "rounding": "reciprocal"}}, "of its own"),
    ],
)
def test_only_activations_have_a_zero_point(plain: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Recipe.from_dict(plain)


@pytest.mark.parametrize("skip", ["*lm_head*", ("ok", 3), None, 3])
def test_bad_skip_is_quoted(skip: Any) -> None:
    with pytest.raises(ConfigError) as raised:
        Recipe(skip=skip)
    assert str(raised.value) == (
        f"skip must be a tuple (in YAML a list) of name patterns; got {skip!r}"
    )


@pytest.mark.parametrize(
    ("name", "skipped"),
    [
        ("lm_head.weight", True),
        ("model.embed_tokens.weight", True),
        ("model.layers.0.mlp.up_proj.weight", True),
        ("model.layers.10.mlp.up_proj.weight", False),
        ("model.LM_HEAD.weight", False),
    ],
)
def test_skips_by_pattern(name: str, skipped: bool) -> None:
    recipe = Recipe()
    recipe = dataclasses.replace(recipe, skip=(*recipe.skip, "*.layers.0.*"))
    assert recipe.skips(name) is skipped


def test_the_first_pattern_that_matches_gives_a_weight_its_bits() -> None:
    recipe = Recipe(
        weights=QuantSpec(4, group_size=32, range="signed"),
        weight_bits=(("*.0.*.v_proj.*", 16), ("*.v_proj.*", 6), ("*.0.*", 3), ("*.1.*", 4)),
    )
    assert recipe.bits == "mixed-8-4"
    assert recipe.weights_of("h.1.attn.v_proj.weight") == QuantSpec(6, 32, "signed")
    assert recipe.weights_of("h.0.attn.k_proj.weight").bits == 3
    assert recipe.weights_of("h.10.attn.k_proj.weight") == recipe.weights
    assert recipe.skips("h.0.attn.v_proj.weight") and not recipe.skips("h.1.attn.v_proj.weight")
    names = ["attn.v_proj.weight", "attn.k_proj.weight", "lm_head.weight"]
    assert recipe.exceptions("h.0", names) == Exceptions(
        ("attn.v_proj.weight", "lm_head.weight"), (("attn.k_proj.weight", 3),)
    )
    assert recipe.exceptions("h.1", names) == Exceptions(
        ("lm_head.weight",), (("attn.v_proj.weight", 6),)
    )
    rotated = dataclasses.replace(recipe, rotate_inputs=("*_proj.weight",))
    assert rotated.exceptions("h.0", names).rotated == ("attn.k_proj.weight",)


def test_weight_bits_are_an_ordered_mapping_in_a_file(tmp_path: Path) -> None:
    text = "weights: {bits: 4}\nweight_bits:\n  '*.z.*': 8\n  '*.a.*': 3\n  '*': 5\n"
    recipe = Recipe.from_yaml(write(tmp_path / "recipe.yaml", text))
    assert recipe.weight_bits == (("*.z.*", 8), ("*.a.*", 3), ("*", 5))
    assert Recipe.from_yaml(write(tmp_path / "again.yaml", recipe.to_yaml())) == recipe


@pytest.mark.parametrize(
    ("plain", "message"),
    [
        ({"weight_bits": {"*.0.*": 9}}, "weight_bits of '*.0.*' must be 2 to 8, or 16 for not"),
        ({"weight_bits": {"*.0.*": True}}, "got True"),
        ({"weight_bits": ["*.0.*"]}, "in YAML a mapping, such as {'*.v_proj.weight': 6}"),
        ({"weight_bits": {3: 4}}, "got ((3, 4),)"),
        ({"weight_bits": None}, "got None"),
        ({"weights": {"bits": 16}, "weight_bits": {"*": 4}}, "give weights fewer bits"),
    ],
)
def test_bad_weight_bits_are_quoted(plain: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        Recipe.from_dict(plain)
    assert message in str(raised.value)


def test_a_pattern_of_weight_bits_stands_once() -> None:
    with pytest.raises(ConfigError, match="the pattern 'a' twice"):
        Recipe(weight_bits=(("a", 3), ("b", 4), ("a", 5)))


def test_many_weight_bits_are_counted_and_few_named() -> None:
    few = (("*.v_proj.*", 6), ("*.0.*", 16))
    assert describe(few, "`") == "`*.v_proj.*`: 6 bits, `*.0.*`: full precision"
    many = [(str(number), 3 if number % 3 else 16) for number in range(9)]
    assert describe(many) == "6 with 3 bits, 3 in full precision"
    assert describe([]) == ""


def test_skips_nothing_without_patterns() -> None:
    assert not Recipe(skip=()).skips("lm_head.weight")


@given(recipe=recipes)
def test_dict_round_trip_through_json(recipe: Recipe) -> None:
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe


@given(recipe=recipes)
def test_yaml_text_holds_the_dict(recipe: Recipe) -> None:
    assert yaml.safe_load(recipe.to_yaml()) == recipe.to_dict()


def test_yaml_file_round_trip(tmp_path: Path) -> None:
    recipe = Recipe.from_bits("3-8-4", group_size=64, kv_site="projection", skip=("*größe*",))
    assert Recipe.from_yaml(write(tmp_path / "recipe.yaml", recipe.to_yaml())) == recipe


def test_fields_left_out_have_their_defaults(tmp_path: Path) -> None:
    path = write(tmp_path / "recipe.yaml", "weights: {bits: 3}\nskip: []\n")
    assert Recipe.from_yaml(str(path)) == Recipe(weights=QuantSpec(3), skip=())


@pytest.mark.parametrize(
    ("plain", "message"),
    [
        (
            {"weigths": {}, "bits": 4},
            "unknown key 'weigths', 'bits' in recipe; valid keys: weights, activations, kv,"
            " kv_site, skip",
        ),
        (
            {"kv": {"bits": 4, "group": 32}},
            "unknown key 'group' in recipe.kv; valid keys: bits, group_size, range",
        ),
        ({"weights": 4}, "recipe.weights must be a mapping such as {bits: 4}; got 4"),
        (
            {"activations": None},
            "recipe.activations must be a mapping such as {bits: 4}; got None",
        ),
    ],
)
def test_bad_keys_are_named_and_the_valid_ones_listed(plain: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        Recipe.from_dict(plain)
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must be a mapping with the keys weights, activations, kv, kv_site, skip"),
        ("- 4\n", "must be a mapping"),
        ("weights: {bits: 4", "is not valid YAML"),
        ("weights: !!python/tuple [4]", "is not valid YAML"),
        ("skip: [2024-13-45]", "is not valid YAML"),
        ("weights: {bits: 5.5}", "got 5.5"),
        ("skip:", "got None"),
        ("1: 2", "unknown key '1'"),
    ],
)
def test_bad_recipe_file(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path / "recipe.yaml", text)
    with pytest.raises(ConfigError) as raised:
        Recipe.from_yaml(path)
    assert message in str(raised.value)


def test_unreadable_recipe_files_are_named(tmp_path: Path) -> None:
    binary = tmp_path / "recipe.yaml"
    binary.write_bytes(b"\xff\xfe\x00\x81")
    for path in (tmp_path / "absent.yaml", tmp_path, binary):
        with pytest.raises(ConfigError) as raised:
            Recipe.from_yaml(path)
        assert str(path) in str(raised.value)


def test_rotations(tmp_path: Path) -> None:
    recipe = Recipe.from_bits("4-4-4", rotate_inputs=("*.down_proj.weight",))
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe
    assert Recipe.from_yaml(write(tmp_path / "r.yaml", recipe.to_yaml())) == recipe
    assert recipe.rotates("model.layers.3.mlp.down_proj.weight")
    assert not recipe.rotates("model.layers.3.mlp.up_proj.weight")
    skipping = dataclasses.replace(recipe, skip=("*.3.*",))
    assert not skipping.rotates("model.layers.3.mlp.down_proj.weight")
    keys = dataclasses.replace(recipe, rotate_keys=True)
    assert Recipe.from_dict(json.loads(json.dumps(keys.to_dict()))) == keys
    assert not [key for key in Recipe().to_dict() if "rotate" in key], "older versions read it"


@pytest.mark.parametrize(
    ("bits", "changes", "says"),
    [
        ("16-4-4", {}, "16-4-4 leaves one of the two at 16 bits"),
        ("4-16-4", {}, "4-16-4 leaves one of the two at 16 bits"),
        ("4-4-16", {"target": "vllm"}, "the target vllm rotates no inputs of linear layers"),
        ("4-4-4", {"rotate_inputs": "*"}, "rotate_inputs must be a tuple"),
        ("4-4-16", {"rotate_keys": True}, "rotate_keys without quantized keys; give kv fewer bits"),
        ("4-4-4", {"rotate_keys": True, "kv_site": "projection"}, "take kv_site: cache"),
    ],
)
def test_rotations_that_are_none(bits: str, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Recipe.from_bits(bits, **{"rotate_inputs": ("*.down_proj.weight",)} | changes)

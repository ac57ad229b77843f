"""The packing against nibbles written by hand, and against the compressed-tensors package."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.pack_quantized import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import QuantizationConfig
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from qatc.errors import CheckpointError, ConfigError
from qatc.output.codes import QuantizedWeight
from qatc.output.compressed_tensors import find_float_linears, quantization_config
from qatc.output.layouts import from_tensors, to_tensors
from qatc.recipe.recipe import Recipe
from qatc.recipe.spec import QuantSpec

NAME = "model.layers.0.mlp.up_proj.weight"


def random_weight(spec: QuantSpec, rows: int, width: int, seed: int = 0) -> QuantizedWeight:
    """Every code of the range can occur, and scales of very different sizes."""
    draw = np.random.default_rng(seed)
    codes = draw.integers(spec.code_min, spec.code_max, (rows, width), endpoint=True)
    groups = 1 if spec.group_size is None else width // spec.group_size
    scale = torch.from_numpy(2.0 ** draw.uniform(-17, 4, (rows, groups))).bfloat16().float()
    return QuantizedWeight(torch.from_numpy(codes.astype(np.int8)), scale, spec)


def test_a_weight_is_a_value_that_stays_and_is_itself_alone() -> None:
    one, other = (random_weight(QuantSpec(4), 3, 8) for _ in range(2))
    assert len({one, one, other}) == 2 and one != other
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.codes = other.codes  # type: ignore[misc]


@st.composite
def weights(draw: st.DrawFn, bits: st.SearchStrategy[int]) -> QuantizedWeight:
    group_size = draw(st.none() | st.integers(1, 9))
    width = draw(st.integers(1, 40)) if group_size is None else group_size * draw(st.integers(1, 5))
    spec = QuantSpec(draw(bits), group_size, draw(st.sampled_from(["restricted", "full"])))
    return random_weight(spec, draw(st.integers(1, 6)), width, draw(st.integers(0, 2**32)))


ANY_WEIGHT = weights(st.integers(2, 8))
PACKED_WEIGHT = weights(st.integers(2, 4))


def reference_words(codes: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """code + 8, eight to a word, the first in the lowest bits, one at a time."""
    rows, width = codes.shape
    words = np.zeros((rows, (width + 7) // 8), dtype=np.uint32)
    for row in range(rows):
        for column in range(width):
            nibble = int(codes[row, column]) + 8
            words[row, column // 8] |= np.uint32(nibble << (4 * (column % 8)))
    return words.view(np.int32)


def reference_dequantize(weight: QuantizedWeight) -> np.ndarray[Any, Any]:
    codes, scale = weight.codes.numpy().astype(np.float64), weight.scale.double().numpy()
    return codes * np.repeat(scale, codes.shape[1] // scale.shape[1], axis=1)


def decompress(weight: QuantizedWeight, tensors: dict[str, Tensor]) -> Tensor:
    """The float weight as the compressed-tensors package makes it from our tensors and config."""
    plain = quantization_config(Recipe(weights=weight.spec), ignore=[])
    scheme = QuantizationConfig.model_validate(plain).config_groups["group_0"]
    local = {key.replace(NAME, "weight"): value for key, value in tensors.items()}
    compressor = BaseCompressor.get_value_from_registry(plain["format"])
    result: Tensor = compressor.decompress(local, scheme)["weight"]
    return result


@settings(deadline=None)
@given(ANY_WEIGHT, ANY_WEIGHT)
def test_unpack_inverts_pack(first: QuantizedWeight, second: QuantizedWeight) -> None:
    for weight in (first, second):
        mapping = {NAME: weight, "head.weight": dataclasses.replace(weight)}
        back = from_tensors(to_tensors(mapping), weight.spec)
        assert back.keys() == mapping.keys()
        for restored in back.values():
            assert torch.equal(restored.codes, weight.codes)
            assert restored.codes.dtype == torch.int8
            assert torch.equal(restored.scale, weight.scale)
            assert restored.scale.dtype == torch.float32
            assert restored.spec == weight.spec


@settings(deadline=None)
@given(PACKED_WEIGHT)
def test_packed_words_are_those_written_by_hand(weight: QuantizedWeight) -> None:
    packed = to_tensors({NAME: weight})[f"{NAME}_packed"]
    assert packed.dtype == torch.int32
    np.testing.assert_array_equal(packed.numpy(), reference_words(weight.codes.numpy()))


@settings(deadline=None)
@given(PACKED_WEIGHT)
def test_compressed_tensors_packs_and_unpacks_the_same_words(weight: QuantizedWeight) -> None:
    packed = to_tensors({NAME: weight})[f"{NAME}_packed"]
    assert torch.equal(packed, pack_to_int32(weight.codes, 4))
    assert torch.equal(unpack_from_int32(packed, 4, weight.codes.shape), weight.codes)


@settings(deadline=None)
@given(ANY_WEIGHT)
def test_compressed_tensors_dequantizes_to_code_times_scale(weight: QuantizedWeight) -> None:
    expected = reference_dequantize(weight)
    assert np.array_equal(decompress(weight, to_tensors({NAME: weight})).double().numpy(), expected)
    assert np.array_equal(weight.dequantize().double().numpy(), expected)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize(("width", "group_size"), [(16, None), (12, None), (7, None), (32, 4)])
def test_tensors_have_the_documented_names_shapes_and_bytes(
    bits: int, width: int, group_size: int | None
) -> None:
    tensors = to_tensors({NAME: random_weight(QuantSpec(bits, group_size), 5, width)})
    groups = 1 if group_size is None else width // group_size
    assert tensors[f"{NAME}_scale"].shape == (5, groups)
    if bits <= 4:
        assert tensors.keys() == {f"{NAME}_packed", f"{NAME}_scale", f"{NAME}_shape"}
        assert tensors[f"{NAME}_packed"].nbytes == 5 * 4 * ((width + 7) // 8)
        assert tensors[f"{NAME}_shape"].dtype == torch.int64
        assert tensors[f"{NAME}_shape"].tolist() == [5, width]
    else:
        assert tensors.keys() == {NAME, f"{NAME}_scale"}
        assert (tensors[NAME].dtype, tensors[NAME].shape) == (torch.int8, (5, width))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_scales_are_stored_in_the_dtype_of_the_model(dtype: torch.dtype) -> None:
    weight = random_weight(QuantSpec(4), 64, 8)
    stored = to_tensors({NAME: weight}, dtype=dtype)[f"{NAME}_scale"]
    assert stored.dtype == dtype
    assert torch.equal(stored.double(), weight.scale.double())


@pytest.mark.parametrize(
    ("value", "stored_dtype"),
    [
        (2.0**15, torch.float16),
        (2.0**16, torch.float32),
        (2.0**-17 * (1 + 2.0**-7), torch.float16),
        (2.0**-18 * (1 + 2.0**-7), torch.float32),
    ],
)
def test_scales_that_fp16_cannot_hold_are_stored_in_fp32(
    value: float, stored_dtype: torch.dtype
) -> None:
    scale = torch.tensor([[value], [1.0]])
    weight = QuantizedWeight(torch.zeros(2, 3, dtype=torch.int8), scale, QuantSpec(4))
    stored = to_tensors({NAME: weight}, dtype=torch.float16)[f"{NAME}_scale"]
    assert stored.dtype == stored_dtype
    assert torch.equal(stored.double(), scale.double())


def test_a_scale_that_is_not_snapped_is_a_bug() -> None:
    weight = random_weight(QuantSpec(4), 2, 8)
    weight.scale[0, 0] = 0.1
    with pytest.raises(AssertionError, match="not snapped"):
        to_tensors({NAME: weight})


@pytest.mark.parametrize(("bits", "code"), [(4, -8), (4, 8), (2, 2), (8, -128)])
def test_a_code_out_of_range_is_a_bug(bits: int, code: int) -> None:
    weight = random_weight(QuantSpec(bits), 2, 8)
    weight.codes[1, 3] = code
    with pytest.raises(AssertionError, match=f"{code}"):
        to_tensors({NAME: weight})


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("suffix", ["_scale", "_packed", "_shape", ""])
def test_a_missing_or_foreign_tensor_is_refused(bits: int, suffix: str) -> None:
    spec = QuantSpec(bits)
    tensors = to_tensors({NAME: random_weight(spec, 2, 8), "a.weight": random_weight(spec, 2, 8)})
    name = NAME + suffix
    if name in tensors:
        del tensors[name]
    else:
        tensors[name] = torch.zeros(2)
    with pytest.raises(CheckpointError, match=r"missing or left over.*up_proj") as error:
        from_tensors(tensors, spec)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("bits", "suffix", "value"),
    [
        (4, "_packed", torch.zeros(2, 2, dtype=torch.int32)),
        (4, "_packed", torch.zeros(2, 1)),
        (4, "_packed", torch.zeros(2, dtype=torch.int32)),
        (4, "_shape", torch.tensor([3, 8])),
        (4, "_shape", torch.tensor([2, 9])),
        (4, "_shape", torch.tensor([2, 8, 1])),
        (4, "_scale", torch.ones(2, 2)),
        (4, "_scale", torch.ones(2, 1, dtype=torch.int32)),
        (8, "", torch.zeros(2, 8)),
        (8, "", torch.zeros(3, 8, dtype=torch.int8)),
        (8, "_scale", torch.ones(2)),
    ],
)
def test_a_tensor_of_the_wrong_shape_or_dtype_is_refused(
    bits: int, suffix: str, value: Tensor
) -> None:
    spec = QuantSpec(bits)
    tensors = to_tensors({NAME: random_weight(spec, 2, 8)}) | {NAME + suffix: value}
    with pytest.raises(CheckpointError, match=f"{NAME} is damaged"):
        from_tensors(tensors, spec)


def test_quantization_config_of_packed_weights() -> None:
    arguments = {"type": "int", "symmetric": True}
    assert quantization_config(Recipe.from_bits("3-8-4", group_size=32), ["lm_head"]) == {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": arguments
                | {"num_bits": 4, "strategy": "group", "group_size": 32, "dynamic": False},
                "input_activations": arguments
                | {"num_bits": 8, "strategy": "token", "group_size": None, "dynamic": True},
                "output_activations": None,
                "format": "pack-quantized",
            }
        },
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
    }


def test_quantization_config_of_plain_weights() -> None:
    plain = quantization_config(Recipe.from_bits("6-16-16"), ["lm_head"])
    group = plain["config_groups"]["group_0"]
    assert plain["format"] == group["format"] == "int-quantized"
    assert group["weights"]["num_bits"] == 8
    assert group["weights"]["strategy"] == "channel"
    assert group["input_activations"] is None


@pytest.mark.parametrize("bits", ["4-8-4", "8-4-16", "5-16-8"])
def test_compressed_tensors_accepts_and_keeps_the_config(bits: str) -> None:
    plain = quantization_config(Recipe.from_bits(bits, group_size=8), ["lm_head"])
    read = QuantizationConfig.model_validate(plain).model_dump()
    assert {key: read[key] for key in plain} == plain


def test_float_linears_are_those_without_codes() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2), nn.Embedding(2, 2))
    assert find_float_linears(model, {"0.weight"}) == ["2"]


def test_codes_of_another_kind_of_layer_are_refused() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Bilinear(2, 2, 2))
    with pytest.raises(ConfigError, match=r"1\.weight belongs to a Bilinear.*skip"):
        find_float_linears(model, {"0.weight", "1.weight"})

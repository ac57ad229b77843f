from __future__ import annotations

import dataclasses
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qatc.errors import ConfigError, QatcError
from qatc.recipe.spec import (
    FLOAT_BITS,
    VALID_BITS,
    QuantSpec,
    read_spec_arg,
    rule_in_words,
    spec_arg,
)

quantizing_bits = st.sampled_from([b for b in VALID_BITS if b != FLOAT_BITS])


@pytest.mark.parametrize(
    ("bits", "range_", "code_min", "code_max", "steps"),
    [
        (2, "restricted", -1, 1, 1.0),
        (4, "restricted", -7, 7, 7.0),
        (4, "full", -8, 7, 7.5),
        (8, "restricted", -127, 127, 127.0),
        (8, "full", -128, 127, 127.5),
    ],
)
def test_codes_and_steps(
    bits: int, range_: Any, code_min: int, code_max: int, steps: float
) -> None:
    spec = QuantSpec(bits, range=range_)
    assert (spec.code_min, spec.code_max, spec.steps) == (code_min, code_max, steps)
    assert spec.quantizes


@given(bits=quantizing_bits, range_=st.sampled_from(["restricted", "full"]))
def test_the_range_spans_the_codes(bits: int, range_: Any) -> None:
    """max|x| and -max|x| lie half a step at most outside of the codes, in exact arithmetic."""
    spec = QuantSpec(bits, range=range_)
    codes = spec.code_max - spec.code_min + 1
    assert codes == 2**bits - (1 if range_ == "restricted" else 0)
    assert Fraction(spec.steps) * 2 == codes - 1
    assert -spec.steps - spec.code_min <= Fraction(1, 2)
    assert spec.steps - spec.code_max <= Fraction(1, 2)


def test_default_quantizes_nothing() -> None:
    assert QuantSpec() == QuantSpec(
        bits=16, group_size=None, range="restricted", scale_dtype="bfloat16"
    )
    assert not QuantSpec().quantizes


def test_is_frozen_and_hashable() -> None:
    spec = QuantSpec(4)
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.bits = 8  # type: ignore[misc]
    assert {spec: "same"}[QuantSpec(bits=4)] == "same"


@pytest.mark.parametrize("bits", [0, 1, 9, 15, 17, -4, True, "4", None, 4.5, 8.0, [4]])
def test_bad_bits_are_quoted(bits: Any) -> None:
    with pytest.raises(ConfigError) as raised:
        QuantSpec(bits)
    assert str(raised.value) == f"bits must be 2 to 8, or 16 for not quantized; got {bits!r}"


@given(bits=st.integers().filter(lambda b: b not in VALID_BITS))
def test_no_other_number_of_bits(bits: int) -> None:
    with pytest.raises(ConfigError):
        QuantSpec(bits)


@pytest.mark.parametrize("group_size", [0, -1, True, False, 32.0, "32", [32]])
def test_bad_group_sizes_are_quoted(group_size: Any) -> None:
    with pytest.raises(ConfigError, match="group_size must be a positive number") as raised:
        QuantSpec(4, group_size=group_size)
    assert str(raised.value).endswith(f"got {group_size!r}")


@given(group_size=st.integers(min_value=1))
def test_any_positive_group_size(group_size: int) -> None:
    assert QuantSpec(4, group_size=group_size).group_size == group_size


@pytest.mark.parametrize("range_", ["Full", "", None, 8, ["full"]])
def test_bad_ranges_are_quoted_and_the_valid_ones_listed(range_: Any) -> None:
    with pytest.raises(ConfigError) as raised:
        QuantSpec(4, range=range_)
    valid = "restricted, full, signed, asymmetric, affine"
    assert str(raised.value) == f"range must be one of {valid}; got {range_!r}"


@pytest.mark.parametrize("clip", ["learn", "", None, True])
def test_bad_clips_are_quoted_and_the_valid_ones_listed(clip: Any) -> None:
    with pytest.raises(ConfigError) as raised:
        QuantSpec(4, clip=clip)
    assert str(raised.value) == f"clip must be one of none, learned; got {clip!r}"


@pytest.mark.parametrize("scale_dtype", ["bf16", "float32", "", None, 16])
def test_bad_scale_dtypes_are_quoted_and_the_valid_ones_listed(scale_dtype: Any) -> None:
    with pytest.raises(ConfigError) as raised:
        QuantSpec(4, scale_dtype=scale_dtype)
    wanted = f"scale_dtype must be one of bfloat16, float16; got {scale_dtype!r}"
    assert str(raised.value) == wanted


def test_rules_in_words() -> None:
    assert rule_in_words(4, "restricted") == "codes -7 to 7, scale = max / 7"
    assert rule_in_words(4, "full") == "codes -8 to 7, scale = max / 7.5"
    assert rule_in_words(4, "signed") == "codes -8 to 7, scale = largest value / -8"
    asymmetric = "codes -8 to 7, scale = (max - min) / 15, and an offset beside it"
    assert rule_in_words(4, "asymmetric") == asymmetric
    affine = "codes -128 to 127, scale = (max - min) / 255, 0 between them, and a zero point"
    assert rule_in_words(8, "affine") == affine


def test_a_config_error_is_a_user_error_and_a_value_error() -> None:
    assert issubclass(ConfigError, QatcError) and issubclass(ConfigError, ValueError)


@given(
    st.builds(
        QuantSpec,
        bits=st.sampled_from(VALID_BITS),
        group_size=st.none() | st.integers(1, 4096),
        range=st.sampled_from(["restricted", "full", "signed", "asymmetric", "affine"]),
        clip=st.sampled_from(["none", "learned"]),
        scale_dtype=st.sampled_from(["bfloat16", "float16"]),
        rounding=st.sampled_from(["division", "reciprocal"]),
    )
)
def test_as_an_argument_and_back(spec: QuantSpec) -> None:
    assert read_spec_arg(spec_arg(spec)) == spec


def test_every_field_of_a_spec_goes_into_its_argument() -> None:
    """One that is added later must not be lost on the way into a graph."""
    others = {"group_size": 16, "range": "full", "scale_dtype": "float16", "rounding": "reciprocal"}
    others["clip"] = "learned"
    assert {"bits", *others} == {field.name for field in dataclasses.fields(QuantSpec)}
    plain = spec_arg(QuantSpec(4))
    assert plain == "int4"
    for name, value in others.items():
        argument = spec_arg(QuantSpec(4, **{name: value}))  # type: ignore[arg-type]
        assert argument == f"int4,{name}={value}"


@pytest.mark.parametrize("text", ["", "4", "int4,size=3", "int4,", "float8"])
def test_no_spec(text: str) -> None:
    with pytest.raises(ConfigError, match="is no spec"):
        read_spec_arg(text)

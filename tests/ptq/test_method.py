"""Names of methods, and their order."""

from __future__ import annotations

from dataclasses import replace

import pytest

from qatc.errors import ConfigError
from qatc.ptq import Method, parse_method, with_rotations
from qatc.recipe.recipe import Recipe


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("qat", Method((), True)),
        ("rtn", Method((), False)),
        ("gptq", Method(("gptq",), False)),
        ("rotate+smoothquant+gptq+qat", Method(("rotate", "smoothquant", "gptq"), True)),
    ],
)
def test_parsing(text: str, expected: Method) -> None:
    assert parse_method(text) == expected
    assert expected.name == text.removesuffix("qat").rstrip("+").replace("rtn", "")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("awq", "there is no 'awq'"),
        ("", "there is no ''"),
        ("rtn+qat", "there is no 'rtn'"),
        ("gptq+gptq", "a step stands twice"),
        ("gptq+rotate", r"write 'rotate\+gptq'"),
        ("qat+gptq", r"write 'gptq\+qat'"),
    ],
)
def test_refusals(text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        parse_method(text)


@pytest.mark.parametrize(
    ("method", "bits", "target", "rotates"),
    [
        ("rotate", "4-4-4", "qatc", True),
        ("rotate+gptq+qat", "4-7-16", "qatc", True),
        ("rotate", "4-8-4", "qatc", False),
        ("rotate", "4-16-4", "qatc", False),
        ("rotate", "16-4-4", "qatc", False),
        ("rotate", "4-4-16", "vllm", False),
        ("gptq", "4-4-4", "qatc", False),
    ],
)
def test_inputs_and_keys_are_rotated_where_that_is_of_use(
    method: str, bits: str, target: str, rotates: bool
) -> None:
    recipe = Recipe.from_bits(bits, target=target)
    chosen = with_rotations(recipe, parse_method(method))
    keys = rotates and recipe.kv.quantizes
    inputs = ("*.down_proj.weight",) if rotates else ()
    assert chosen == replace(recipe, rotate_inputs=inputs, rotate_keys=keys)
    own = Recipe.from_bits("4-4-4", rotate_inputs=("*.o_proj.weight",), rotate_keys=True)
    assert with_rotations(own, parse_method(method)) == own
    site = Recipe.from_bits("4-4-4", kv_site="projection")
    assert not with_rotations(site, parse_method(method)).rotate_keys

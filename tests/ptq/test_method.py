"""Names of methods, and their order."""

from __future__ import annotations

import pytest

from qatc.errors import ConfigError
from qatc.ptq import Method, parse_method


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

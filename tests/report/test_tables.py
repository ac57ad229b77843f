"""Rows that the report and the command line draw."""

from __future__ import annotations

from qatc.evaluation.checks import Check
from qatc.recipe import Recipe
from qatc.report.tables import check_rows, kernel_rows, memory_rows, recipe_rows
from qatc.report.usage import KernelUse, Memory

HELD = Memory(
    quantized=1234, other=9, cache_per_token=10, bf16_quantized=4936, bf16_cache_per_token=40
)


def test_memory_is_that_of_the_parts_that_there_are() -> None:
    assert memory_rows(HELD)[1:] == [
        ["quantized linears", "1,234", "4,936", "0.250"],
        ["KV cache, per token", "10", "40", "0.250"],
    ]
    with_ends = Memory(1234, 9, 10, 4936, 40, ends=3, bf16_ends=4)
    assert memory_rows(with_ends)[2] == ["quantized head and embedding", "3", "4", "0.750"]


def test_kernels_and_why_no_other() -> None:
    passed_over = (("one", "no processor"), ("two", "not for 3 bits"))
    use = KernelUse("Layer", "mlp.weight", (32, 64), "decode", "three", passed_over)
    assert kernel_rows([use])[1:] == [
        ["Layer", "mlp.weight", "32 x 64", "decode", "three"]
        + ["one: no processor; two: not for 3 bits"]
    ]


def test_checks_with_and_without_a_limit() -> None:
    checks = [Check("local", "a linear", 0.0123, 0.5), Check("global", "logits", float("nan"))]
    assert check_rows(checks)[1:] == [
        ["local: a linear", "0.012", "0.5"],
        ["global: logits", "nan", "reported"],
    ]


def test_scales_of_the_kv_cache_depend_on_its_site() -> None:
    def of(recipe: Recipe) -> dict[str, str]:
        return {name: value for name, value in recipe_rows(recipe.to_dict())}

    assert "one scale per token and head," in of(Recipe())["KV cache"]
    assert "one scale per token," in of(Recipe(kv_site="projection"))["KV cache"]
    assert "one scale per 32 values," in of(Recipe.from_bits("4-8-4", group_size=32))["weights"]
    assert "values in it" not in of(Recipe())
    assert of(Recipe(value_bits=2))["values in it"] == "2 bits"
    named = dict(recipe_rows(Recipe(skip=("*.a", "b")).to_dict(), "`")[1:])
    assert named["in full precision"] == "`*.a`, `b`"

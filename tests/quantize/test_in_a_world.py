"""Two processes make of a model what one does."""

from __future__ import annotations

from pathlib import Path

from tests.quantize.conftest import weights


def test_the_same_output_of_the_same_corpus(in_a_world: Path) -> None:
    """Generated, calibrated, trained with batches divided between them, and written."""
    alone, together = in_a_world / "quantized alone", in_a_world / "quantized"
    assert weights(together) == weights(alone)
    for file in ("manifest.json", *(f"shard-0000{number}.parquet" for number in range(5))):
        mine, other = (out.with_name(f"{out.name}.data") / file for out in (together, alone))
        assert mine.read_bytes() == other.read_bytes(), file
    names = {path.name for path in together.iterdir()}
    assert names == {path.name for path in alone.iterdir()}


def test_nothing_is_left(in_a_world: Path) -> None:
    beside = {path.name for path in in_a_world.glob("quantized*")}
    assert beside == {"quantized", "quantized.data", "quantized alone", "quantized alone.data"}

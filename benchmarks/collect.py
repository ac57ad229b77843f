"""Figures of runs made elsewhere, out of the outputs that they left, into one raw result.

    python -m benchmarks.collect NAME OUTPUT ...

Each output of ``qatc quantize`` says itself what it was asked for, on what device it was trained,
and what it reached; the curve is every 20th step of its ``metrics.jsonl``. The result is
``results/NAME.json``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from benchmarks import common

PLACES = ("model", "data", "eval_text")
"""Settings that are paths, of which only the last part is kept."""


def main() -> None:
    """Read the outputs and write the result."""
    name, *outputs = sys.argv[1:]
    runs = {Path(output).name: read(Path(output)) for output in outputs}
    file = common.RESULTS / f"{name}.json"
    file.write_text(json.dumps({"runs": runs}, indent=2) + "\n", encoding="utf-8")


def read(output: Path) -> dict[str, Any]:
    """What one output says of its run."""
    metadata = json.loads((output / "qatc.json").read_text())
    asked = metadata["run"]
    for place in PLACES:
        asked[place] = asked[place] and Path(asked[place]).name
    steps = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return {
        "device": metadata["device"],
        "versions": metadata["versions"],
        "asked": asked,
        "figures": metadata["figures"],
        "verified": metadata.get("parity", {}).get("passed"),
        "learning_rate": metadata["learning_rate"],
        "training_seconds": metadata["training_seconds"],
        "kl_by_step": {step["step"]: round(step["kl"], 5) for step in steps[19::20]},
    }


if __name__ == "__main__":
    main()

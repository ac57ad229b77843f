"""Quality at several bit widths: ``qatc quantize`` with its defaults, and what it reached.

    python benchmarks/quality.py --model DIR --bits 4-8-4 --bits 8-8-4

One corpus serves all runs. The result is added to ``results/quality-NAME.json``, where NAME is
the model's directory, with the command, the wall-clock time and every figure of the report.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import common


def main() -> None:
    """Run the benchmark and write its result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=str(common.ROOT / "examples/demo-model"))
    parser.add_argument("--bits", action="append", required=True)
    parser.add_argument("--keep", help="directory for the outputs; a temporary one by default")
    arguments, extra = parser.parse_known_args()
    name = f"quality-{Path(arguments.model).resolve().name}"
    file = common.RESULTS / f"{name}.json"
    runs: dict[str, Any] = json.loads(file.read_text())["runs"] if file.exists() else {}
    with tempfile.TemporaryDirectory(prefix="qatc-quality-") as scratch:
        base = Path(arguments.keep or scratch)
        for bits in arguments.bits:
            runs[bits] = run(arguments.model, bits, base, extra)
            summary = runs[bits]["figures"]["generated"]
            print(bits, {m: (v["perplexity"], v["kl"]) for m, v in summary.items()})
            common.save(name, {"model": common.display_path(arguments.model), "runs": runs})


def run(model: str, bits: str, base: Path, extra: list[str]) -> dict[str, Any]:
    """One ``qatc quantize``, on the corpus of the first one."""
    data = base / "corpus"
    generated = not data.exists()
    options = ["quantize", "--model", model, "--bits", bits, "--output", str(base / bits)]
    options += ["--data", str(data), "--json", *extra]
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "qatc.cli", *options], check=True, stdout=subprocess.PIPE, text=True
    )
    seconds = time.monotonic() - started
    metadata = json.loads((base / bits / "qatc.json").read_text())
    return {
        "command": " ".join(["qatc quantize --model MODEL --bits", bits, *extra]),
        "seconds": round(seconds, 1),
        "generated_corpus": generated,
        "figures": json.loads(done.stdout)["figures"],
        "training_seconds": metadata["training_seconds"],
        "learning_rate": metadata["learning_rate"],
        "compute_dtype": metadata["compute_dtype"],
    }


if __name__ == "__main__":
    main()

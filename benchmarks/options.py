"""What saves memory in training, and what it costs in quality: KL after equal steps.

    python -m benchmarks.options --model shared/models/stories260K --steps 150 --seeds 3

Of each seed the model writes a corpus once, with what is recorded of it; every row trains on that
by ``qatc quantize``, for the same steps and in the same order of the data. KL is that of held-out
sequences, against the model in full precision. Runs that compute the same numbers by another way
give the same KL, or nearly; the others lie within what seeds differ by, or they do not.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks import common, models

RECORDING = "32+32"
ALL = "all of them"

ROWS: dict[str, list[str]] = {
    "plain AdamW": [],
    "--loss-chunk 64": ["--loss-chunk", "64"],
    "--checkpoint-activations": ["--checkpoint-activations"],
    "--optimizer adamw8bit": ["--optimizer", "adamw8bit"],
    "--master-dtype bfloat16": ["--master-dtype", "bfloat16"],
    "--fused-step": ["--fused-step"],
    "--offload optimizer": ["--offload", "optimizer"],
    "--teacher recorded": ["--teacher", "recorded"],
}
ROWS[ALL] = [flag for flags in ROWS.values() for flag in flags]
"""What ``qatc quantize`` is told besides."""


def main() -> None:
    """Run the benchmark and write its result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--bits", default="4-8-4")
    parser.add_argument(
        "--dtype", default="bfloat16", choices=["bfloat16"], help="bf16 masters ask"
    )
    parser.add_argument("--rows", nargs="+", choices=[*ROWS], default=[*ROWS])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--side-by-side", type=int, default=1, help="seeds at a time, on a GPU")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--sequences", type=int, default=1536)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--name", help="of the result; default: the model's")
    arguments = parser.parse_args()
    model = models.find(arguments.model)
    name = f"options-{arguments.name or Path(model).resolve().name}"
    file = common.RESULTS / f"{name}.json"
    rows: dict[str, Any] = json.loads(file.read_text())["rows"] if file.exists() else {}
    one_at_a_time = threading.Lock()

    def run(seed: int) -> None:
        with tempfile.TemporaryDirectory(prefix="qatc-options-") as scratch:
            data = Path(scratch, "data")
            write(model, data, seed, arguments)
            for row in arguments.rows:
                kl = train(model, data, row, seed, arguments)
                with one_at_a_time:
                    rows.setdefault(row, {"kl": {}})["kl"][str(seed)] = kl
                    save(name, model, rows, arguments)

    with ThreadPoolExecutor(arguments.side_by_side) as pool:
        list(pool.map(run, range(arguments.seeds)))
    for row, found in rows.items():
        print(f"{row:28} {found['mean']:.4f} ± {found['deviation']:.4f}", flush=True)


def save(name: str, model: str, rows: dict[str, Any], arguments: argparse.Namespace) -> None:
    """Write what there is by now, with the mean and deviation over seeds."""
    for found in rows.values():
        values = list(found["kl"].values())
        found["mean"] = round(statistics.mean(values), 5)
        found["deviation"] = round(statistics.stdev(values), 5) if len(values) > 1 else 0.0
    named = ("bits", "dtype", "steps", "batch_size", "sequences", "length")
    settings = {name: getattr(arguments, name) for name in named}
    common.save(name, {"model": common.display_path(model), **settings, "rows": rows})


def write(model: str, data: Path, seed: int, arguments: argparse.Namespace) -> None:
    """Write the corpus of a seed, with what the teacher says of it."""
    options = ["--model", model, "--output", str(data), "--samples", str(arguments.sequences)]
    options += ["--max-length", str(arguments.length), "--seed", str(seed)]
    common.call(
        ["generate-data", *options, "--record-logits", RECORDING, "--dtype", arguments.dtype]
    )


def train(model: str, data: Path, row: str, seed: int, arguments: argparse.Namespace) -> float:
    """KL on held-out sequences after training."""
    output = data.with_name("output")
    options = ["--model", model, "--data", str(data), "--output", str(output), "--no-verify"]
    options += ["--bits", arguments.bits, "--steps", str(arguments.steps), "--seed", str(seed)]
    options += ["--max-length", str(arguments.length), "--samples", str(arguments.sequences)]
    options += ["--batch-size", str(arguments.batch_size), "--dtype", arguments.dtype]
    options += ["--eval-samples", str(arguments.sequences // 8), *ROWS[row], "--json"]
    (own,) = json.loads(common.call(["quantize", *options]))["figures"].values()
    shutil.rmtree(output)
    print(f"seed {seed}, {row}: RTN {own['RTN']['kl']:.4f}, QAT {own['QAT']['kl']:.4f}", flush=True)
    return float(own["QAT"]["kl"])


if __name__ == "__main__":
    main()

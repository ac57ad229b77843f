"""A recorded teacher beside one that runs: KL after equal steps, time of a step, bytes on the disk.

    python -m benchmarks.recorded --model shared/models/stories260K --record 32+32 --record 8+8

Of each seed, a corpus is written once, and every row trains on it by ``qatc quantize`` for the same
steps, in turn. KL is that of held-out sequences, against the model in full precision. A step's time
is the median of the run's, the first five left out. ``--steps 0`` measures bytes alone.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import common, models

ONLINE = "online"


def main() -> None:
    """Run the benchmark and write its result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--bits", default="4-8-4")
    parser.add_argument("--record", action="append", required=True, help="such as 32+32")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--sequences", type=int, default=2048)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--from-text", help="corpus of this text, instead of one that is written")
    parser.add_argument("--no-compile", action="store_true", help="KL alone, on a busy machine")
    parser.add_argument("--name", help="of the result; default: the model's")
    arguments = parser.parse_args()
    model = models.find(arguments.model)
    rows: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="qatc-recorded-") as scratch:
        for seed in range(arguments.seeds):
            for row in [*([ONLINE] if arguments.steps else []), *arguments.record]:
                data = Path(scratch) / f"{seed}-{row}"
                if (first := Path(scratch) / f"{seed}-{ONLINE}").exists():
                    shutil.copytree(first, data)
                own = rows.setdefault(row, {"kl": [], "step_seconds": []})
                found = write(model, data, row, seed, arguments)
                if "recorded" in found:
                    own["bytes_per_token"] = round(bytes_per_token(found["recorded"]), 1)
                if arguments.steps:
                    kl, seconds = train(model, data, row, seed, arguments)
                    own["kl"].append(kl)
                    own["step_seconds"].append(seconds)
                print(seed, row, own, flush=True)
                save(model, rows, arguments)


def save(model: str, rows: dict[str, Any], arguments: argparse.Namespace) -> None:
    """Write what there is by now."""
    named = ("bits", "steps", "sequences", "length", "no_compile")
    settings = {name: getattr(arguments, name) for name in named}
    name = arguments.name or f"recorded-{Path(model).resolve().name}"
    common.save(name, {"model": common.display_path(model), **settings, "rows": rows})


def write(model: str, data: Path, row: str, seed: int, arguments: argparse.Namespace) -> Any:
    """Write the corpus of a seed, or what a row records of it if it is there."""
    options = ["--model", model, "--output", str(data), "--samples", str(arguments.sequences)]
    options += ["--max-length", str(arguments.length)]
    if arguments.from_text:
        options += ["--from-text", arguments.from_text]
    else:
        options += ["--seed", str(seed), "--batch-size", "64"]
        options += ["--no-compile"] if arguments.no_compile else []
    options += [] if row == ONLINE else ["--record-logits", row]
    return json.loads(common.call(["generate-data", *options, "--json"]))


def bytes_per_token(recorded: Any) -> float:
    """Of what ``recorded.json`` says of a record."""
    files = recorded["files"]
    return float(sum(f["bytes"] for f in files) / sum(f["tokens"] for f in files))


def train(
    model: str, data: Path, row: str, seed: int, arguments: argparse.Namespace
) -> tuple[float, float]:
    """KL on held-out sequences after training, and seconds of a step."""
    output = data.with_name(f"{data.name}-output")
    options = ["--model", model, "--data", str(data), "--output", str(output), "--no-verify"]
    options += ["--bits", arguments.bits, "--steps", str(arguments.steps), "--seed", str(seed)]
    options += ["--max-length", str(arguments.length), "--samples", str(arguments.sequences)]
    options += ["--teacher", ONLINE if row == ONLINE else "recorded"]
    options += ["--no-compile"] if arguments.no_compile else []
    figures = json.loads(common.call(["quantize", *options, "--json"]))["figures"]
    (own,) = figures.values()
    lines = (output / "metrics.jsonl").read_text().splitlines()[5:]
    seconds = statistics.median(json.loads(line)["seconds"] for line in lines)
    return own["QAT"]["kl"], round(seconds, 5)


if __name__ == "__main__":
    main()

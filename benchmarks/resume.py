"""Kill a run with SIGKILL at random points, resume it, and compare the final weights.

    python -m benchmarks.resume --model examples/demo-model --kills 10

Both runs use the same settings: one runs through, the other is killed at a random time after every
start until the kills are used up. The weights must be equal byte for byte.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import common


def main() -> None:
    """Run the benchmark and write its result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=str(common.ROOT / "examples/demo-model"))
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--samples", type=int, default=256)
    arguments = parser.parse_args()
    base = Path(tempfile.mkdtemp(prefix="qatc-resume-"))
    try:
        result = compare(arguments, base)
    finally:
        shutil.rmtree(base)
    common.save("resume", result)
    sys.exit(0 if result["identical"] else 1)


def compare(arguments: argparse.Namespace, base: Path) -> dict[str, Any]:
    """One run through, one killed again and again."""
    command = [
        *(sys.executable, "-m", "qatc.cli", "quantize", "--model", arguments.model),
        *("--bits", "4-8-4", "--steps", str(arguments.steps), "--samples", str(arguments.samples)),
        *("--max-length", "128", "--eval-samples", "64", "--checkpoint-every", "10"),
        *("--generation-batch-size", "128"),
    ]
    started = time.monotonic()
    subprocess.run([*command, "--output", str(base / "through")], check=True, capture_output=True)
    through = time.monotonic() - started
    print(f"uninterrupted: {through:.0f} s")
    draw = random.Random(arguments.seed)
    kills: list[dict[str, Any]] = []
    output = base / "killed"
    while len(kills) < arguments.kills:
        after = draw.uniform(2.0, 20.0)
        process = subprocess.Popen(
            [*command, "--output", str(output)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            process.wait(timeout=after)
            break  # it finished before the kill
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        kills.append({"seconds": round(after, 2), **state(output)})
        print(f"kill {len(kills)}: {kills[-1]}")
    if not output.exists():
        subprocess.run([*command, "--output", str(output)], check=True, capture_output=True)
    hashes = {name: digest(base / name) for name in ("through", "killed")}
    print(hashes)
    return {
        "model": common.display_path(arguments.model),
        "command": " ".join(["qatc", *command[3:4], "--model", "MODEL", *command[6:]]),
        "uninterrupted_seconds": round(through, 1),
        "kills": kills,
        "sha256": hashes,
        "identical": hashes["through"] == hashes["killed"] and len(kills) == arguments.kills,
    }


def state(output: Path) -> dict[str, Any]:
    """How far a killed run had come."""
    data = output.with_name(output.name + ".data")
    partial = output.with_name(output.name + ".partial")
    checkpoints = sorted((partial / "checkpoints").glob("step-*[0-9]"))
    return {
        "shards": len(list(data.glob("*.parquet"))),
        "last_checkpoint": checkpoints[-1].name if checkpoints else None,
        "half_written": sorted(
            p.name for folder in (data, partial) for p in folder.rglob("*.writing")
        ),
    }


def digest(directory: Path) -> str:
    """Hash of the weights."""
    return hashlib.sha256((directory / "model.safetensors").read_bytes()).hexdigest()


if __name__ == "__main__":
    main()

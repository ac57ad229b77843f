"""Do several processes make of a model what one does, and does a run outlive one of them?

    python -m benchmarks.scale --model examples/demo-model --kills 5

On 1, 2 and 4 processes of one thread each, without a limit of the gradient: the corpus must be the
same byte for byte; the output is compared with that of one process which takes a batch in as many
parts as there are processes. They must give the same bytes. Then one of two processes is killed at
random points, and the same command is given again until it ends: the same bytes again. At last,
two finish what four began, and one what two began.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import common

BATCH = 8


def main() -> None:
    """Run the benchmark and write its result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=str(common.ROOT / "examples/demo-model"))
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--samples", type=int, default=256)
    arguments = parser.parse_args()
    base = Path(tempfile.mkdtemp(prefix="qatc-scale-"))
    try:
        result = Scale(arguments, base).measure()
    finally:
        shutil.rmtree(base)
    common.save("scale", result)


class Scale:
    """All runs of the benchmark.

    Args:
        arguments: of the command line.
        base: an empty directory.
    """

    def __init__(self, arguments: argparse.Namespace, base: Path) -> None:
        self.arguments, self.base = arguments, base
        self.data = base / "data-1"
        self.quantize = [
            *("quantize", "--model", arguments.model, "--bits", "4-8-4", "--no-compile"),
            *("--data", str(self.data), "--max-length", "128", "--gradient-clip", "1e9"),
            *("--steps", str(arguments.steps), "--checkpoint-every", "2", "--no-verify"),
            *("--eval-samples", "64"),
        ]

    def measure(self) -> dict[str, Any]:
        """Everything, one after the other."""
        corpora = {str(size): self.corpus(size) for size in (1, 2, 4)}
        together = {size: self.run(f"of-{size}", size) for size in (2, 4)}
        alone = {size: self.run(f"parts-{size}", 1, parts=size) for size in (1, 2, 4)}
        outputs = {
            str(size): {
                "seconds": together[size],
                "one_process_seconds": alone[size],
                **self.difference(f"of-{size}", f"parts-{size}"),
            }
            for size in (2, 4)
        }
        killed = self.killed()
        return {
            "model": common.display_path(self.arguments.model),
            "steps": self.arguments.steps,
            "batch": BATCH,
            "corpora": corpora,
            "same_corpora": len({c["sha256"] for c in corpora.values()}) == 1,
            "outputs": outputs,
            "whole_batch_in_one_pass": self.difference("of-2", "parts-1"),
            "killed": {"kills": killed, **self.difference("killed", "of-2")},
            "others_finish": {
                f"{before} to {after}": self.finished_by(before, after)
                for before, after in ((4, 2), (2, 1), (1, 2))
            },
        }

    def corpus(self, size: int) -> dict[str, Any]:
        """The teacher's corpus, of shards that are divided among processes."""
        output = self.base / f"data-{size}"
        command = [
            *("generate-data", "--model", self.arguments.model, "--output", str(output)),
            *("--samples", str(self.arguments.samples), "--max-length", "128", "--no-compile"),
            *("--shard-size", "32", "--batch-size", "32"),
        ]
        seconds = timed(start(command, size))
        content = b"".join(path.read_bytes() for path in sorted(output.glob("*.parquet")))
        found = {"seconds": seconds, "sha256": hashlib.sha256(content).hexdigest()}
        print(f"corpus by {size}: {found}")
        return found

    def command(self, name: str, parts: int = 1) -> list[str]:
        """A run, which takes a batch in one or more parts."""
        rows = ("--batch-size", str(BATCH // parts), "--accumulate", str(parts))
        return [*self.quantize, *rows, "--output", str(self.base / name)]

    def run(self, name: str, size: int, parts: int = 1) -> float:
        """Seconds of a whole run."""
        seconds = timed(start(self.command(name, parts), size))
        print(f"{name}: {seconds} s")
        return seconds

    def killed(self) -> list[dict[str, Any]]:
        """One of two processes is killed as often as asked for, at random points."""
        draw, kills = random.Random(self.arguments.seed), list[dict[str, Any]]()
        command = self.command("killed")
        for _ in range(self.arguments.kills):
            aim = draw.choice([0, *range(1, self.arguments.steps)])
            kills.append(self.kill_one(command, "killed", 2, aim, draw))
            print(f"kill {len(kills)}: {kills[-1]}")
        timed(start(command, 2))
        return kills

    def kill_one(
        self, command: list[str], name: str, size: int, aim: int, draw: random.Random
    ) -> dict[str, Any]:
        """Kill one process once a run has come to a step, or 0 for a time before the first."""
        process = start(command, size)
        patience = draw.uniform(1, 8) if aim == 0 else 0.0
        begun = time.monotonic()
        while process.poll() is None and (
            self.steps(name) < aim if aim else time.monotonic() - begun < patience
        ):
            time.sleep(0.02)
        ranks = children(process.pid) if size > 1 else [process.pid]
        while process.poll() is None and not ranks:
            time.sleep(0.02)
            ranks = children(process.pid)
        rank = draw.randrange(len(ranks)) if ranks else None
        if rank is not None:
            os.kill(ranks[rank], signal.SIGKILL)
        killed = time.monotonic()
        process.wait()
        return {
            "aim": f"step {aim}" if aim else f"{patience:.1f} s after the start",
            "process": rank,
            "steps_taken": self.steps(name),
            "seconds_until_all_ended": round(time.monotonic() - killed, 1),
        }

    def steps(self, name: str) -> int:
        """How many steps a run has taken so far."""
        file = self.base / f"{name}.partial" / "metrics.jsonl"
        return len(file.read_text().splitlines()) if file.exists() else 0

    def finished_by(self, before: int, after: int) -> dict[str, Any]:
        """A run that some processes began, and others finish, beside one of two all along."""
        name, draw = f"begun-{before}-{after}", random.Random(before)
        aim = self.arguments.steps // 2
        self.kill_one(self.command(name), name, before, aim, draw)
        begun = self.steps(name)
        timed(start(self.command(name), after))
        found = {"begun_at_least": begun, **self.difference(name, "of-2")}
        print(f"{name}: {found}")
        return found

    def difference(self, name: str, other: str) -> dict[str, Any]:
        """How much of two outputs differs: words of packed codes, and what is stored in float."""
        from safetensors.torch import load_file

        mine, others = (load_file(self.base / n / "model.safetensors") for n in (name, other))
        assert mine.keys() == others.keys()
        integers = [key for key, tensor in mine.items() if not tensor.is_floating_point()]
        floats = [key for key in mine if key not in integers]
        return {
            "codes_differing": sum(int((mine[k] != others[k]).sum()) for k in integers),
            "of": sum(mine[k].numel() for k in integers),
            "floats_differing": sum(int((mine[k] != others[k]).sum()) for k in floats),
            "by_at_most": max(
                float((mine[k].double() - others[k].double()).abs().max()) for k in floats
            ),
        }


def start(command: list[str], size: int) -> subprocess.Popen[str]:
    """Start qatc in so many processes, of one thread each."""
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(size)] if size > 1 else []
    return subprocess.Popen(
        [sys.executable, *launcher, "-m", "qatc", *command],
        env=common.alone(common.ROOT),
        cwd=common.ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def timed(process: subprocess.Popen[str]) -> float:
    """Seconds until a process has ended well."""
    started = time.monotonic()
    _, told = process.communicate()
    assert process.returncode == 0, told
    return round(time.monotonic() - started, 1)


def children(parent: int) -> list[int]:
    """Processes that a launcher has started, in order."""
    listed = Path(f"/proc/{parent}/task/{parent}/children")
    return [int(number) for number in listed.read_text().split()] if listed.exists() else []


if __name__ == "__main__":
    main()

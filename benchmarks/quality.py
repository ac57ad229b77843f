"""Quality at several bit widths: ``qatc quantize`` with its defaults, and what it reached.

    python -m benchmarks.quality --model smollm2-135m --bits 4-8-4 --bits 8-8-4
    python -m benchmarks.quality --bits 4-8-4 --held-out --samples 6144 --steps 5000 --lr 8e-4

Options that are not its own go to ``qatc quantize``. With ``--held-out`` the demonstration model is
evaluated as well on modules of the standard library that neither it nor its quantized form has
seen. Models of :mod:`benchmarks.models` go by name. One corpus serves all runs. The result is added
to ``results/quality-NAME.json``, where NAME is the model's directory, with the command, what it
printed (with times) and every figure of the report.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import common, models
from examples.train_demo_model import read_corpus

HELD_OUT = "held-out-modules.txt"


def main() -> None:
    """Run the benchmark and write its result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=str(common.ROOT / "examples/demo-model"))
    parser.add_argument("--bits", action="append", required=True)
    parser.add_argument("--data", help="corpus that is there already")
    parser.add_argument("--held-out", action="store_true", help="evaluate on held-out modules too")
    parser.add_argument("--keep", help="directory for the outputs; a temporary one by default")
    arguments, extra = parser.parse_known_args()
    model = models.find(arguments.model)
    name = f"quality-{Path(model).resolve().name}"
    file = common.RESULTS / f"{name}.json"
    runs: dict[str, Any] = json.loads(file.read_text())["runs"] if file.exists() else {}
    with tempfile.TemporaryDirectory(prefix="qatc-quality-") as scratch:
        base = Path(arguments.keep or scratch)
        data = Path(arguments.data or base / "corpus")
        text = Path(scratch) / HELD_OUT
        if arguments.held_out:
            text.write_text(held_out_modules(), encoding="utf-8")
            extra += ["--eval-text", str(text)]
        for bits in arguments.bits:
            runs[bits] = run(model, bits, base, data, extra)
            for name_of_text, of_text in runs[bits]["figures"].items():
                summary = {m: (v["perplexity"], v["kl"]) for m, v in of_text.items()}
                print(bits, name_of_text, summary)
            common.save(name, {"model": common.display_path(model), "runs": runs})


def held_out_modules() -> str:
    """What the demonstration model was not trained on, of this interpreter's own library."""
    return "\n".join(read_corpus(Path(sysconfig.get_path("stdlib")))[1])


def run(model: str, bits: str, base: Path, data: Path, extra: list[str]) -> dict[str, Any]:
    """One ``qatc quantize``, on the corpus of the first one."""
    generated = not data.exists()
    options = ["quantize", "--model", model, "--bits", bits, "--output", str(base / bits)]
    options += ["--data", str(data), "--json", *extra]
    started = time.monotonic()
    printed, log = call([sys.executable, "-m", "qatc.cli", *options])
    seconds = time.monotonic() - started
    metadata = json.loads((base / bits / "qatc.json").read_text())
    shown = [Path(option).name if "/" in option else option for option in extra]
    figures = json.loads(printed)["figures"]
    return {
        "command": " ".join(["qatc quantize --model MODEL --bits", bits, *shown]),
        "seconds": round(seconds, 1),
        "generated_corpus": generated,
        "figures": {Path(text).name: models for text, models in figures.items()},
        "recovery": {Path(text).name: recovered(models) for text, models in figures.items()},
        "parity": metadata["parity"],
        "training_seconds": metadata["training_seconds"],
        "learning_rate": metadata["learning_rate"],
        "compute_dtype": metadata["compute_dtype"],
        "log": [
            plain(line, {str(data): "CORPUS", str(base): "OUT", model: "MODEL"}) for line in log
        ],
    }


def plain(line: str, names: dict[str, str]) -> str:
    """A line without the paths of this machine."""
    for path, name in names.items():
        line = line.replace(path, name)
    return line


def call(command: list[str]) -> tuple[str, list[str]]:
    """Run a command and show what it says; its stdout, and the lines of its stderr."""
    log = []
    with tempfile.TemporaryFile("w+", encoding="utf-8") as out:
        with subprocess.Popen(command, stdout=out, stderr=subprocess.PIPE, text=True) as running:
            assert running.stderr is not None
            for line in running.stderr:
                print(line, end="", file=sys.stderr, flush=True)
                log.append(line.rstrip())
        if running.returncode:
            raise subprocess.CalledProcessError(running.returncode, command)
        out.seek(0)
        return out.read(), log


def recovered(models: dict[str, Any]) -> float | None:
    """Recovery of perplexity, in percent."""
    from qatc.evaluation.metrics import recovery

    full, rounded, trained = (models[m]["perplexity"] for m in ("full precision", "RTN", "QAT"))
    return recovery(full, rounded, trained)


if __name__ == "__main__":
    main()

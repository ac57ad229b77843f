"""Post-training methods and training beside each other, on text that no method has seen.

    python -m benchmarks.methods --model smollm2-135m --data CORPUS --bits 4-8-4 \\
        --text c4=c4_eval.jsonl --text wikitext2=wikitext2_raw_test.txt \\
        --row rtn --row smoothquant --row gptq --row rotate+gptq --row best:rtn --trained OUT

Every ``--row`` is ``[PRESET:]METHOD`` of ``qatc quantize``, calibrated on the first rows of one
corpus that the model has written; every ``--trained`` is an output that is there already, called by
the name of its directory. Each is then measured by ``qatc evaluate`` beside the model in full
precision: perplexity and KL on the first tokens of each text, in rows of ``--length``. Rows that
``results/methods-NAME.json`` has are measured anew, others stay.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import common, models

CALIBRATION = ("--eval-samples", "16", "--no-verify")
"""A method needs rows to calibrate on, and is measured afterwards."""


def main() -> None:
    """Run the benchmark and write its result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--bits", default="4-8-4")
    parser.add_argument("--data", required=True, help="corpus to calibrate on")
    parser.add_argument("--text", action="append", required=True, help="NAME=FILE")
    parser.add_argument("--row", action="append", default=[], help="[PRESET:]METHOD")
    parser.add_argument("--trained", action="append", default=[], help="output directory")
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--max-tokens", type=int, default=32768)
    parser.add_argument("--name", help="of the result; default: the model's and its bits")
    arguments = parser.parse_args()
    model = models.find(arguments.model)
    name = arguments.name or f"methods-{Path(model).resolve().name}-{arguments.bits}"
    file = common.RESULTS / f"{name}.json"
    rows: dict[str, Any] = json.loads(file.read_text())["rows"] if file.exists() else {}
    size = ["--length", str(arguments.length), "--max-tokens", str(arguments.max_tokens)]
    with tempfile.TemporaryDirectory(prefix="qatc-methods-") as scratch:
        texts = dict(map(split, arguments.text))

        def measure(row: str, output: str, teacher: tuple[str, ...]) -> None:
            rows[row] = {n: evaluate(output, text, [*size, *teacher]) for n, text in texts.items()}
            print(row, {n: (m["perplexity"], m["kl"]) for n, m in rows[row].items()}, flush=True)
            settings = {"bits": arguments.bits, "length": arguments.length}
            shown = {"model": common.display_path(model), **settings, "rows": rows}
            common.save(name, shown)

        teacher = ("--teacher", model)
        if "full precision" not in rows:
            measure("full precision", model, ())
        for row in arguments.row:
            output = str(Path(scratch) / "output")
            quantize(row, model, output, arguments)
            measure(row, output, teacher)
        for output in arguments.trained:
            measure(Path(output).name, output, teacher)


def split(text: str) -> tuple[str, str]:
    """``NAME=FILE``."""
    name, _, file = text.partition("=")
    return name, file


def quantize(row: str, model: str, output: str, arguments: argparse.Namespace) -> None:
    """Run a post-training method."""
    preset, _, method = row.rpartition(":")
    options = ["--model", model, "--bits", arguments.bits, "--preset", preset or "paper"]
    options += ["--method", method, "--data", arguments.data, *CALIBRATION]
    common.call(["quantize", *options, "--output", output, "--overwrite"])


def evaluate(output: str, text: str, options: list[str]) -> Any:
    """What ``qatc evaluate`` says of an output on a text."""
    return json.loads(common.call(["evaluate", output, "--text", text, "--json", *options]))


if __name__ == "__main__":
    main()

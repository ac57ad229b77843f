"""A model and its teacher on tasks of lm-eval, by ``qatc evaluate --tasks``.

    python -m benchmarks.tasks OUTPUT --teacher smollm2-135m --tasks paper --runtime packed \\
        --include-path ../shared/eval/tasks --limit 250 --raw packed.json

``--raw`` is where ``qatc evaluate`` writes all that lm-eval returned; what is there already is not
run again, and the file of another model can stand for the teacher. The result, scores, standard
errors and flips, is ``results/tasks-NAME.json``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks import common, models
from qatc.evaluation.evaluate import TaskComparison
from qatc.evaluation.scores import TaskResults


def main() -> None:
    """Run what has not been run, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", help="directory of an output of qatc quantize")
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--tasks", default="paper")
    parser.add_argument("--runtime", default="packed")
    parser.add_argument("--include-path")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--raw", required=True)
    parser.add_argument("--name", help="of the result; default: that of the output")
    parser.add_argument("--ran-on", help="where --raw is from, if not from this machine")
    arguments = parser.parse_args()
    if not Path(arguments.raw).exists():
        run(arguments)
    found = json.loads(Path(arguments.raw).read_text())
    if "teacher" not in found:
        both = (TaskResults.read(Path(file)) for file in (arguments.raw, arguments.teacher))
        found = TaskComparison(*both).to_dict()
    name = arguments.name or Path(arguments.output).name
    common.save(f"tasks-{name}", {"settings": settings(arguments), **compact(found)})


def run(arguments: argparse.Namespace) -> None:
    """Run ``qatc evaluate``."""
    options = {
        "--tasks": arguments.tasks,
        "--runtime": arguments.runtime,
        "--teacher": models.find(arguments.teacher),
        "--include-path": arguments.include_path,
        "--limit": arguments.limit,
        "--output": arguments.raw,
    }
    given = [str(p) for pair in options.items() if pair[1] is not None for p in pair]
    print(common.call(["evaluate", arguments.output, *given]))


def settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """What was asked for, with the names of places only."""
    asked = {name: getattr(arguments, name) for name in ("tasks", "runtime", "limit", "ran_on")}
    return {"model": Path(arguments.output).name, "teacher": Path(arguments.teacher).stem, **asked}


def compact(found: dict[str, Any]) -> dict[str, Any]:
    """Scores without each item's answer, and numerics without places."""
    plain = {name: value for name, value in found.items() if name != "lm_eval"}
    if "numerics" in plain:
        plain["numerics"] = {n: v for n, v in plain["numerics"].items() if n != "model"}
    if "teacher" in plain:
        plain["teacher"] = compact(plain["teacher"])
    return plain


if __name__ == "__main__":
    main()

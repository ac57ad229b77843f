"""Would the tests notice? Small faults planted, one at a time, in modules that must have none.

    python -m benchmarks.mutation --sample 25

`cosmic-ray <https://cosmic-ray.readthedocs.io>`_ (``pip install cosmic-ray``, in this environment
or, with ``--cosmic-ray COMMAND``, in another) turns a ``+`` into a ``-``, a ``<`` into a ``<=``,
drops a ``not`` and so on, and runs the module's tests. Of every module a sample is drawn by a fixed
seed. A fault with which all tests pass *survives*: the result lists each with its diff and, where
it is no hole in the tests, why. It is no part of CI.
"""

from __future__ import annotations

import argparse
import json
import random
import shlex
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks import common

TESTS = {
    "qatc/numerics/minmax.py": [
        "tests/numerics/test_minmax.py",
        "tests/numerics/test_minmax_compiled.py",
        "tests/models/test_preparation.py",
        "-k",
        "minmax or small_weights",
    ],
    "qatc/numerics/packing.py": ["tests/numerics/test_packing.py"],
    "qatc/kernels/cached_attention.py": ["tests/kernels/test_cached_attention.py"],
    "qatc/runtime/cache.py": ["tests/runtime/test_model.py", "tests/runtime/test_cache.py"],
    "qatc/data/sampling.py": ["tests/data/test_sampling.py"],
    "qatc/training/checkpoint.py": [
        "tests/training/test_checkpoint.py",
        "tests/training/test_distill.py",
        "tests/training/test_resume.py",
    ],
    "qatc/storage/directories.py": [
        "tests/storage/test_directories.py",
        "tests/storage/test_interrupted_replacement.py",
    ],
    "qatc/storage/files.py": ["tests/storage/test_files.py"],
    "qatc/quantize/settings.py": ["tests/quantize/test_settings.py"],
    "qatc/quantize/unfinished.py": ["tests/quantize/test_unfinished.py"],
    "qatc/output/codes.py": ["tests/output"],
    "qatc/output/compressed_tensors.py": ["tests/output"],
}
"""Modules, and the tests that are to notice."""

_ANNOTATION = "an annotation, which nothing evaluates"
_ENUM = "members of an enum are equal where they are the same"
WHY = {
    "    scale: float | None = None,": _ANNOTATION,
    "    def __init__(self, window: int | None = None) -> None:": _ANNOTATION,
    "def refuse_overlap(places: Mapping[str, Path], sources: Mapping[str, str | Path | None])"
    " -> None:": _ANNOTATION,
    "    if not path.exists() and markers.mark_of(replaced) is Mark.REPLACED:": _ENUM,
    "    if markers.mark_of(path) is Mark.REMOVING:": _ENUM,
    "    tensors: Mapping[str, Tensor], spec: QuantSpec, layout: str | None = None": _ANNOTATION,
    "    ends: Mapping[str, tuple[QuantSpec, QuantSpec, str]] | None = None,": _ANNOTATION,
    "        tensors.update(zip(tensor_names(name, layout), stored, strict=True))": "both have one"
    " length; a check of the code itself",
    "        if self.tensors and self.tensors[0].shape[0] != batch:": "both tensors have one batch",
    "    rows = max(1, _VALUES // logits.shape[1])": "a block's size, which changes no result",
}
"""Lines of which a changed one survived though the tests have no hole, and why."""

SECONDS = 300.0
"""After which a run of the tests counts as noticed: the fault made them hang."""


def main() -> None:
    """Run the benchmark and write its result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sample", type=int, default=25, help="faults per module")
    parser.add_argument("--module", action="append", choices=TESTS, help="these alone")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--cosmic-ray", default="cosmic-ray")
    options = parser.parse_args()
    modules = options.module or list(TESTS)
    file = common.RESULTS / "mutation.json"
    before: dict[str, Any] = json.loads(file.read_text())["modules"] if file.exists() else {}
    found = {module: before[module] for module in TESTS if module in before}
    with ThreadPoolExecutor(options.jobs) as pool:
        for module, result in zip(
            modules, pool.map(lambda m: run(m, options), modules), strict=True
        ):
            found[module] = result
            print(module, {key: result[key] for key in ("planted", "noticed")}, flush=True)
            common.save("mutation", {"seed": options.seed, "total": total(found), "modules": found})


def total(modules: dict[str, Any]) -> dict[str, Any]:
    """The score of all modules."""
    planted, noticed = (sum(m[key] for m in modules.values()) for key in ("planted", "noticed"))
    return {"planted": planted, "noticed": noticed, "share": round(noticed / max(1, planted), 3)}


def run(module: str, options: argparse.Namespace) -> dict[str, Any]:
    """Plant a sample of faults in a copy of the project."""
    with tempfile.TemporaryDirectory(prefix="qatc-mutation-") as scratch:
        copy, session = Path(scratch) / "project", Path(scratch) / "session.sqlite"
        ignored = shutil.ignore_patterns(".git", ".venv", "build", "*.egg-info", "__pycache__")
        shutil.copytree(common.ROOT, copy, symlinks=True, ignore=ignored)
        pytest = [sys.executable, *"-m pytest -x -q -p no:cacheprovider".split()]
        tests = shlex.join([*pytest, *TESTS[module]])
        config = Path(scratch) / "config.toml"
        config.write_text(
            f'[cosmic-ray]\nmodule-path = "{module}"\ntimeout = {SECONDS}\nexcluded-modules = []\n'
            f'test-command = "{tests}"\n[cosmic-ray.distributor]\nname = "local"\n'
        )

        def call(*arguments: str) -> str:
            done = subprocess.run(
                [options.cosmic_ray, *arguments], cwd=copy, text=True, env=common.alone(copy),
                capture_output=True,
            )  # fmt: skip
            if done.returncode:
                raise SystemExit(f"{module}: {arguments[0]} failed:\n{done.stdout}{done.stderr}")
            return done.stdout

        call("init", str(config), str(session))
        call("baseline", str(config))  # the tests pass where nothing is planted
        possible = keep_some(session, options.sample, options.seed)
        call("exec", str(config), str(session))
        items = [json.loads(line) for line in call("dump", str(session)).splitlines()]
    survivors: list[dict[str, Any]] = []
    for item, result in items:
        if result["test_outcome"] == "survived":
            lines = changed_lines(result["diff"])
            place = item["mutations"][0]["start_pos"][0]
            survivors.append({"line": place, "diff": lines, "why": why(lines)})
    return {
        "tests": TESTS[module],
        "possible": possible,
        "planted": len(items),
        "noticed": len(items) - len(survivors),
        "survived": survivors,
    }


def why(lines: list[str]) -> str:
    """Why a fault of these lines is no hole in the tests."""
    return next((WHY[line[1:]] for line in lines if line[1:] in WHY), "not noticed")


def keep_some(session: Path, count: int, seed: int) -> int:
    """Leave ``count`` faults of a session, drawn at random; how many there were."""
    with sqlite3.connect(session) as connection:
        jobs = sorted(row[0] for row in connection.execute("SELECT job_id FROM work_items"))
        order = connection.execute(
            "SELECT job_id FROM mutation_specs ORDER BY module_path, operator_name, occurrence"
        )
        names = [row[0] for row in order]
        kept = set(random.Random(seed).sample(names, min(count, len(names))))
        for name in set(jobs) - kept:
            connection.execute("DELETE FROM mutation_specs WHERE job_id = ?", (name,))
            connection.execute("DELETE FROM work_items WHERE job_id = ?", (name,))
    return len(jobs)


def changed_lines(diff: str) -> list[str]:
    """The lines that a diff takes away and adds."""
    lines = diff.splitlines()
    return [x for x in lines if x[:1] in "+-" and x[:3] not in ("+++", "---") and x[1:].strip()]


if __name__ == "__main__":
    main()

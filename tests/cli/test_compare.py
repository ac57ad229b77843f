"""``qatc compare``, driven for real."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.conftest import refused, run


def write_grid(path: Path, model: Path, **base: object) -> Path:
    options = {"model": str(model), "steps": 2, "samples": 24, "max-length": 16}
    options |= {"eval-samples": 8, "batch-size": 4, "compile": False, "verify": False}
    grid = {
        "base": options | base,
        "grids": [{"name": "bits", "axes": {"bits": ["4-8-4", "8-8-8"]}}],
    }
    path.write_text(json.dumps(grid))  # JSON is YAML
    return path


def test_a_grid_of_two_cells(shared_model_path: Path, tmp_path: Path) -> None:
    grid, out = write_grid(tmp_path / "grid.yaml", shared_model_path), tmp_path / "out"
    command = [sys.executable, "-m", "qatc.cli", "compare", str(grid), "--output", str(out)]
    done = subprocess.run(
        [*command, "--json"],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    first, second = json.loads(done.stdout)["rows"]
    assert first["setting"]["bits"] == "4-8-4" and second["setting"]["bits"] == "8-8-8"
    assert first["figures"]["kl"]["mean"] > second["figures"]["kl"]["mean"] > 0
    for name in ("bytes", "operations_per_token"):
        assert 0 < first["figures"][name]["mean"] < second["figures"][name]["mean"]
    assert [step for step, _ in first["curve"]] == [1, 2]
    assert len(list((out / "data").iterdir())) == 1, "the corpus is shared"
    assert not list(out.rglob("*.safetensors"))
    assert {p.name for p in out.glob("compare.*")} == {
        f"compare.{e}" for e in ("csv", "html", "json", "md")
    }
    assert "| 4-8-4 |" in (out / "compare.md").read_text()
    again = run("compare", grid, "--output", out)
    assert again.exit_code == 0 and again.stderr.count("finished before") == 2


def test_cells_are_listed_without_running(shared_model_path: Path, tmp_path: Path) -> None:
    grid, out = write_grid(tmp_path / "grid.yaml", shared_model_path), tmp_path / "out"
    listed = run("compare", grid, "--output", out, "--dry-run").stdout.splitlines()
    assert [line.rpartition("-")[0] for line in listed] == [
        f"tiny-{bits}-qat-seed0" for bits in ("4-8-4", "8-8-8")
    ]
    part = run("compare", grid, "--shard", "1/2", "--dry-run").stdout.splitlines()
    assert part == listed[1:] and not out.exists()


def test_a_launcher_says_the_shard(
    shared_model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = write_grid(tmp_path / "grid.yaml", shared_model_path)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "8-8-8" in run("compare", grid, "--dry-run").stdout
    assert "4-8-4" not in run("compare", grid, "--dry-run").stdout


@pytest.mark.parametrize("shard", ["1", "2/2", "0/0", "a/b"])
def test_shards(shard: str, shared_model_path: Path, tmp_path: Path) -> None:
    grid = write_grid(tmp_path / "grid.yaml", shared_model_path)
    refused(2, "--shard takes i/n", "compare", grid, "--shard", shard)


def test_mistakes_are_named_before_a_cell_runs(shared_model_path: Path, tmp_path: Path) -> None:
    grid = write_grid(tmp_path / "grid.yaml", shared_model_path, stepps=3)
    refused(2, "'stepps'; there is steps", "compare", grid, "--output", tmp_path / "out")
    refused(2, "cannot read the grid file", "compare", tmp_path / "no.yaml")
    assert not (tmp_path / "out").exists()


def test_a_failed_cell_is_told(shared_model_path: Path, tmp_path: Path) -> None:
    grid = tmp_path / "grid.yaml"
    grid.write_text(f"base: {{model: {shared_model_path}, steps: 0}}\ngrids: [{{}}]\n")
    out = tmp_path / "out"
    ended = run("compare", grid, "--output", out)
    assert ended.exit_code == 1 and "1 of 1 cells failed" in ended.stderr
    assert "steps must be at least 1" in (out / "compare.md").read_text()

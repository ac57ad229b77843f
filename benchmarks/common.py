"""What the benchmarks share: where results go, and what machine they came from."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"


def machine() -> dict[str, Any]:
    """Processor, cores, GPU and versions."""
    import torch
    import transformers

    from qatc.quantize.provenance import package_version

    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = [x for x in info.read_text().splitlines() if x.startswith("model name")]
        model = lines[0].split(":")[1].strip() if lines else model
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        **{name: package_version(name) for name in ("torchao", "optimum-quanto")},
    }


def beginning(text: Path, tokens: int) -> str:
    """As much of a text as surely has so many tokens."""
    return text.read_bytes()[: 16 * tokens].decode(errors="ignore")


def windows(ids: list[int], size: int) -> list[list[int]]:
    """The tokens in pieces of one size; what is left over is dropped."""
    return [ids[i : i + size] for i in range(0, len(ids) - size + 1, size)]


def save(name: str, result: dict[str, Any]) -> Path:
    """Write a raw result to ``benchmarks/results/NAME.json``."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"machine": machine(), **result}, indent=2) + "\n")
    print(f"wrote {path.relative_to(ROOT)}")
    return path


def call(arguments: list[str]) -> str:
    """Run a command of qatc; returns what it prints."""
    command = [sys.executable, "-m", "qatc.cli", *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def alone(folder: Path) -> dict[str, str]:
    """An environment in which Python finds the project in ``folder`` first, on one thread."""
    return os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}


def display_path(path: str) -> str:
    """A path as it may stand in a committed result: within the repository, or the last name."""
    try:
        return str(Path(path).resolve().relative_to(ROOT))
    except ValueError:
        return Path(path).resolve().name


def random_output(directory: Path, recipe: Any, model: Any) -> Path:
    """An output as ``qatc quantize`` writes it, of a model that was only rounded."""
    from qatc.models.preparation import prepare, quantized_specs, restore
    from qatc.output import Output, QuantizedWeight, write_output

    prepare(model, recipe, compile=False)
    state = model.state_dict()
    specs = quantized_specs(model)
    weights = {name: QuantizedWeight.from_float(state[name], spec) for name, spec in specs.items()}
    restore(model)
    directory.mkdir(parents=True)
    write_output(directory, Output(model.config, recipe, weights, state))
    return directory

"""What other runtimes make of an output: size, codes, quality and speed.

    qatc quantize --model MODEL --bits 4-8-16 --group-size 32 --head-bits 8 --embedding-bits 8 \
        --output OUT
    python -m benchmarks.runtimes --model MODEL --output OUT --text wiki.txt

Each format of :data:`RUNTIMES` is written by ``qatc export``, read back, and run by what it is for.
All get the same tokens, in windows that begin anew, a token at a time in the programs that are
written, which is also what tokens per second are. KL is that to the full-precision model in fp32,
in nats per token. ``qatc`` is the same output run by qatc, each window at once. A format that was
not run is there with the reason. The result is ``results/runtimes-NAME.json``.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import os
import runpy
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from benchmarks import common, models
from qatc.errors import QatcError


class Reader(Protocol):
    """A runtime that holds a model.

    Attributes:
        seconds: that it has taken for single tokens.
        tokens: that it has read one at a time.
    """

    seconds: float
    tokens: int

    def read(self, ids: list[int]) -> Tensor:
        """Logits ``[T, V]`` behind each token of a text that begins anew."""


@dataclass(frozen=True)
class Runtime:
    """What runs a format.

    Attributes:
        format: of ``qatc export``.
        packages: that it takes.
        open: makes a reader of a directory with room for so many tokens.
    """

    format: str
    packages: tuple[str, ...]
    open: Callable[[Path, int], Reader]


class Script:
    """The ``generate.py`` that is written beside programs, a token at a time."""

    def __init__(self, directory: Path, slots: int) -> None:
        self._model = runpy.run_path(str(directory / "generate.py"))["open_model"](directory, slots)
        self.seconds, self.tokens = 0.0, 0
        self.read([0, 0])  # what is done once
        self.seconds, self.tokens = 0.0, 0

    def read(self, ids: list[int]) -> Tensor:
        self._model.held = 0
        started = time.perf_counter()
        rows = torch.cat([self._model([id]) for id in ids])
        self.seconds += time.perf_counter() - started
        self.tokens += len(ids)
        return rows


class Transformers:
    """``from_pretrained``, each window at once."""

    def __init__(self, directory: Path, slots: int) -> None:
        from transformers import AutoModelForCausalLM

        self._model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        self.seconds, self.tokens = 0.0, 0

    def read(self, ids: list[int]) -> Tensor:
        return _at_once(self._model, ids)


class Vllm:
    """vLLM in fp32, each window at once, which it does not compile here."""

    def __init__(self, directory: Path, slots: int) -> None:
        from qatc.export.vllm.engine import VllmModel

        self._model = VllmModel(directory, slots, dtype="float32")
        self.seconds, self.tokens = 0.0, 0

    def read(self, ids: list[int]) -> Tensor:
        return torch.from_numpy(self._model.log_probabilities(ids))


RUNTIMES = (
    Runtime("compressed-tensors", ("transformers", "compressed-tensors"), Transformers),
    Runtime("torchao", ("transformers", "torchao"), Transformers),
    Runtime("vllm", ("vllm",), Vllm),
    Runtime("pt2", ("torch",), Script),
    Runtime("aoti", ("torch",), Script),
    Runtime("executorch", ("executorch",), Script),
)


def main() -> None:
    """Run the benchmark and write its result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--output", required=True, action="append", help="of qatc quantize")
    parser.add_argument("--text", required=True)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--window", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--format", action="append", help="these alone, beside what was found before"
    )
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    model = models.find(given.model)
    texts = windows(model, Path(given.text), given.tokens, given.window)
    wanted = full_precision(model, texts)
    settings = {
        "model": common.display_path(model),
        "text": Path(given.text).name,
        **{key: getattr(given, key) for key in ("tokens", "window", "threads")},
    }
    chosen = [own for own in RUNTIMES if given.format is None or own.format in given.format]
    found = {Path(own).name: of_output(Path(own), chosen, texts, wanted) for own in given.output}
    common.save(
        name := f"runtimes-{Path(model).resolve().name}",
        settings
        | {
            "load_average": os.getloadavg()[
                2
            ],  # more than the threads: speeds are of a busy machine
            "full_precision": {"perplexity": quality(wanted, wanted, texts)["perplexity"]},
            "outputs": merged(earlier(name, settings), found),
        },
    )


def earlier(name: str, settings: dict[str, Any]) -> dict[str, Any]:
    """What an earlier run has found of outputs, if it had the same settings."""
    path = common.RESULTS / f"{name}.json"
    told = json.loads(path.read_text()) if path.is_file() else {}
    outputs: dict[str, Any] = told.get("outputs", {})
    return outputs if settings.items() <= told.items() else {}


def merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """Outputs, and for each what is new of it beside what only an earlier run has found."""
    return old | {name: old.get(name, {}) | found for name, found in new.items()}


def windows(model: str, text: Path, tokens: int, size: int) -> list[list[int]]:
    """The first tokens of a text in pieces of one size; what is left over is dropped."""
    from transformers import AutoTokenizer

    content = common.beginning(text, tokens)
    ids = list(AutoTokenizer.from_pretrained(model)(content)["input_ids"])[:tokens]
    return common.windows(ids, size)


def full_precision(model: str, texts: list[list[int]]) -> list[Tensor]:
    """Log-probabilities ``[T, V]`` of the model in fp32 behind each token."""
    from transformers import AutoModelForCausalLM

    loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    return [_log_probabilities(_at_once(loaded, ids)) for ids in texts]


def of_output(
    output: Path, runtimes: list[Runtime], texts: list[list[int]], wanted: list[Tensor]
) -> dict[str, Any]:
    """What qatc and each of the runtimes make of an output."""
    import qatc
    from qatc.output import open_output

    model = qatc.load(output)
    found = [_log_probabilities(_at_once(model, ids)) for ids in texts]
    del model
    result: dict[str, Any] = {
        "recipe": str(open_output(output).recipe.bits),
        "qatc": quality(found, wanted, texts),
    }
    print(output.name, result)
    for runtime in runtimes:
        result[runtime.format] = run(runtime, output, texts, wanted)
        print(runtime.format, result[runtime.format], flush=True)
        gc.collect()
    return result


def run(
    runtime: Runtime, output: Path, texts: list[list[int]], wanted: list[Tensor]
) -> dict[str, Any]:
    """A format written, read back and run; or why it was not."""
    from qatc.export import FORMATS, export
    from qatc.output import load_codes

    for name in runtime.packages:
        if importlib.util.find_spec(name.replace("-", "_")) is None:
            return {"not run": f"{name} is not installed"}
    with tempfile.TemporaryDirectory(prefix="qatc-runtimes-") as scratch:
        started = time.perf_counter()
        try:
            directory = export(output, Path(scratch) / "out", format=runtime.format)
        except QatcError as error:
            return {"not run": str(error)}
        seconds = time.perf_counter() - started
        codes, back = load_codes(output), FORMATS[runtime.format].read(directory)
        equal = codes.keys() == back.keys() and all(
            torch.equal(own.codes, back[name].codes) and torch.equal(own.scale, back[name].scale)
            for name, own in codes.items()
        )
        size = sum(path.stat().st_size for path in directory.iterdir())
        started = time.perf_counter()
        try:
            reader = runtime.open(directory, len(texts[0]))
        except QatcError as error:
            return {"not run": str(error).replace(str(scratch), "")}
        opened = time.perf_counter() - started
        found = [_log_probabilities(reader.read(ids)) for ids in texts]
    return {
        "versions": {name: _version(name) for name in runtime.packages},
        "bytes": size,
        "export_seconds": round(seconds, 1),
        "codes_and_scales_equal": equal,
        "load_seconds": round(opened, 1),
        **quality(found, wanted, texts),
    } | _speed(reader)


def _version(package: str) -> str:
    """vLLM for CPUs is a package of another name."""
    from qatc.quantize.provenance import package_version

    found = [package_version(name) for name in (package, f"{package}-cpu")]
    return found[0] if found[1] == "not installed" else f"{found[1]} (for CPUs)"


def _speed(reader: Reader) -> dict[str, float]:
    if not reader.tokens:
        return {}
    return {"decoded_tokens_per_second": round(reader.tokens / reader.seconds, 2)}


def quality(found: list[Tensor], wanted: list[Tensor], texts: list[list[int]]) -> dict[str, float]:
    """Perplexity of the texts, and KL to what is wanted, of log-probabilities ``[T, V]``."""
    losses = [-rows[range(len(ids) - 1), ids[1:]] for rows, ids in zip(found, texts, strict=True)]
    divergences = [(w.exp() * (w - rows)).sum(-1) for rows, w in zip(found, wanted, strict=True)]
    return {
        "perplexity": float(torch.cat(losses).mean().exp()),
        "kl": float(torch.cat(divergences).mean()),
    }


def _at_once(model: Any, ids: list[int]) -> Tensor:
    with torch.no_grad():
        rows: Tensor = model(input_ids=torch.tensor([ids])).logits[0]
    return rows


def _log_probabilities(logits: Tensor) -> Tensor:
    return logits.double().log_softmax(-1)


if __name__ == "__main__":
    main()

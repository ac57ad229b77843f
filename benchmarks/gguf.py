"""A model's GGUF beside llama.cpp's own quantizations of the same model, all run by llama.cpp.

    qatc quantize --model MODEL --bits 4-8-16 --target llama.cpp --output OUT
    python -m benchmarks.gguf --model MODEL --output OUT --text wiki.txt --threads 2

Every file gets the same tokens, in windows that begin anew. KL is that to the full-precision model
(nats per token), which llama.cpp computes as well, in fp32. K and V are fp16 everywhere. Speeds
are those of the text in batches, and of single tokens behind 64 others. The result is
``results/gguf-NAME.json``. It takes the package gguf and a binding of llama.cpp, see
:mod:`qatc.export.gguf.llama_cpp`.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks import common, llama_files, models
from qatc.export.gguf.llama_cpp import LlamaFile, binding
from qatc.quantize.provenance import package_version

KINDS = ("Q4_0", "Q4_K_M", "Q8_0")
"""What llama.cpp is asked for."""

DECODED = 64

Rows = NDArray[np.float64]


def main() -> None:
    """Run the benchmark and write its result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--output", required=True, action="append", help="of qatc quantize")
    parser.add_argument("--text", required=True)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-speeds", action="store_true", help="on a machine that does more")
    given = parser.parse_args()
    model = models.find(given.model)
    with tempfile.TemporaryDirectory(prefix="qatc-gguf-") as scratch:
        files = write_all(model, [Path(own) for own in given.output], Path(scratch), given.threads)
        ids = tokens_of(files["full precision"], Path(given.text), given.tokens)
        texts = common.windows(ids, given.window)
        found = compare(files, texts, given.threads, speeds=not given.no_speeds)
    name = Path(model).resolve().name
    common.save(
        f"gguf-{name}",
        {
            "model": common.display_path(model),
            "text": Path(given.text).name,
            "binding": binding(),
            "versions": {name: package_version(name) for name in ("cyllama", "llama-cpp-python")},
            **{key: getattr(given, key) for key in ("tokens", "window", "threads")},
            "files": found,
        },
    )


def write_all(model: str, outputs: list[Path], scratch: Path, threads: int) -> dict[str, Path]:
    """The GGUF files by name: full precision first, then qatc's, then llama.cpp's."""
    from qatc.export import export

    source = scratch / "full"
    source.mkdir()
    plain = _write_full(model, source)
    files = {"full precision": llama_files.quantize(plain, scratch / "f32.gguf", "F32", threads)}
    for output in outputs:
        (file,) = export(output, scratch / f"of {output.name}", format="gguf").glob("*.gguf")
        files[f"qatc {output.name}"] = file
    for kind in KINDS:
        path = scratch / f"{kind}.gguf"
        files[f"llama.cpp {kind}"] = llama_files.quantize(plain, path, kind, threads)
    return files


def _write_full(model: str, directory: Path) -> Path:
    """The model as it is, as GGUF; MLPs with zeros to whole blocks, which llama.cpp asks for."""
    from transformers import AutoModelForCausalLM

    from qatc.export.gguf.blocks import BLOCK
    from qatc.export.gguf.format import write_plan
    from qatc.export.gguf.plan import make_plan
    from qatc.output import Output
    from qatc.recipe.recipe import Recipe

    loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    output = Output(loaded.config, Recipe.from_bits("16-16-16"), {}, loaded.state_dict())
    plan = make_plan(dataclasses.replace(output, directory=Path(model)))
    write_plan(dataclasses.replace(plan, width=plan.width + -plan.width % BLOCK), directory)
    (file,) = directory.glob("*.gguf")
    return file


def tokens_of(path: Path, text: Path, count: int) -> list[int]:
    """The first tokens of a text, by the tokenizer in a file."""
    return LlamaFile(path, 0).tokenize(common.beginning(text, count))[:count]


def compare(
    files: dict[str, Path], texts: list[list[int]], threads: int, *, speeds: bool
) -> dict[str, dict[str, Any]]:
    """Size, quality and speed of every file; the first is the one that others are compared to."""
    found: dict[str, dict[str, Any]] = {}
    first: list[Rows] = []
    for name, path in files.items():
        losses, divergences, agreed = [], [], []
        started, spent = time.perf_counter(), 0.0
        for number, (ids, rows) in enumerate(_read(path, texts, threads)):
            spent += time.perf_counter() - started
            if len(first) <= number:
                first.append(rows)
            wanted = first[number]
            losses.append(-rows[range(len(ids) - 1), ids[1:]])
            divergences.append((np.exp(wanted) * (wanted - rows)).sum(-1))
            agreed.append(wanted.argmax(-1) == rows.argmax(-1))
            started = time.perf_counter()
        found[name] = {
            "bytes": path.stat().st_size,
            "types": _types(path),
            "perplexity": float(np.exp(np.concatenate(losses).mean())),
            "kl": float(np.concatenate(divergences).mean()),
            "top1_agreement": float(np.concatenate(agreed).mean()),
        }
        if speeds:
            found[name] |= {
                "text_tokens_per_second": round(sum(map(len, texts)) / spent, 1),
                "decoded_tokens_per_second": round(_decoding(path, texts[0], threads), 1),
            }
        print(name, {key: value for key, value in found[name].items() if key != "types"})
    return found


def _read(path: Path, texts: list[list[int]], threads: int) -> Iterator[tuple[list[int], Rows]]:
    """Each window, and the log probabilities after each of its tokens."""
    model = LlamaFile(path, len(texts[0]), threads)
    for ids in texts:
        model.reset()
        yield ids, model.log_probabilities(ids)


def _decoding(path: Path, ids: list[int], threads: int) -> float:
    """Tokens per second, one after the other."""
    model = LlamaFile(path, 2 * DECODED, threads)
    model.logits(ids[:DECODED])
    started = time.perf_counter()
    for token in ids[:DECODED]:
        model.logits([token])
    return DECODED / (time.perf_counter() - started)


def _types(path: Path) -> dict[str, int]:
    """Numbers that a file holds in each type."""
    import gguf

    found: dict[str, int] = {}
    for tensor in gguf.GGUFReader(path).tensors:
        name = tensor.tensor_type.name
        found[name] = found.get(name, 0) + int(tensor.n_elements)
    return found


if __name__ == "__main__":
    main()

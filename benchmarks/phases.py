"""The peak of resident memory in every phase of ``qatc quantize``, on a CPU.

    python -m benchmarks.phases DIRECTORY --options '{"batch_size": 2}'

A tiny model goes through the same run first, so that libraries and compiler are loaded before
anything is counted; a teacher that is recorded is recorded by a process of its own. What is counted
is the growth of resident memory (VmRSS), looked at every few milliseconds: a model that is loaded
in the dtype of its checkpoint lies in pages of that file. The allocator gives back what is freed at
once (a fixed ``MALLOC_MMAP_THRESHOLD_``), else a phase would be charged with what an earlier one
had.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from benchmarks import common

PHASES = {
    "Loading": "load",
    "Capturing": "load",
    "Measuring the first": "first steps",
    "The teacher writes": "corpus",
    "Evaluating full precision": "evaluation",
    "Training": "training",
    "Evaluating the model": "evaluation",
    "Measuring KL": "by layer",
    "Writing": "writing",
    "Verifying": "verifying",
}
"""How a stage of the run begins, and the phase that it belongs to."""

SAMPLES = 24
"""Sequences of the corpus, all of them side by side."""

_SECONDS = 0.003


def measure(shape: dict[str, int], options: dict[str, Any]) -> dict[str, Any]:
    """Peaks and seconds of a run with a random LLaMA of this shape, in a process of its own."""
    environment = common.alone(common.ROOT) | {
        "MALLOC_MMAP_THRESHOLD_": "2097152",
        "MALLOC_TRIM_THRESHOLD_": "2097152",
        "OMP_NUM_THREADS": str(os.cpu_count()),
        "HF_HUB_OFFLINE": "1",
    }
    with tempfile.TemporaryDirectory(prefix="qatc-phases-") as scratch:
        tiny = shape | {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 512}
        tiny["num_hidden_layers"] = 2
        tiny |= {"num_attention_heads": 4, "num_key_value_heads": 2}
        write_model(Path(scratch, "tiny"), tiny)
        write_model(Path(scratch, "model"), shape)
        command = [sys.executable, "-m", "benchmarks.phases", scratch]
        done = subprocess.run(
            [*command, "--options", json.dumps(options)],
            env=environment, cwd=common.ROOT, stdout=subprocess.PIPE, text=True, check=False,
        )  # fmt: skip
    if done.returncode:
        raise SystemExit("error: the run failed")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def write_model(directory: Path, shape: dict[str, int]) -> None:
    """A random LLaMA in bf16, with a tokenizer of as many words."""
    import torch
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = LlamaConfig(**shape, bos_token_id=0, eos_token_id=1, dtype="bfloat16")  # type: ignore[arg-type]
    torch.set_default_dtype(torch.bfloat16)
    model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(directory)
    words = {"<s>": 0, "</s>": 1} | {f"w{i}": i for i in range(2, shape["vocab_size"])}
    core = Tokenizer(models.WordLevel(words, unk_token="</s>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")
    tokenizer.save_pretrained(directory)


class Sampler(threading.Thread):
    """Looks at this process's memory, and keeps the most of each phase."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.phase = "start"
        self.peaks: dict[str, int] = {}
        self.seconds: dict[str, float] = {}
        self.ended = False

    def run(self) -> None:
        last = time.perf_counter()
        with open("/proc/self/status", encoding="ascii") as status:
            while not self.ended:
                status.seek(0)
                text = status.read()
                held = int(text.split("VmRSS:")[1].split()[0]) * 1024
                now, phase = time.perf_counter(), self.phase
                self.peaks[phase] = max(self.peaks.get(phase, 0), held)
                self.seconds[phase] = self.seconds.get(phase, 0.0) + now - last
                last = now
                time.sleep(_SECONDS)


def run_once(
    directory: Path, output: Path, options: dict[str, Any], on_stage: Any, **whole: Any
) -> None:
    """One run of ``qatc quantize``, telling its stages."""
    from qatc.data.config import CorpusConfig
    from qatc.progress import Observer
    from qatc.quantize import QuantizeConfig, quantize
    from qatc.recipe import Recipe
    from qatc.training import TrainingConfig

    options = dict(options)
    whole |= {"dtype": options.pop("dtype", "auto")}

    class Watch(Observer):
        def stage(self, title: str) -> None:
            on_stage(title)

    config = QuantizeConfig(
        str(directory),
        output,
        Recipe.from_bits("4-8-4"),
        CorpusConfig(SAMPLES, batch_size=SAMPLES),
        TrainingConfig(**options),
        eval_sequences=SAMPLES // 4,
        **whole,
    )
    quantize(config, Watch())


def record(directory: Path, dtype: str) -> None:
    """Let ``qatc generate-data`` write the corpus, with what it records of the teacher."""
    command = [sys.executable, "-m", "qatc.cli", "generate-data", "--record-logits", "32+32"]
    command += ["--model", str(directory / "model"), "--output", str(directory / "out.data")]
    command += ["--samples", str(SAMPLES), "--batch-size", str(SAMPLES), "--dtype", dtype]
    subprocess.run(command, check=True, stdout=sys.stderr)


def main() -> None:
    """Run the tiny model, then the model, and print the peaks as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--options", default="{}")
    arguments = parser.parse_args()
    options = json.loads(arguments.options)
    run_once(
        arguments.directory / "tiny", arguments.directory / "out-tiny", options, str, verify=False
    )
    sampler = Sampler()
    sampler.start()
    time.sleep(0.5)
    own = "start"

    def on_stage(title: str) -> None:
        nonlocal own
        print(title, file=sys.stderr, flush=True)
        sampler.phase = own = next((p for t, p in PHASES.items() if title.startswith(t)), own)

    if options.get("teacher") == "recorded":
        record(arguments.directory, options.get("dtype", "auto"))
    run_once(arguments.directory / "model", arguments.directory / "out", options, on_stage)
    sampler.ended = True
    sampler.join()
    start = sampler.peaks.pop("start")
    peaks = {phase: held - start for phase, held in sampler.peaks.items()}
    sampler.seconds.pop("start")
    seconds = {phase: round(s, 2) for phase, s in sampler.seconds.items()}
    print(json.dumps({"before": start, "peaks": peaks, "seconds": seconds}))


if __name__ == "__main__":
    main()

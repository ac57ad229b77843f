"""Hold the estimates of ``qatc estimate`` against measured runs, and tabulate large models.

    python -m benchmarks.estimate --cases 30M 135M

Each case is a run of ``qatc quantize`` on a CPU with a random LLaMA of some shape, whose peak of
resident memory in every phase is measured (:mod:`benchmarks.phases`). Both leave out the libraries.
A case whose options this version lacks is refused. The table has LLaMAs by their public shapes on
GPUs of several sizes, with the cheapest options that fit.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from typing import Any

from benchmarks import common, phases

LLAMA = {"model_type": "llama", "tie_word_embeddings": False, "dtype": "bfloat16"}

MODELS = {
    "LLaMA-7B": {
        "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000,
    },
    "LLaMA-13B": {
        "hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40,
        "num_attention_heads": 40, "num_key_value_heads": 40, "vocab_size": 32000,
    },
    "LLaMA-30B": {
        "hidden_size": 6656, "intermediate_size": 17920, "num_hidden_layers": 60,
        "num_attention_heads": 52, "num_key_value_heads": 52, "vocab_size": 32000,
    },
    "Llama-3-8B": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
    },
}  # fmt: skip
"""By the shapes that their configs give."""

MACHINES = ((1, 24), (1, 80), (8, 40), (8, 80))
"""GPUs, and GB of each."""

SHAPES = {
    "30M": {
        "hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8,
        "num_attention_heads": 8, "num_key_value_heads": 8, "vocab_size": 32000,
    },
    "135M": {
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152,
    },
    "1B": {
        "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22,
        "num_attention_heads": 32, "num_key_value_heads": 4, "vocab_size": 32000,
    },
}  # fmt: skip
"""Random models that are run; embedding and head are tied."""

ALL_OPTIONS = {
    "optimizer": "adamw8bit",
    "master_dtype": "bfloat16",
    "loss_chunk": 256,
    "checkpoint_activations": True,
    "fused_step": True,
    "teacher": "recorded",
}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "30M": ("30M", {"batch_size": 2}),
    "30M, 8x256": ("30M", {"batch_size": 8}),
    "135M": ("135M", {"batch_size": 2}),
    "1B, all options": ("1B", {"batch_size": 2, "dtype": "bfloat16", **ALL_OPTIONS}),
}
"""A shape, and what its run is told; three steps, rows of 256 tokens. bf16 masters need the dtype,
which is fp32 by itself on most CPUs."""

TITLES = {
    "load": "loading",
    "corpus": "writing the corpus",
    "evaluation": "evaluating",
    "training": "training",
    "by layer": "measuring KL by layer",
    "writing": "packing",
    "verifying": "verifying",
}
"""Phases as they are measured, and how the title of the estimate begins."""


def main() -> None:
    """Run the cases and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", nargs="*", choices=[*CASES], default=["30M", "135M"])
    parser.add_argument("--no-save", action="store_true", help="print only")
    arguments = parser.parse_args()
    file = common.RESULTS / "estimate.json"
    measured = json.loads(file.read_text())["measured"] if file.exists() else {}
    table = {name: rows_of(name) for name in MODELS}
    for name in arguments.cases:
        measured[name] = run_case(*CASES[name])
        print(name, json.dumps(measured[name]["ratios"]), measured[name]["largest"], flush=True)
        if not arguments.no_save:
            common.save("estimate", {"measured": measured, "table": table})
    if not (arguments.cases or arguments.no_save):
        common.save("estimate", {"measured": measured, "table": table})


def run_case(shape_name: str, told: dict[str, Any]) -> dict[str, Any]:
    """Measured and estimated bytes of every phase, and estimated over measured."""
    from qatc.training import TrainingConfig

    known = {field.name for field in dataclasses.fields(TrainingConfig)}
    if lacking := told.keys() - known - {"dtype"}:
        sys.exit(f"error: this version has no {', '.join(sorted(lacking))}")
    shape = SHAPES[shape_name] | {"max_position_embeddings": 2048, "tie_word_embeddings": True}
    found = phases.measure(shape, {**told, "steps": 3})
    peaks, estimated = found["peaks"], estimates(shape, told)
    ratios = {name: round(estimated[name] / peaks[name], 3) for name in TITLES if name in peaks}
    return {
        "shape": shape,
        "options": told,
        "ratios": ratios,
        "largest": round(max(estimated.values()) / max(peaks.values()), 3),
        "measured_bytes": peaks,
        "estimated_bytes": estimated,
        "seconds": found["seconds"],
    }


def estimates(shape: dict[str, Any], told: dict[str, Any]) -> dict[str, int]:
    """Estimated bytes of the phases of such a run here, without libraries."""
    import torch
    from transformers import LlamaConfig

    from qatc.estimate import Setup, shape_of
    from qatc.estimate import phases as reckon
    from qatc.machine.device import pick_dtype
    from qatc.models.pipelines import why_no_integer_forward
    from qatc.recipe import Recipe

    config = LlamaConfig(**shape, dtype="bfloat16")
    told = dict(told)
    compute = str(pick_dtype(told.pop("dtype", "auto"), "cpu", config)).removeprefix("torch.")
    setup = Setup(
        compute=compute,
        integer_forward=why_no_integer_forward(Recipe.from_bits("4-8-4"), torch.device("cpu"))
        is None,
        on_gpu=False,
        samples=phases.SAMPLES,
        eval_samples=phases.SAMPLES // 4,
        slots=phases.SAMPLES,
        **told,
    )
    found = {}
    for phase in reckon(shape_of(config, "random"), setup):
        name = next((n for n, title in TITLES.items() if phase.title.startswith(title)), None)
        if name is not None:
            found[name] = round(phase.total - phase.parts["libraries"])
    return found


def rows_of(name: str) -> list[dict[str, Any]]:
    """What a model takes on each of the machines: as it is, and with the cheapest options."""
    from transformers import LlamaConfig

    from qatc.estimate import Setup, estimate, shape_of

    shape = shape_of(LlamaConfig(**(LLAMA | MODELS[name])), name)  # type: ignore[arg-type]
    rows = []
    for gpus, gigabytes in MACHINES:
        found = estimate(shape, Setup(gpus=gpus), gigabytes * 1e9).to_dict()
        chosen = found["options"]
        rows.append(
            {
                "gpus": gpus,
                "gb": gigabytes,
                "fits_as_it_is": found["fits"],
                "gb_as_it_is": _gigabytes(found["phases"]),
                "fits": chosen["fits"],
                "options": chosen["typed"],
                "added_share_of_a_step": chosen["added_share_of_a_step"],
                "gb_with_options": _gigabytes(chosen["phases"]),
                "host_gb_with_options": {
                    phase["phase"]: round(sum(phase["host"].values()) / 1e9, 1)
                    for phase in chosen["phases"]
                },
            }
        )
    return rows


def _gigabytes(found: list[dict[str, Any]]) -> dict[str, float]:
    return {phase["phase"]: round(phase["bytes"] / 1e9, 1) for phase in found}


if __name__ == "__main__":
    main()

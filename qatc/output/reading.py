"""What an output holds, read back: metadata, recipe, codes, float weights, the reference model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from qatc.errors import CheckpointError, ConfigError, DataError
from qatc.models.load import require_finite
from qatc.models.remote_code import require_trust
from qatc.output import compressed_tensors
from qatc.output.codes import QuantizedWeight
from qatc.recipe.recipe import Recipe
from qatc.recipe.spec import QuantSpec
from qatc.storage.directories import recover
from qatc.storage.files import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel
from qatc.output.directory import OWN_KEYS, build_on, with_tied

_READABLE = (2, 3)
"""Version 2 knows no quantized head or embedding, and is read as what it says."""


def read_metadata(directory: Path) -> dict[str, Any]:
    """The content of ``qatc.json``.

    Raises:
        CheckpointError: ``directory`` is no output of qatc, is damaged, or has a version that this
            qatc does not know.
    """
    path = directory / "qatc.json"
    if not directory.exists():
        recover(directory)
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is not a directory; give an output of qatc quantize")
    if not path.exists():
        raise CheckpointError(
            f"{directory} is no output of qatc (it has no qatc.json); make one with qatc quantize"
        )
    metadata = _read_mapping(path)
    version = metadata.get("format_version")
    if version not in _READABLE:
        raise CheckpointError(
            f"{path} has format_version {version!r}, and this qatc reads"
            f" {' and '.join(map(str, _READABLE))};"
            " use the qatc that wrote it, or quantize again"
        )
    metadata.setdefault("specs", {})
    if not metadata.keys() >= set(OWN_KEYS):
        raise CheckpointError(f"{path} is damaged: it must hold {', '.join(OWN_KEYS)}")
    return metadata


def why_unverified(directory: Path) -> str | None:
    """Why an output was not compared with what was trained; None if it was.

    Raises:
        CheckpointError: as :func:`read_metadata`.
    """
    parity = read_metadata(directory).get("parity", {})
    return str(parity["reason"]) if parity.get("passed", True) is None else None


def read_recipe(directory: Path) -> Recipe:
    """The recipe that the model was trained with; raises as :func:`read_metadata`."""
    try:
        return Recipe.from_dict(read_metadata(directory)["recipe"])
    except (ConfigError, TypeError, ValueError) as error:
        raise CheckpointError(f"{directory / 'qatc.json'}: {error}") from error


def load_codes(directory: Path) -> dict[str, QuantizedWeight]:
    """The quantized weights by parameter name: the very codes and scales that were written.

    Raises:
        CheckpointError: as :func:`read_metadata`, or a weight file or tensor is missing or damaged.
    """
    tensors, stored = _read_tensors(directory, quantized=True), read_stored(directory)
    found: dict[str, QuantizedWeight] = {}
    for name, (spec, layout) in stored.items():
        own = compressed_tensors.tensor_names(name, layout)
        found |= compressed_tensors.unpack({key: tensors[key] for key in own}, spec, layout)
    return found


def read_stored(directory: Path) -> dict[str, tuple[QuantSpec, str]]:
    """How each stored weight is quantized, and its layout, by name.

    Raises:
        CheckpointError: as :func:`read_metadata`.
    """
    metadata, weights = read_metadata(directory), read_recipe(directory).weights
    stored = {
        name: (weights, compressed_tensors.layout_of(weights)) for name in metadata["quantized"]
    }
    try:
        for name, plain in metadata["specs"].items():
            layout = str(plain.pop("layout"))
            stored[name] = (QuantSpec(**plain), layout)
    except (ConfigError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{directory / 'qatc.json'}: {error}") from error
    return stored


def loads_elsewhere(directory: Path) -> bool:
    """Whether runtimes that read compressed-tensors can load this output as it is.

    They cannot where the codes of a head or an embedding are stored as only :func:`qatc.load`
    reads them; :func:`export` writes a form that they can.
    """
    config = _read_mapping(directory / "config.json").get("quantization_config") or {}
    groups = dict(config.get("config_groups", {})).values()
    return all(group["format"] != compressed_tensors.OWN_LAYOUT for group in groups)


def load_float_state(directory: Path) -> dict[str, Tensor]:
    """The tensors that are not quantized, as stored; raises as :func:`load_codes`."""
    return _read_tensors(directory, quantized=False)


def _read_tensors(directory: Path, *, quantized: bool) -> dict[str, Tensor]:
    stored = read_stored(directory)
    expected = {
        k for n, (_, own) in stored.items() for k in compressed_tensors.tensor_names(n, own)
    }
    paths = [directory / "model.safetensors"]
    index = directory / "model.safetensors.index.json"
    if index.exists():
        places = _read_mapping(index).get("weight_map", {})
        paths = sorted({directory / file for file in places.values()})
    tensors: dict[str, Tensor] = {}
    for path in paths:
        try:
            with safe_open(path, "pt") as file:
                wanted = [key for key in file.keys() if (key in expected) == quantized]
                tensors.update({key: file.get_tensor(key) for key in wanted})
        except FileNotFoundError as error:
            raise CheckpointError(f"{path} is missing; copy or write the model again") from error
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{path} is damaged or cut off ({error}); copy or write the model again"
            ) from error
    require_finite(tensors, str(directory))
    missing = sorted(expected - tensors.keys()) if quantized else []
    if missing:
        raise CheckpointError(f"{directory} has no tensor {missing[0]}; write the model again")
    return tensors


def _read_mapping(path: Path) -> dict[str, Any]:
    try:
        return dict(read_json(path))
    except (DataError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); copy or write it again") from error


def load_reference(
    directory: Path, *, dtype: torch.dtype = torch.float32, trust_remote_code: bool = False
) -> PreTrainedModel:
    """The plain Hugging Face model with the weights ``code * scale``; inputs are not quantized.

    Raises:
        CheckpointError: as :func:`load_codes`, or the tensors are not those of the config.
        ConfigError: as :func:`read_config`.
    """
    codes, state = load_codes(directory), load_float_state(directory)
    config = read_config(directory, trust_remote_code=trust_remote_code)
    model = build_on(config, "cpu", dtype, trust_remote_code)
    own = model.state_dict()
    codes = with_tied(codes, model.all_tied_weights_keys)
    given = codes.keys() | state.keys()
    odd = sorted((own.keys() - given - model.all_tied_weights_keys.keys()) | (given - own.keys()))
    if odd:
        raise CheckpointError(
            f"{directory} does not hold the tensors of its config: {len(odd)} are missing or left"
            f" over, among them {odd[0]}; copy or write the model again"
        )
    for name in sorted(given):
        own[name].copy_(codes[name].dequantize(dtype) if name in codes else state[name])
    model.eval()
    return model


def read_config(directory: Path, *, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The model's config.

    Raises:
        CheckpointError: it cannot be read.
        ConfigError: the model has code of its own, and ``trust_remote_code`` is false.
    """
    from transformers import AutoConfig

    require_trust(directory, trust_remote_code)
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            directory, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError, ImportError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"cannot read the config in {directory}: {reason}") from error
    return config

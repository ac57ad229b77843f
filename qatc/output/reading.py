"""An output read back: opened as a whole, or only what is asked for."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from qatc.errors import CheckpointError, ConfigError, DataError
from qatc.models.building import build_model
from qatc.models.load import read_generation_config, require_finite
from qatc.models.remote_code import require_trust
from qatc.models.scales import of_attention
from qatc.output.codes import QuantizedWeight
from qatc.output.compressed_tensors import loads_as_it_is
from qatc.output.contents import Output
from qatc.output.directory import OWN_KEYS, with_tied
from qatc.output.layouts import LAYOUTS, TORCHAO, from_tensors, layout_of, tensor_names
from qatc.recipe.recipe import Recipe
from qatc.recipe.spec import QuantSpec
from qatc.storage.directories import recover
from qatc.storage.files import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

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


def open_output(directory: Path | str, *, trust_remote_code: bool = False) -> Output:
    """Read an output of qatc, every file of it once.

    Raises:
        CheckpointError: the directory is no complete output of qatc, or a file of it is damaged.
        ConfigError: the model has code of its own, and ``trust_remote_code`` is false.
    """
    directory = Path(directory)
    metadata = read_metadata(directory)
    recipe = recipe_of(directory, metadata)
    stored = _stored(directory, metadata, recipe)
    config = read_config(directory, trust_remote_code=trust_remote_code)
    tensors = _read_tensors(directory)
    weights = _weights(directory, stored, tensors)
    return Output(
        config,
        recipe,
        weights,
        tensors,
        metadata,
        read_generation_config(directory),
        trust_remote_code,
        directory,
    )


def load_codes(directory: Path | str) -> dict[str, QuantizedWeight]:
    """The quantized weights of an output by name: the very codes and scales that were written.

    Raises:
        CheckpointError: as :func:`open_output`.
    """
    directory = Path(directory)
    metadata = read_metadata(directory)
    stored = _stored(directory, metadata, recipe_of(directory, metadata))
    names = {own for name, (_, layout) in stored.items() for own in tensor_names(name, layout)}
    return _weights(directory, stored, _read_tensors(directory, names))


def recipe_of(directory: Path, metadata: Mapping[str, Any]) -> Recipe:
    """The recipe in the metadata of an output; the directory is for a message."""
    try:
        return Recipe.from_dict(metadata["recipe"])
    except (ConfigError, TypeError, ValueError) as error:
        raise CheckpointError(f"{directory / 'qatc.json'}: {error}") from error


def _stored(
    directory: Path, metadata: Mapping[str, Any], recipe: Recipe
) -> dict[str, tuple[QuantSpec, str]]:
    """How each stored weight is quantized, and its layout, by name."""
    stored: dict[str, tuple[QuantSpec, str]] = {}
    for name in metadata["quantized"]:
        spec = recipe.weights_of(name)
        stored[name] = spec, TORCHAO if metadata["layout"] == TORCHAO else layout_of(spec)
    try:
        for name, plain in metadata["specs"].items():
            own = dict(plain)
            layout = own.pop("layout")
            if layout not in LAYOUTS:
                raise ConfigError(
                    f"{name} has the layout {layout!r}, which this qatc does not know"
                )
            stored[name] = (QuantSpec(**own), layout)
    except (ConfigError, TypeError, ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{directory / 'qatc.json'}: {error}") from error
    return stored


def _weights(
    directory: Path, stored: Mapping[str, tuple[QuantSpec, str]], tensors: dict[str, Tensor]
) -> dict[str, QuantizedWeight]:
    """The quantized weights, whose tensors are taken out of ``tensors``."""
    found: dict[str, QuantizedWeight] = {}
    for name, (spec, layout) in stored.items():
        names = tensor_names(name, layout)
        missing = [own for own in names if own not in tensors]
        if missing:
            raise CheckpointError(f"{directory} has no tensor {missing[0]}; write the model again")
        found |= from_tensors({own: tensors.pop(own) for own in names}, spec, layout)
    return found


def loads_elsewhere(directory: Path) -> bool:
    """Whether runtimes that read compressed-tensors can load this output as it is.

    They cannot where the codes of a head or an embedding are stored as only :func:`qatc.load`
    reads them; :func:`export` writes a form that they can.
    """
    return loads_as_it_is(_read_mapping(directory / "config.json"))


def _read_tensors(directory: Path, names: Collection[str] | None = None) -> dict[str, Tensor]:
    """The tensors of the weight files by name; ``names``: those alone, as far as they are there."""
    paths = [directory / "model.safetensors"]
    index = directory / "model.safetensors.index.json"
    if index.exists():
        places = _read_mapping(index).get("weight_map", {})
        paths = sorted({directory / file for file in places.values()})
    tensors: dict[str, Tensor] = {}
    for path in paths:
        try:
            with safe_open(path, "pt") as file:
                wanted = [key for key in file.keys() if names is None or key in names]
                tensors.update({key: file.get_tensor(key) for key in wanted})
        except FileNotFoundError as error:
            raise CheckpointError(f"{path} is missing; copy or write the model again") from error
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{path} is damaged or cut off ({error}); copy or write the model again"
            ) from error
    require_finite(tensors, str(directory))
    return tensors


def _read_mapping(path: Path) -> dict[str, Any]:
    try:
        return dict(read_json(path))
    except (DataError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); copy or write it again") from error


def load_reference(
    source: Path | Output, *, dtype: torch.dtype = torch.float32, trust_remote_code: bool = False
) -> PreTrainedModel:
    """The plain Hugging Face model with the weights ``code * scale``; inputs are not quantized.

    Args:
        source: an output, opened or not.
        dtype: of its parameters.
        trust_remote_code: run the code that comes with the model, where it is still to be opened.

    Raises:
        CheckpointError: as :func:`open_output`, or the tensors are not those of the config.
        ConfigError: as :func:`read_config`.
    """
    output = opened(source, trust_remote_code)
    model = build_model(
        output.config, dtype, device="cpu", trust_remote_code=output.trust_remote_code
    )
    own = model.state_dict()
    state = {name: value for name, value in output.state.items() if not of_attention(name)}
    codes = with_tied(output.weights, model.all_tied_weights_keys)
    given = codes.keys() | state.keys()
    odd = sorted((own.keys() - given - model.all_tied_weights_keys.keys()) | (given - own.keys()))
    if odd:
        raise CheckpointError(
            f"{output.directory} does not hold the tensors of its config: {len(odd)} are missing or"
            f" left over, among them {odd[0]}; copy or write the model again"
        )
    for name in sorted(given):
        own[name].copy_(codes[name].dequantize(dtype) if name in codes else state[name])
    model.eval()
    return model


def opened(source: Path | str | Output, trust_remote_code: bool = False) -> Output:
    """The output itself, or the one in a directory."""
    if isinstance(source, Output):
        return source
    return open_output(source, trust_remote_code=trust_remote_code)


def read_config(directory: Path, *, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The model's config, by its file.

    Raises:
        CheckpointError: it cannot be read.
        ConfigError: the model has code of its own, and ``trust_remote_code`` is false.
    """
    from transformers import CONFIG_MAPPING, AutoConfig

    config: PreTrainedConfig
    try:
        plain = dict(read_json(directory / "config.json"))
    except (DataError, TypeError, ValueError) as error:
        raise CheckpointError(f"cannot read the config in {directory}: {error}") from error
    require_trust(directory, plain, trust_remote_code)
    try:
        if "auto_map" in plain:  # whose code transformers fetches, and reads the file again
            config = AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
        elif plain.get("model_type") in CONFIG_MAPPING:
            config = CONFIG_MAPPING[plain["model_type"]].from_dict(plain)
        else:
            raise ValueError(f"transformers knows no model_type {plain.get('model_type')!r}")
    except (OSError, ValueError, TypeError, ImportError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"cannot read the config in {directory}: {reason}") from error
    config._name_or_path = str(directory)
    return config

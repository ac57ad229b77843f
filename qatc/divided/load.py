"""Load a model that is divided among processes from the start.

It is built without storage and sharded (:mod:`qatc.training.sharding`), and then each process reads
its rows of every parameter from the files of the checkpoint. A checkpoint whose tensors are not the
model's, name by name, is loaded by transformers, whole and into the host's memory, and divided from
there.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from qatc.machine.world import World
from qatc.models import LoadedModel, load_config, load_model
from qatc.models.building import build_model
from qatc.models.load import (
    joined_fingerprint,
    read_generation_config,
    readable_errors,
    require_finite,
    stored_dtype,
    stored_tensors,
    tensor_digest,
)
from qatc.storage.files import read_json
from qatc.training.sharding import first_row, own_rows, shard_parts

Places = Mapping[str, tuple[str, str]]
"""The file that a tensor of a model is in, and what it is called there, by its name."""


def load_divided(
    world: World,
    name: str,
    *,
    dtype: torch.dtype,
    device: str,
    trust_remote_code: bool = False,
    train_ends: bool = True,
    note: Callable[[str], object] = lambda text: None,
) -> LoadedModel:
    """Load a causal LM of which every process has some rows of each parameter.

    All processes call this together.

    Args:
        world: the processes.
        name: hub name or directory.
        dtype: dtype to load in.
        device: of each process.
        trust_remote_code: allow code that comes with the model.
        train_ends: whether embedding and head are to require a gradient.
        note: is told where a whole model is loaded first.

    Raises:
        ConfigError, CheckpointError: as of :func:`qatc.models.load_model`.
    """
    config = load_config(name, trust_remote_code=trust_remote_code)
    with readable_errors(name, config):
        model: Any = build_model(
            config, dtype, device="parameters on meta", trust_remote_code=trust_remote_code
        )
        found = world.first_before_others(_find_tensors, name, model, dtype)
    reasons = world.on_each(lambda: found if isinstance(found, str) else None)
    if why := next(filter(None, reasons), None):  # caches of nodes may differ: all do alike
        note(f"each process loads {name} whole into the host's memory and keeps its part, as {why}")
        whole = load_model(name, dtype=dtype, trust_remote_code=trust_remote_code)
        fingerprint = whole.fingerprint
        _shard(whole.model, device, train_ends)
        return replace(whole, known_fingerprint=fingerprint)
    assert not isinstance(found, str)
    _shard(model, device, train_ends)
    with readable_errors(name, config):
        fingerprint = _fingerprint(world, model, found, name)
        world.on_each(_fill, model, found)
        settings = read_generation_config(_directory(name))
    if settings is not None:
        model.generation_config = settings
    return LoadedModel(model.eval(), name, stored_dtype(config, model), fingerprint)


def _shard(model: Any, device: str, train_ends: bool) -> None:
    """Shard a model in place; what has no storage gets some, with nothing in it yet."""
    for end in () if train_ends else (model.get_input_embeddings(), model.get_output_embeddings()):
        if end is not None:
            end.weight.requires_grad_(False)
    for _ in shard_parts(model, torch.device(device)):
        pass
    tied: dict[int, list[tuple[Any, str]]] = {}
    for module in model.modules():
        for leaf, parameter in module._parameters.items():
            tied.setdefault(id(parameter), []).append((module, leaf))
    model._apply(lambda t: torch.empty_like(t, device=device) if t.is_meta else t.to(device))
    for (first, own), *others in tied.values():  # each of which has got storage of its own
        for module, leaf in others:
            module._parameters[leaf] = first._parameters[own]


def _find_tensors(name: str, model: Any, dtype: torch.dtype) -> Places | str:
    """Where the checkpoint has every tensor of a model, or why its files do not say so."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    if getattr(model.config, "auto_map", None):
        return "its own code may read its files in another way"
    if get_model_conversion_mapping(model, add_legacy=False):
        return "transformers converts its tensors when they are loaded"
    if dtype is not torch.float32 and model._keep_in_fp32_modules_strict:
        return "transformers keeps some of its tensors in fp32"
    stored = _shapes_in(_files(name))
    called: dict[int, list[str]] = {}
    for own, tensor in model.state_dict(keep_vars=True).items():
        called.setdefault(id(tensor), []).append(own)
    places: dict[str, tuple[str, str]] = {}
    for own, tensor in stored_tensors(model).items():
        names = [n for n in called[id(tensor)] if n in stored]
        if len(names) != 1 or stored[names[0]][1] != tuple(tensor.shape):
            return f"its files have no safetensors that are {own} alone"
        places[own] = stored[names[0]][0], names[0]
    return places


def _files(name: str) -> list[str]:
    """The safetensors of a checkpoint, those of a hub in the cache; none if it has other files."""
    if (whole := _file(name, "model.safetensors")) is not None:
        return [whole]
    index = _file(name, "model.safetensors.index.json")
    parts = sorted(set(read_json(Path(index))["weight_map"].values())) if index else []
    return [found for part in parts if (found := _file(name, part)) is not None]


def _file(name: str, file: str) -> str | None:
    """A file of a directory or a hub, if it is there."""
    from transformers.utils.hub import cached_file

    if Path(name).is_dir():
        return str(Path(name) / file) if (Path(name) / file).exists() else None
    try:
        found: str | None = cached_file(name, file)
    except OSError:
        return None
    return found


def _directory(name: str) -> Path:
    """Where the generation config lies, if there is one."""
    return Path(_file(name, "generation_config.json") or Path(name) / "none").parent


def _shapes_in(files: list[str]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """File and shape of every tensor in some files, by its name."""
    from safetensors import safe_open

    found = {}
    for path in files:
        with safe_open(path, "pt") as file:
            for name in file.keys():
                found[name] = path, tuple(file.get_slice(name).get_shape())
    return found


def _fingerprint(world: World, model: Any, places: Places, source: str) -> str:
    """The fingerprint of a model whose tensors are finite; each process reads some of them, whole.

    Raises:
        CheckpointError: one holds NaN or infinity.
    """
    from safetensors import safe_open

    tensors = stored_tensors(model)
    names, parameters = [*tensors], {name for name, _ in model.named_parameters()}

    def digest(name: str) -> bytes:
        path, stored = places[name]
        with safe_open(path, "pt") as file:
            tensor = file.get_tensor(stored).to(tensors[name].dtype)
        if name in parameters:
            require_finite({name: tensor}, source)
        return tensor_digest(tensor)

    def own() -> list[bytes]:
        with ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // world.size)) as pool:
            return list(pool.map(digest, names[world.rank :: world.size]))

    digests = dict.fromkeys(names, b"")
    for rank, found in enumerate(world.on_each(own)):
        digests |= zip(names[rank :: world.size], found, strict=True)
    return joined_fingerprint(model, digests.values())


@torch.no_grad()
def _fill(model: Any, places: Places) -> None:
    """Read the rows that this process has of every tensor, and no others."""
    from safetensors import safe_open

    with ExitStack() as opened:
        paths = {path for path, _ in places.values()}
        files = {path: opened.enter_context(safe_open(path, "pt")) for path in paths}
        for name, tensor in stored_tensors(model).items():
            path, stored = places[name]
            rows, first = own_rows(tensor), first_row(tensor)
            if not rows.dim():
                rows.copy_(files[path].get_tensor(stored))
            elif rows.numel():
                rows.copy_(files[path].get_slice(stored)[first : first + len(rows)])

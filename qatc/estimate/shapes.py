"""What a model's config says of its size: numbers of parameters by kind, and widths."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qatc.errors import ConfigError, DataError
from qatc.models import find_regions, load_config
from qatc.models.building import build_model
from qatc.storage.files import read_json


@dataclass(frozen=True)
class Shape:
    """The sizes of a model that its memory and its time follow from.

    Attributes:
        name: what the user called it.
        layers: how many.
        hidden: width between layers.
        inner: width within the MLP; of a mixture of experts that of all experts of a token.
        ups: linears of the MLP that widen: 2 with a gate, else 1.
        heads, kv_heads, head_size: of the attention.
        vocabulary: rows of the output head.
        linear: parameters of the layers' matrices.
        active: those of them that a token passes: fewer in a mixture of experts.
        small: parameters of the layers and behind them that are no matrix: norms and biases.
        embedding: parameters of the token embedding.
        head: those of the output head; 0 where it is the embedding itself.
        largest: parameters of the largest matrix of a layer.
        edges: rows and columns of the layers' matrices, all added up: what updates of rank 1 have.
        stored: bytes of a parameter in the checkpoint.
    """

    name: str
    layers: int
    hidden: int
    inner: int
    ups: int
    heads: int
    kv_heads: int
    head_size: int
    vocabulary: int
    linear: int
    active: int
    small: int
    embedding: int
    head: int
    largest: int
    stored: int
    edges: int

    @property
    def parameters(self) -> int:
        """All, tied ones once."""
        return self.linear + self.small + self.ends

    @property
    def ends(self) -> int:
        """Parameters of embedding and head."""
        return self.embedding + self.head

    @property
    def queries(self) -> int:
        """Width of all queries of a token."""
        return self.heads * self.head_size

    @property
    def keys(self) -> int:
        """Width of all keys of a token; values are as wide."""
        return self.kv_heads * self.head_size


def read_shape(model: str, *, trust_remote_code: bool = False) -> Shape:
    """The shape of a model by its config; no weights are read.

    Args:
        model: hub name, directory, or path of a ``config.json``.
        trust_remote_code: run the model's own code, if it has any.

    Raises:
        ConfigError: there is no such model, or it is none with decoder layers.
    """
    config = _config_of(model, trust_remote_code)
    return shape_of(config, model, trust_remote_code=trust_remote_code)


def _config_of(model: str, trust_remote_code: bool) -> Any:
    from transformers import CONFIG_MAPPING

    path = Path(model)
    if not path.is_file():
        return load_config(model, trust_remote_code=trust_remote_code)
    try:
        plain = read_json(path)
    except DataError as error:
        raise ConfigError(f"{path} is no config.json of a model: {error}") from error
    kind = str(plain.get("model_type")) if isinstance(plain, dict) else "none at all"
    if kind not in CONFIG_MAPPING:
        raise ConfigError(
            f"{path} has the model_type {kind!r}, which transformers does not know; give the"
            " model's directory, with its code and --trust-remote-code"
        )
    return CONFIG_MAPPING[kind].from_dict(plain)


def shape_of(config: Any, name: str, *, trust_remote_code: bool = False) -> Shape:
    """The shape of a model of a transformers config, which is built without storage.

    Raises:
        ConfigError: it cannot be built, or has no decoder layers.
    """
    own = getattr(config, "dtype", None)
    stored = own.itemsize if isinstance(own, torch.dtype) else 2
    try:
        model: Any = build_model(
            config, torch.float32, device="meta", trust_remote_code=trust_remote_code
        )
    except (ValueError, RuntimeError, AttributeError, TypeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(f"cannot build a causal LM of the config of {name}: {reason}") from error
    model.tie_weights()
    text = config.get_text_config()
    layers = [layer for _, layer in find_regions(model)]
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head is None or head.weight is table.weight
    matrices = [p for layer in layers for p in layer.parameters() if p.dim() > 1]
    linear = sum(p.numel() for p in matrices)
    embedding, own_head = table.weight.numel(), 0 if tied else head.weight.numel()
    whole = sum(p.numel() for p in model.parameters())
    heads = int(text.num_attention_heads)
    hidden = int(text.hidden_size)
    head_size = int(getattr(text, "head_dim", None) or hidden // heads)
    kv_heads = int(getattr(text, "num_key_value_heads", None) or heads)
    inner, ups, unused = _mlp(text, layers[0])
    return Shape(
        name=name,
        layers=len(layers),
        hidden=hidden,
        inner=inner,
        ups=ups,
        heads=heads,
        kv_heads=kv_heads,
        head_size=head_size,
        vocabulary=int((head or table).weight.shape[0]),
        linear=linear,
        active=linear - unused * len(layers),
        small=whole - linear - embedding - own_head,
        embedding=embedding,
        head=own_head,
        largest=max(p.numel() for p in matrices),
        stored=stored,
        edges=sum(sum(p.shape) for p in matrices if p.dim() == 2),
    )


def _mlp(text: Any, layer: nn.Module) -> tuple[int, int, int]:
    """Width within the MLP for a token, linears that widen, and parameters that a token misses."""
    hidden = int(text.hidden_size)
    experts = getattr(text, "num_local_experts", None) or getattr(text, "num_experts", None)
    if experts:
        width = int(getattr(text, "moe_intermediate_size", None) or text.intermediate_size)
        used = int(getattr(text, "num_experts_per_tok", 1))
        return used * width, 2, (int(experts) - used) * 3 * hidden * width
    sizes = [tuple(p.shape) for p in layer.parameters() if p.dim() == 2]
    inner = max((columns for rows, columns in sizes if rows == hidden), default=hidden)
    widened = [rows for rows, columns in sizes if columns == hidden]
    # Gate and up may be one matrix.
    return inner, widened.count(inner) or 2 * widened.count(2 * inner) or 1, 0

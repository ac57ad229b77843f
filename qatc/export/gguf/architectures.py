"""How a transformers model is called, laid out and described in GGUF, by its architecture.

llama.cpp turns neighbouring values of a query or key by the rotary embedding where its architecture
is ``llama``, and transformers turns those half a head apart. So the rows of those projections
change places; what reads the heads does not notice, as queries and keys are permuted alike.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qatc.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

ATTENTION_BIASES = ("attn_q", "attn_k", "attn_v")


@dataclass(frozen=True)
class Architecture:
    """One that llama.cpp has.

    Attributes:
        name: what GGUF calls it.
        interleaved: whether the rotary embedding turns neighbouring values.
        biases: the layers that may have a bias, by GGUF's names.
        normed_heads: whether queries and keys are normalized.
    """

    name: str
    interleaved: bool
    biases: tuple[str, ...] = ()
    normed_heads: bool = False


_LLAMA_BIASES = (*ATTENTION_BIASES, "attn_output", "ffn_gate", "ffn_up", "ffn_down")

ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture("llama", True, _LLAMA_BIASES),
    "mistral": Architecture("llama", True),
    "qwen2": Architecture("qwen2", False, ATTENTION_BIASES),
    "qwen3": Architecture("qwen3", False, normed_heads=True),
}
"""By the ``model_type`` of transformers."""

_OUTER = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_PLACES = {theirs: ours for ours, theirs in (_OUTER | _LAYER).items()}


def find_architecture(config: PreTrainedConfig) -> Architecture:
    """The architecture of a model.

    Raises:
        ConfigError: llama.cpp has another one by that name, or it is not written here.
    """
    found = ARCHITECTURES.get(config.model_type)
    if found is None:
        raise ConfigError(
            f"GGUF is written of models of type {', '.join(ARCHITECTURES)}, and this is"
            f" {config.model_type}; export it as compressed-tensors"
        )
    plain = vars(config)
    if plain.get("hidden_act", "silu") != "silu":
        raise ConfigError(
            f"llama.cpp computes a {found.name} with silu, and this model has"
            f" {plain['hidden_act']}; export it as compressed-tensors"
        )
    if plain.get("use_sliding_window"):
        raise ConfigError(
            f"llama.cpp lets each token of a {found.name} see all before it, and this model has a"
            " sliding window; export it as compressed-tensors"
        )
    heads: Any = plain["num_attention_heads"]
    if found.name == "qwen2" and heads * head_size(config) != plain["hidden_size"]:
        raise ConfigError(
            f"llama.cpp has as many values in all heads of a {found.name} as in its residual"
            f" stream, and this model has {heads} of {head_size(config)} beside"
            f" {plain['hidden_size']}; export it as compressed-tensors"
        )
    if rope_tensor(config) is not None and found.name != "llama":
        raise ConfigError(
            f"llama.cpp has no scaled rotary embedding of type llama3 in a {found.name}, and this"
            " model has one; export it as compressed-tensors"
        )
    return found


def gguf_name(name: str, architecture: Architecture) -> str:
    """What GGUF calls the parameter that transformers calls ``name``.

    Raises:
        ConfigError: the architecture has no such tensor.
    """
    module, _, kind = name.rpartition(".")
    layer = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", module)
    known = _LAYER.get(layer[2]) if layer else _OUTER.get(module)
    valid = kind == "weight" or (kind == "bias" and known in architecture.biases)
    if known in ("attn_q_norm", "attn_k_norm"):
        valid = valid and architecture.normed_heads
    if known is None or not valid:
        raise ConfigError(
            f"llama.cpp's {architecture.name} has no place for the tensor {name} of this model;"
            " export it as compressed-tensors"
        )
    return f"blk.{layer[1]}.{known}.{kind}" if layer else f"{known}.{kind}"


def transformers_name(name: str) -> str:
    """The inverse of :func:`gguf_name`."""
    layer = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(\w+)", name)
    if layer:
        return f"model.layers.{layer[1]}.{_PLACES[layer[2]]}.{layer[3]}"
    module, _, kind = name.rpartition(".")
    return f"{_PLACES[module]}.{kind}"


def row_order(name: str, rows: int, heads: Mapping[str, int]) -> Tensor | None:
    """Which row of transformers stands at each row of an interleaved tensor; None for the same.

    Args:
        name: of the tensor, by GGUF.
        rows: how many it has.
        heads: numbers of heads of queries and keys, by ``attn_q`` and ``attn_k``.
    """
    count = heads.get(name.split(".")[-2])
    if count is None:
        return None
    return torch.arange(rows).view(count, 2, -1).transpose(1, 2).reshape(-1)


def head_size(config: Any) -> int:
    """Values of a head."""
    return int(
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )


def context_length(config: Any) -> int:
    """Tokens that the model attends to: those of its window, where it has one."""
    window = getattr(config, "sliding_window", None) if config.model_type == "mistral" else None
    return int(min(config.max_position_embeddings, window or config.max_position_embeddings))


def describe(writer: Any, config: Any) -> None:
    """Put the numbers of a model into a ``gguf.GGUFWriter``, but for the width of its MLP."""
    import gguf

    writer.add_context_length(context_length(config))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_size(config))
    writer.add_value_length(head_size(config))
    writer.add_rope_dimension_count(head_size(config))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    rope = config.rope_parameters
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    if rope.get("rope_type") == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))


def rope_tensor(config: Any) -> Tensor | None:
    """What llama.cpp divides the rotary frequencies by: fp32 ``[head size / 2]``, or None for 1.

    The rule of LLaMA 3.1: frequencies that turn less than ``low_freq_factor`` times in the old
    context are divided by the factor, those that turn more than ``high_freq_factor`` times stay,
    and between them it is interpolated.

    Raises:
        ConfigError: the positions are scaled by another rule.
    """
    rope = config.rope_parameters
    kind = rope.get("rope_type", "default")
    if kind not in ("default", "linear", "llama3") or rope.get("partial_rotary_factor", 1) != 1:
        raise ConfigError(
            f"GGUF is written of rotary embeddings of type default, linear and llama3 over whole"
            f" heads, and this model has {kind} ({dict(rope)}); export it as compressed-tensors"
        )
    if kind != "llama3":
        return None
    size = head_size(config)
    frequencies = rope["rope_theta"] ** -(torch.arange(0, size, 2, dtype=torch.float64) / size)
    turns = rope["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    factors: Tensor = 1 / ((1 - kept) / rope["factor"] + kept)
    return factors.float()

"""llama.cpp as a variant of the speed benchmarks: optional, by the package llama-cpp-python.

The GGUF file is written from the very model that the other variants are, in F16, and quantized by
llama.cpp itself. It has no vocabulary: the benchmarks feed tokens.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import torch

KINDS = {"Q4_0": "LLAMA_FTYPE_MOSTLY_Q4_0", "Q8_0": "LLAMA_FTYPE_MOSTLY_Q8_0"}

_LAYER = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}  # fmt: skip


def why_not(model: Any) -> str | None:
    """Why llama.cpp does not run this model here, or None."""
    for package in ("llama_cpp", "gguf"):
        if importlib.util.find_spec(package) is None:
            return f"the package {package} is not installed"
    if model.config.model_type != "llama":
        return f"only models of type llama are written as GGUF, not {model.config.model_type}"
    return None


def write(model: Any, directory: Path) -> dict[str, Path]:
    """GGUF files of a LLaMA, by :data:`KINDS`."""
    import llama_cpp

    directory.mkdir(parents=True, exist_ok=True)
    source = directory / "f16.gguf"
    _write_f16(model, source)
    files = {}
    for kind, name in KINDS.items():
        files[kind] = directory / f"{kind}.gguf"
        options = llama_cpp.llama_model_quantize_default_params()
        options.ftype, options.nthread = getattr(llama_cpp, name), torch.get_num_threads()
        paths = (str(path).encode() for path in (source, files[kind]))
        failed = llama_cpp.llama_model_quantize(*paths, options)
        assert failed == 0, f"llama.cpp could not write {kind}"
    return files


def _write_f16(model: Any, path: Path) -> None:
    import gguf

    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_tokenizer_model("no_vocab")
    state = model.state_dict()
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm"}
    if not config.tie_word_embeddings:
        names["lm_head"] = "output"
    for number in range(config.num_hidden_layers):
        for ours, theirs in _LAYER.items():
            names[f"model.layers.{number}.{ours}"] = f"blk.{number}.{theirs}"
    for ours, theirs in names.items():
        value = state[f"{ours}.weight"].float().cpu().numpy()
        heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
        if theirs.rpartition(".")[2] in heads:
            value = _interleaved(value, heads[theirs.rpartition(".")[2]])
        writer.add_tensor(f"{theirs}.weight", value.astype(np.float16) if value.ndim > 1 else value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rotary pairs side by side, as llama.cpp has them; transformers has halves."""
    outputs, inputs = weight.shape
    halves = weight.reshape(heads, 2, outputs // heads // 2, inputs)
    return halves.swapaxes(1, 2).reshape(outputs, inputs)


class Llama:
    """A model of llama.cpp that is fed with tokens.

    Args:
        path: a GGUF file.
        slots: tokens that its cache holds.
    """

    def __init__(self, path: Path, slots: int) -> None:
        from llama_cpp import Llama as Loaded

        threads = torch.get_num_threads()
        self._model: Any = Loaded(
            str(path), n_ctx=slots, n_batch=512, n_threads=threads, n_threads_batch=threads,
            verbose=False,
        )  # fmt: skip

    def prefill(self, ids: list[int]) -> None:
        """Fill an empty cache."""
        self._model.reset()
        self._model.eval(ids)

    def decode(self, token: int) -> None:
        """One more token."""
        self._model.eval([token])

"""What a GGUF file will hold of an output: every tensor, its name, type, rows and zeros."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn.functional import pad

from qatc.errors import ConfigError
from qatc.export.gguf import blocks
from qatc.export.gguf.architectures import (
    Architecture,
    find_architecture,
    gguf_name,
    rope_tensor,
    row_order,
    transformers_name,
)
from qatc.export.gguf.vocabulary import Vocabulary, read_vocabulary
from qatc.models.load import load_tokenizer
from qatc.models.scales import of_attention, of_weight
from qatc.output import Output, QuantizedWeight
from qatc.output.compressed_tensors import refuse_rotated

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"

Value = QuantizedWeight | Tensor
"""A tensor of an output."""


@dataclass(frozen=True, eq=False)
class Plan:
    """What is to be written of an output.

    Attributes:
        output: where it is from.
        architecture: of the model, in llama.cpp.
        vocabulary: of its tokenizer.
        tensors: by GGUF's names, as transformers has them.
        types: of each, in GGUF.
        file_type: the type of most weights, which the file is named after.
        width: of the MLPs, which is a multiple of 32 where those are quantized.
    """

    output: Output
    architecture: Architecture
    vocabulary: Vocabulary
    tensors: Mapping[str, Value]
    types: Mapping[str, str]
    file_type: str
    width: int

    def shape_of(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor as GGUF has it."""
        rows, columns = self._added(name)
        first, *others = shape_of(self.tensors[name])
        return (first + rows, *(own + columns for own in others))

    def held(self, name: str) -> Value:
        """A tensor as GGUF has it: rows in its order, and zeros around a narrower MLP."""
        value, config = self.tensors[name], self.output.config
        heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
        order = None
        if self.architecture.interleaved:
            order = row_order(name, shape_of(value)[0], heads)

        def arranged(rows: Tensor, columns: int, fill: float = 0) -> Tensor:
            ordered = rows if order is None else rows[order]
            more = (0, self._added(name)[0])
            return pad(ordered, more if rows.dim() == 1 else (0, columns, *more), value=fill)

        if isinstance(value, Tensor):
            return arranged(value, self._added(name)[1])
        codes = arranged(value.codes, self._added(name)[1])
        return dataclasses.replace(value, codes=codes, scale=arranged(value.scale, 0, 1))

    def _added(self, name: str) -> tuple[int, int]:
        """Rows and columns of zeros that GGUF has more."""
        missing = self.width - int(self.output.config.intermediate_size)
        if ".ffn_down.weight" in name:
            return 0, missing
        return (missing if ".ffn_gate." in name or ".ffn_up." in name else 0), 0


def shape_of(value: Value) -> tuple[int, ...]:
    """The shape of a tensor, quantized or not."""
    return tuple(value.codes.shape if isinstance(value, QuantizedWeight) else value.shape)


def make_plan(output: Output) -> Plan:
    """What is to be written of an output.

    Raises:
        ConfigError: GGUF cannot hold it, or the package gguf is not installed.
    """
    require_gguf()
    refuse_rotated(output.recipe, "llama.cpp")
    architecture = find_architecture(output.config)
    tensors = _named(output, architecture)
    width = _width(output, tensors)
    types = {name: _type_of(name, value, width) for name, value in tensors.items()}
    vocabulary = read_vocabulary(_tokenizer_of(output), output.config.vocab_size)
    return Plan(
        output, architecture, vocabulary, tensors, types, _most_frequent(tensors, types), width
    )


def _width(output: Output, tensors: Mapping[str, Value]) -> int:
    """Of the MLPs: that of the model, or more where blocks of its inputs would not be whole."""
    width = int(output.config.intermediate_size)
    quantized = [name for name, value in tensors.items() if isinstance(value, QuantizedWeight)]
    return width + (-width % blocks.BLOCK if any(".ffn_down." in name for name in quantized) else 0)


def _type_of(name: str, value: Value, width: int) -> str:
    """The type of a tensor in GGUF; raises ``ConfigError`` if it cannot hold a weight."""
    if not isinstance(value, QuantizedWeight):
        return blocks.float_type(value)
    own = transformers_name(name)
    blocks.refuse_unheld(own, value)
    inputs = width if ".ffn_down." in name else value.codes.shape[1]
    if inputs % blocks.BLOCK:
        raise ConfigError(
            f"GGUF has blocks of {blocks.BLOCK} weights, which do not divide the {inputs} inputs of"
            f" {own}; leave it in full precision with --skip {own!r}, or export it as"
            " compressed-tensors"
        )
    return blocks.block_type(value.spec)


def _most_frequent(tensors: Mapping[str, Value], types: Mapping[str, str]) -> str:
    """The type of most numbers in the matrices of layers."""
    numbers: dict[str, int] = {}
    for name, value in tensors.items():
        if name.startswith("blk.") and len(shape_of(value)) > 1:
            numbers[types[name]] = numbers.get(types[name], 0) + math.prod(shape_of(value))
    return max(numbers, key=lambda kind: numbers[kind])


def require_gguf() -> None:
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"the format gguf needs the package gguf ({error}); pip install gguf"
        ) from error


def _tokenizer_of(output: Output) -> Any:
    if not (output.place / "tokenizer.json").exists():
        raise ConfigError(
            f"a GGUF file has the tokenizer in it, and {output.place} has no tokenizer.json; copy"
            " the tokenizer of the full-precision model into it"
        )
    return load_tokenizer(str(output.place), trust_remote_code=output.trust_remote_code)


def _named(output: Output, architecture: Architecture) -> dict[str, Value]:
    """All tensors by GGUF's names, the two ends first."""
    config: Any = output.config
    found: dict[str, Value] = {
        name: value
        for name, value in output.state.items()
        if not of_attention(name) and not of_weight(name)
    }
    found |= output.weights
    if config.tie_word_embeddings and HEAD in found:  # llama.cpp takes the table for both
        head = found.pop(HEAD)
        found.setdefault(EMBEDDING, head)
    named = {gguf_name(name, architecture): value for name, value in found.items()}
    frequencies = rope_tensor(config)
    if frequencies is not None:
        named["rope_freqs.weight"] = frequencies
    return dict(sorted(named.items(), key=lambda item: (item[0].startswith("blk."), item[0])))

"""Quantized heads and embeddings: small models, recipes, and the contract on its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qatc.recipe.recipe import Recipe
from tests.conftest import make_llama

IDS = torch.randint(0, 112, (2, 9), generator=torch.Generator().manual_seed(3))

CASES = [(True, 8, 8), (True, 4, 4), (True, 8, 16), (False, 8, 4), (False, 16, 4), (True, 16, 8)]


def tiny(tied: bool = True) -> Any:
    return make_llama(tie_word_embeddings=tied, num_hidden_layers=1)


def recipe_of(head: int, embedding: int, bits: str = "4-8-4") -> Recipe:
    return Recipe.from_bits(bits, head_bits=head, embedding_bits=embedding)


def rounded(weight: Tensor, bits: int) -> Tensor:
    """Codes times scales in fp64: the contract, spelled without the code under test."""
    if bits == 16:
        return weight.detach().double()
    largest = weight.detach().abs().amax(-1, keepdim=True)
    steps = 2 ** (bits - 1) - 1
    scale = (largest / steps).to(torch.bfloat16).double()
    return (weight.detach().double() / scale).round().clamp(-steps, steps) * scale


def inside(model: Any, ids: Tensor = IDS) -> tuple[Tensor, Tensor, Tensor]:
    """What the embedding gives, what the head is given, and the logits."""
    seen: dict[str, Tensor] = {}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    hooks = [
        embedding.register_forward_hook(lambda m, args, out: seen.update(embedded=out)),
        head.register_forward_hook(lambda m, args, out: seen.update(hidden=args[0])),
    ]
    logits = model(input_ids=ids, use_cache=False).logits
    for hook in hooks:
        hook.remove()
    return seen["embedded"], seen["hidden"], logits

"""Put the passes into a transformer that is not from Hugging Face, with its own training loop.

Two ways: ``qatc.prepare`` on the module as a whole, or the passes alone on a graph that you have
exported yourself. Both leave the parameters where they are, so your optimizer, checkpoints and
training loop need no change.
"""

from __future__ import annotations

import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qatc
from qatc.passes import Canonicalize, Pipeline, QuantizeKV, QuantizeWeights, pass_records


class Block(nn.Module):
    """A pre-norm transformer block with causal attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, T, width]`` to the same shape."""
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.qkv(self.norm_1(x)).chunk(3, dim=-1)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        out: Tensor = x + self.down(F.gelu(self.up(self.norm_2(x))))
        return out


class TinyTransformer(nn.Module):
    """Token and position embeddings, blocks, and a head: plain PyTorch."""

    def __init__(self, vocabulary: int = 64, width: int = 32, depth: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.embed_positions = nn.Embedding(128, width)
        self.blocks = nn.Sequential(*(Block(width, heads=4) for _ in range(depth)))
        self.lm_head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits ``[B, T, vocabulary]`` for token ids ``[B, T]``."""
        positions = torch.arange(ids.shape[1], device=ids.device)
        hidden = self.blocks(self.embed(ids) + self.embed_positions(positions))
        logits: Tensor = self.lm_head(hidden)
        return logits


def next_token_loss(model: nn.Module, ids: Tensor) -> Tensor:
    """Cross-entropy of the next token, in nats."""
    return F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())


def train(model: nn.Module, steps: int, rate: float) -> float:
    """Learn to count: every sequence is an arithmetic progression. Returns the last loss."""
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    loss = torch.zeros(())
    for _ in range(steps):
        start, stride = torch.randint(1, 8, (2, 16, 1), generator=generator)
        loss = next_token_loss(model, (start + stride * torch.arange(24)) % 64)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return float(loss)


def main(steps: int = 200) -> None:
    """Train in full precision, go on quantized, and show what the passes did."""
    torch.manual_seed(0)
    model = TinyTransformer()
    print(f"full precision: loss {train(model, steps, 3e-3):.3f}")

    recipe = qatc.Recipe.from_bits("4-8-4")
    qatc.prepare(model, recipe, compile=False)
    print(f"quantized, 4-8-4: loss {train(model, steps, 1e-3):.3f}")
    qatc.restore(model)

    batch = torch.export.Dim.AUTO
    exported = torch.export.export(
        model, (torch.zeros(2, 8, dtype=torch.long),), dynamic_shapes=({0: batch, 1: batch},)
    )
    graph = exported.module()
    pipeline = Pipeline((Canonicalize(), QuantizeWeights(skip=("lm_head*",)), QuantizeKV()))
    pipeline(graph)
    for record in pass_records(graph):
        print(f"{record.name:16} matched {record.matched:2d}, edited {record.edited:2d}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))

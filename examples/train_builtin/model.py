"""A lean Llama for training.

The queries, keys and values are one matrix, and so are gate and up; otherwise the arithmetic is
that of transformers' Llama, so the weights that `export.py` writes give the same logits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROPE_BASE = 1e5
NORM_EPS = 1e-5


@dataclass(frozen=True, slots=True)
class Shape:
    """The size of a model."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    ffn: int
    vocabulary: int = 4096

    @property
    def head_size(self) -> int:
        """Width of one attention head."""
        return self.hidden // self.heads


SHAPES = {
    "draft": Shape(hidden=128, layers=4, heads=4, kv_heads=2, ffn=256),
    "target": Shape(hidden=256, layers=6, heads=8, kv_heads=4, ffn=704),
}


def rope_tables(shape: Shape, length: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines, each (length, head_size)."""
    exponent = torch.arange(0, shape.head_size, 2).float() / shape.head_size
    angles = torch.outer(torch.arange(length).float(), ROPE_BASE**-exponent)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply RoPE to (batch, heads, length, head_size)."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class Block(nn.Module):
    """One decoder layer."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        width = shape.head_size
        self.norm1 = nn.Parameter(torch.ones(shape.hidden))
        self.norm2 = nn.Parameter(torch.ones(shape.hidden))
        self.qkv = nn.Linear(shape.hidden, (shape.heads + 2 * shape.kv_heads) * width, bias=False)
        self.out = nn.Linear(shape.hidden, shape.hidden, bias=False)
        self.gate_up = nn.Linear(shape.hidden, 2 * shape.ffn, bias=False)
        self.down = nn.Linear(shape.ffn, shape.hidden, bias=False)

    def weights(self) -> tuple[Tensor, ...]:
        """What `decoder_layer` takes after x, cos and sin."""
        matrices = (self.qkv.weight, self.out.weight, self.gate_up.weight, self.down.weight)
        return (self.norm1, self.norm2, *matrices)


def decoder_layer(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    norm1: Tensor,
    norm2: Tensor,
    qkv: Tensor,
    out: Tensor,
    gate_up: Tensor,
    down: Tensor,
    shape: Shape,
) -> Tensor:
    """(batch, length, hidden) -> the same. A plain function, so it compiles once for all layers."""
    batch, length, _ = x.shape
    mixed = F.linear(F.rms_norm(x, (shape.hidden,), norm1, NORM_EPS), qkv)
    mixed = mixed.view(batch, length, -1, shape.head_size).transpose(1, 2)
    q, k, v = torch.split(mixed, [shape.heads, shape.kv_heads, shape.kv_heads], dim=1)
    groups = shape.heads // shape.kv_heads
    k = rotate(k, cos, sin).to(v.dtype).repeat_interleave(groups, dim=1)
    v = v.repeat_interleave(groups, dim=1)
    attended = F.scaled_dot_product_attention(rotate(q, cos, sin).to(v.dtype), k, v, is_causal=True)
    x = x + F.linear(attended.transpose(1, 2).reshape(batch, length, shape.hidden), out)
    gate, up = F.linear(F.rms_norm(x, (shape.hidden,), norm2, NORM_EPS), gate_up).chunk(2, -1)
    return x + F.linear(F.silu(gate) * up, down)


class LeanLlama(nn.Module):
    """Decoder with tied embeddings; logits only where they are asked for."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embedding = nn.Embedding(shape.vocabulary, shape.hidden)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = nn.Parameter(torch.ones(shape.hidden))
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                scale = (
                    (2 * shape.layers) ** -0.5
                    if name.endswith(("out.weight", "down.weight"))
                    else 1
                )
                nn.init.normal_(parameter, std=0.02 * scale)

    def forward(
        self,
        ids: Tensor,
        cos: Tensor,
        sin: Tensor,
        picked: Tensor,
        layer: Callable[..., Tensor] = decoder_layer,
    ) -> Tensor:
        """Logits (picked, vocabulary) at flat positions `picked` of ids (batch, length).

        `layer` is `decoder_layer` or its compiled form.
        """
        x = self.embedding(ids)
        for block in self.blocks:
            assert isinstance(block, Block)
            x = layer(x, cos, sin, *block.weights(), self.shape)
        chosen = x.flatten(0, 1).index_select(0, picked)
        chosen = F.rms_norm(chosen, (self.shape.hidden,), self.norm, NORM_EPS)
        return F.linear(chosen, self.embedding.weight)

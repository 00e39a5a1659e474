"""A lean Llama for training.

The queries, keys and values are one matrix, and so are gate and up; otherwise the arithmetic is
that of transformers' Llama, so the weights that `export.py` writes give the same logits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .links import EVIDENCE_KINDS, LINK_KINDS

ROPE_BASE = 1e5
NORM_EPS = 1e-5
CHUNK = 128  # queries whose attention is computed at once


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


def causal_mask(chunk: int, groups: int, dtype: torch.dtype) -> Tensor:
    """What is added to the scores of a chunk's queries on its own keys: (groups * chunk, chunk)."""
    mask = torch.full((chunk, chunk), -1e9).triu(1)
    return mask.repeat(groups, 1).to(dtype)


class ChunkedAttention(torch.autograd.Function):
    """Causal attention, chunk by chunk: on a CPU two to four times as fast as SDPA at head size 32.

    Queries come as (batch * kv_heads, chunks, groups * chunk, head_size), already scaled; keys and
    values as (batch * kv_heads, tokens, head_size); what comes out is shaped like the queries.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        """Keep the weights of each chunk: for rows of at most a few thousand tokens they fit."""
        chunk, out, saved = mask.shape[1], torch.empty_like(q), []
        keys = k.transpose(1, 2)
        for number in range(q.shape[1]):
            start, end = number * chunk, (number + 1) * chunk
            scores = torch.bmm(q[:, number], keys[:, :, :end])
            scores[:, :, start:] += mask
            weights = torch.softmax(scores, -1).to(q.dtype)  # autocast on CUDA gives float32
            out[:, number] = torch.bmm(weights, v[:, :end])
            saved.append(weights)
        ctx.save_for_backward(q, k, v, *saved)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """The usual backward pass of softmax attention, chunk by chunk from the saved weights."""
        (given,) = gradients
        q, k, v, *saved = ctx.saved_tensors
        chunk, values = k.shape[1] // q.shape[1], v.transpose(1, 2)
        to_q = torch.empty_like(q)
        to_k = torch.zeros(k.shape, device=k.device)
        to_v = torch.zeros(v.shape, device=v.device)
        for number, weights in enumerate(saved):
            end = (number + 1) * chunk
            to_v[:, :end] += torch.bmm(weights.transpose(1, 2), given[:, number])
            to_weights = torch.bmm(given[:, number], values[:, :, :end])
            to_scores = torch._softmax_backward_data(to_weights, weights, -1, weights.dtype)
            to_q[:, number] = torch.bmm(to_scores, k[:, :end])
            to_k[:, :end] += torch.bmm(to_scores.transpose(1, 2), q[:, number])
        return to_q, to_k.to(k.dtype), to_v.to(v.dtype), None


def before_attention(
    x: Tensor, cos: Tensor, sin: Tensor, norm: Tensor, qkv: Tensor, shape: Shape
) -> tuple[Tensor, Tensor, Tensor]:
    """(batch, length, hidden) -> what `ChunkedAttention` takes. Plain, so it compiles once."""
    batch, length, _ = x.shape
    chunk, groups = min(CHUNK, length), shape.heads // shape.kv_heads
    mixed = F.linear(F.rms_norm(x, (shape.hidden,), norm, NORM_EPS), qkv)
    mixed = mixed.view(batch, length, -1, shape.head_size).transpose(1, 2)
    q, k, v = torch.split(mixed, [shape.heads, shape.kv_heads, shape.kv_heads], dim=1)
    q = (rotate(q, cos, sin) * shape.head_size**-0.5).to(v.dtype)
    # (batch, kv_heads, groups, chunks, chunk, head_size) -> groups beside the tokens of a chunk
    q = q.reshape(batch, shape.kv_heads, groups, length // chunk, chunk, shape.head_size)
    q = q.transpose(2, 3).reshape(-1, length // chunk, groups * chunk, shape.head_size)
    k = rotate(k, cos, sin).to(v.dtype).reshape(-1, length, shape.head_size)
    return q.contiguous(), k.contiguous(), v.reshape(-1, length, shape.head_size).contiguous()


def link_attention(q: Tensor, k: Tensor, links: Tensor, batch: int) -> Tensor:
    """Logarithm of the attention from one position to an earlier one, (links, heads).

    `q` and `k` as for `ChunkedAttention`; `links` (links, 4) holds row, position, earlier position,
    sorted by row.
    """
    row, asking, found, _ = links.unbind(1)
    length, size = k.shape[1:]
    chunk = length // q.shape[1]
    # 1. the links of a row side by side, as many places for each row as the fullest one needs
    counts = torch.bincount(row, minlength=batch)
    place = torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[row]
    table = torch.zeros(batch, int(counts.max()), dtype=torch.long, device=row.device)
    table[row, place] = asking
    # 2. scores (batch, kv_heads, places * groups, length)
    q = q.view(batch, -1, q.shape[1], q.shape[2] // chunk, chunk, size)
    rows = torch.arange(batch, device=row.device)[:, None]
    q = q[rows, :, table // chunk, :, table % chunk]  # (batch, places, kv_heads, groups, head_size)
    groups = q.shape[3]
    keys = k.view(batch, -1, length, size)
    scores = torch.matmul(q.transpose(1, 2).flatten(2, 3), keys.transpose(2, 3)).float()
    later = torch.arange(length, device=q.device) > table[:, :, None]
    scores = scores.masked_fill(later.repeat_interleave(groups, dim=1)[:, None], -1e9)
    # 3. back to links
    logs = scores.log_softmax(-1).unflatten(2, (-1, groups))
    return logs[row, :, place, :, found].flatten(1)


def link_loss(seen: Tensor | None, links: Tensor | None) -> Tensor:
    """How far the model is from one head for each kind of link: seen is (links, layers, heads).

    The answer's look at the fact is the business of the upper half of the layers, what prepares it
    that of the lower ones but the first. A head must serve all links of a kind in the batch: the
    best head of each single link would be content with heads that look at one fact each.
    """
    if seen is None or links is None or not len(seen):
        return torch.zeros(())
    middle, losses = seen.shape[1] // 2, []
    for kind in range(len(LINK_KINDS)):
        chosen = seen[links[:, 3] == kind]
        if len(chosen):
            layers = slice(middle, None) if kind in EVIDENCE_KINDS else slice(1, middle)
            losses.append(-chosen[:, layers].mean(0).amax())
    return torch.stack(losses).mean()


def after_attention(
    x: Tensor,
    attended: Tensor,
    norm: Tensor,
    out: Tensor,
    gate_up: Tensor,
    down: Tensor,
    shape: Shape,
) -> Tensor:
    """Add the attention's output and the feed-forward network's to x (batch, length, hidden)."""
    batch, length, _ = x.shape
    groups = shape.heads // shape.kv_heads
    chunks = attended.shape[1]
    attended = attended.view(batch, shape.kv_heads, chunks, groups, -1, shape.head_size)
    # (batch, chunks, chunk, kv_heads, groups, head_size)
    attended = attended.permute(0, 2, 4, 1, 3, 5).reshape(batch, length, shape.hidden)
    x = x + F.linear(attended, out)
    gate, up = F.linear(F.rms_norm(x, (shape.hidden,), norm, NORM_EPS), gate_up).chunk(2, -1)
    return x + F.linear(F.silu(gate) * up, down)


@dataclass(frozen=True, slots=True)
class Arithmetic:
    """The parts of a layer, as plain functions or compiled."""

    before: Callable[..., tuple[Tensor, Tensor, Tensor]] = before_attention
    after: Callable[..., Tensor] = after_attention

    @classmethod
    def compiled(cls) -> Arithmetic:
        """Both parts compiled, once per length."""
        return cls(
            torch.compile(before_attention, dynamic=False),
            torch.compile(after_attention, dynamic=False),
        )


PLAIN = Arithmetic()


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

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor,
        arithmetic: Arithmetic,
        links: Tensor | None,
        seen: list[Tensor],
    ) -> Tensor:
        """(batch, length, hidden) -> the same; what links see is added to `seen`."""
        q, k, v = arithmetic.before(x, cos, sin, self.norm1, self.qkv.weight, self.shape)
        if links is not None:
            seen.append(link_attention(q, k, links, x.shape[0]))
        attended = ChunkedAttention.apply(q, k, v, mask.to(q.dtype))  # type: ignore[no-untyped-call]
        weights = (self.norm2, self.out.weight, self.gate_up.weight, self.down.weight)
        return arithmetic.after(x, attended, *weights, self.shape)


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
        arithmetic: Arithmetic = PLAIN,
        links: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Logits (picked, vocabulary) at flat positions `picked` of ids (batch, length).

        The length is at most `CHUNK` or a multiple of it. With `links` (links, 4), also the
        logarithm of each link's attention in every head: (links, layers, heads).
        """
        seen: list[Tensor] = []
        x = self.embedding(ids)
        groups = self.shape.heads // self.shape.kv_heads
        mask = causal_mask(min(CHUNK, ids.shape[1]), groups, x.dtype).to(ids.device)
        for block in self.blocks:
            x = block(x, cos, sin, mask, arithmetic, links, seen)
        chosen = x.flatten(0, 1).index_select(0, picked)
        chosen = F.rms_norm(chosen, (self.shape.hidden,), self.norm, NORM_EPS)
        logits = F.linear(chosen, self.embedding.weight)
        return logits, torch.stack(seen, dim=1) if seen else None

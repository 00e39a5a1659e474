"""Vertical-slash sparse prefill of SpecKV's target (arXiv 2506.08373, Algorithm 1).

While a layer is read, every query sees the columns that the observing rows of that layer scored
best (per KV head, the same pooled scores that choose what stays in the cache) and a local band,
instead of all earlier keys. The scores need only the layer's own queries and keys, so the columns
are known before the layer's attention runs: one pass, nothing computed twice. The scores
themselves stay dense. The band begins at multiples of 64 tokens, as in the block kernel of
MInference (arXiv 2407.02490) that the paper uses: query q sees keys from q // 64 * 64 - window on.

The columns are gathered once, and blocks of queries attend to columns and band together, so no
tokens x tokens matrix exists. Rows of a batch are computed one by one, without their padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import scaled_dot_product_attention

from ..config import SpecKV
from ..models.attention_capture import AttentionCall, attention_probabilities

SLASH = 64  # tokens: the step in which the band moves
BLOCK = 512  # queries computed at once; a multiple of SLASH
# Prompts below these lengths (lookahead included) are read dense, by kind of device. Set from
# examples/benchmarks/sparse_prefill.py; the figure for CUDA is an estimate, not measured.
SHORTEST = {"cpu": 4096, "cuda": 65536}
# Sparse reading is used where it looks at no more than this share of the keys that dense causal
# reading looks at. Below 1 because gathering and masking cost time too.
WORTH = 0.6


def is_worth(tokens: int, vertical: int, window: int, device: str) -> bool:
    """Whether a sequence is read sparsely: it is longer than both sizes, and that saves time.

    Args:
        tokens: Of prompt and lookahead.
        vertical: Columns per KV head.
        window: Width of the band.
        device: "cpu", "cuda", ...; unknown kinds are taken for "cuda".
    """
    if tokens <= vertical + window or tokens < SHORTEST.get(device, SHORTEST["cuda"]):
        return False
    return vertical + window + BLOCK <= WORTH * tokens / 2  # a dense query sees tokens / 2 keys


def choose_columns(
    scores: torch.Tensor, always: torch.Tensor, tokens: int, vertical: int, window: int
) -> torch.Tensor:
    """The columns that all later queries of a sequence see.

    Args:
        scores: (kv_heads, prompt) pooled; -inf where a token is no candidate (the paper's window).
        always: (prompt,) bool, protected tokens. They come first, from the oldest on, unless the
            band of every later query reaches them.
        tokens: Of prompt and lookahead.
        vertical: Most columns.
        window: Width of the band.

    Returns:
        (kv_heads, columns) int64, ascending; at most `vertical` columns.
    """
    last_band = (tokens - 1) // SLASH * SLASH - window
    place = torch.arange(scores.shape[-1], device=scores.device)
    wanted = scores.masked_fill(always & (place < last_band), float("inf"))
    count = min(vertical, int((wanted > float("-inf")).sum(-1).min()))
    order = wanted.argsort(dim=-1, descending=True, stable=True)
    return order[:, :count].sort(-1).values


def sparse_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    columns: torch.Tensor,
    window: int,
    scaling: float,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention of one sequence to chosen columns and a local band.

    Args:
        query: (heads, tokens, head_dim), position encoding applied.
        key: (kv_heads, tokens, head_dim); heads is a multiple of kv_heads.
        value: (kv_heads, tokens, value_dim).
        columns: (kv_heads, columns) int64, ascending and distinct per head.
        window: Query q sees keys q // 64 * 64 - window .. q, besides the columns up to q.
        scaling: Factor on the logits.
        softcap: Gemma-2's tanh bound on the logits.
        sinks: (heads,) learned logits that take part in the softmax (GPT-OSS).

    Returns:
        (heads, tokens, value_dim).
    """
    heads, tokens, _ = query.shape
    group = heads // key.shape[0]
    out = query.new_empty(heads, tokens, value.shape[-1])
    firsts = torch.arange(0, tokens, BLOCK, device=query.device)
    ends = (firsts + BLOCK).clamp(max=tokens)
    reached = (ends - 1) // SLASH * SLASH - window  # (blocks,) where the last query's band begins
    limits = reached.expand(columns.shape[0], -1).contiguous()
    counts = torch.searchsorted(columns, limits).tolist()  # columns before that, per head and block
    far_keys = torch.stack([k[c] for k, c in zip(key, columns, strict=True)])
    far_values = torch.stack([v[c] for v, c in zip(value, columns, strict=True)])
    short = columns.int()  # compared faster than int64
    for block, first in enumerate(range(0, tokens, BLOCK)):
        last, begin = min(first + BLOCK, tokens), max(0, first - window)
        queries = torch.arange(first, last, device=query.device, dtype=torch.int32).unsqueeze(1)
        places = torch.arange(begin, last, device=query.device, dtype=torch.int32)
        band = queries // SLASH * SLASH - window  # (rows, 1)
        near = (places >= band) & (places <= queries)  # (rows, keys of the band)
        for head in range(key.shape[0]):
            count, mine = counts[head][block], slice(head * group, (head + 1) * group)
            out[mine, first:last] = _attend(
                query[mine, first:last],
                torch.cat([far_keys[head, :count], key[head, begin:last]]),
                torch.cat([far_values[head, :count], value[head, begin:last]]),
                torch.cat([short[head, :count] < band, near], dim=1),
                scaling,
                softcap,
                None if sinks is None else sinks[mine],
            )
    return out


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    visible: torch.Tensor,
    scaling: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """(group, rows, head_dim) over (keys, head_dim) of one KV head, visible (rows, keys)."""
    group = query.shape[0]
    if softcap is None and sinks is None:
        keys, values = (part.expand(1, group, -1, -1) for part in (key, value))
        return scaled_dot_product_attention(
            query.unsqueeze(0), keys, values, attn_mask=visible, scale=scaling
        )[0]
    rows = query.unsqueeze(0), key[None, None], visible[None, None]
    probabilities = attention_probabilities(*rows, scaling, softcap, sinks)
    return (probabilities[0] @ value.float()).to(query.dtype)


@dataclass(frozen=True, slots=True)
class SparsePrefill:
    """Which rows of a batch are read sparsely, and where their tokens stand."""

    vertical: int
    window: int
    firsts: Sequence[int]  # first column of each row's prompt
    lasts: Sequence[int]  # column behind each row's lookahead
    sparse: Sequence[bool]  # False: this row is read dense

    def attend(
        self, call: AttentionCall, scores: torch.Tensor, always: torch.Tensor
    ) -> torch.Tensor:
        """One layer's attention output, in place of the model's own.

        Args:
            call: The layer, with as many keys as queries.
            scores: (batch, kv_heads, prompt columns) pooled; -inf: no candidate.
            always: (batch, prompt columns) bool, protected tokens.

        Returns:
            (batch, columns, heads, value_dim); zeros at padding.
        """
        query, key, value = call.query, call.key, call.value
        batch, heads, columns, _ = query.shape
        out = query.new_zeros(batch, columns, heads, value.shape[-1])
        how = call.scaling, call.softcap, call.sinks
        for row, (first, last) in enumerate(zip(self.firsts, self.lasts, strict=True)):
            part, tokens = slice(first, last), last - first
            chosen = torch.empty((key.shape[1], 0), dtype=torch.int64, device=key.device)
            window = tokens  # all of it: a dense row beside sparse ones
            if self.sparse[row]:
                window = self.window
                mine = scores[row, :, part], always[row, part]
                chosen = choose_columns(*mine, tokens, self.vertical, window)
            states = query[row, :, part], key[row, :, part], value[row, :, part]
            found = sparse_attention(*states, chosen, window, *how)
            out[row, part] = found.transpose(0, 1)
        return out


def plan_sparse(
    options: SpecKV, real: torch.Tensor, evicts: torch.Tensor, begin: int
) -> SparsePrefill | None:
    """Decide for each row of a batch, by itself, how it is read.

    Args:
        options: `prefill_vertical_size` and `prefill_window_size`.
        real: (batch, columns) bool over prompt and lookahead, one run of True in each row.
        evicts: (batch,) bool, rows of which not everything stays; the others are read dense.
        begin: Columns known from an earlier pass; such prompts are read dense.

    Returns:
        None where all rows are read dense, by the model's own attention.
    """
    vertical, window = options.prefill_vertical_size, options.prefill_window_size
    if vertical is None or window is None or begin > 0:
        return None
    firsts = real.int().argmax(1).tolist()
    sizes = real.sum(1).tolist()
    kind = real.device.type
    sparse = [
        does and is_worth(size, vertical, window, kind)
        for does, size in zip(evicts.tolist(), sizes, strict=True)
    ]
    lasts = [first + size for first, size in zip(firsts, sizes, strict=True)]
    return SparsePrefill(vertical, window, firsts, lasts, sparse) if any(sparse) else None

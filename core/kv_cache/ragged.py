"""Keys and values of KV heads that hold different numbers of entries, and attention over them.

Heads of equal length are stored together, so nothing is padded: a head takes exactly the bytes of
its entries. Only where a layer has many different lengths, as in large batches, heads of nearly
equal length share a group, because every group costs its own calls. Tokens that come later are the
same for all heads and lie in one ordinary tensor.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from ..models.attention_capture import AttentionCall

EXACT = 16  # groups of a layer up to which no head is padded
SLACK = 16  # above, a head is padded by at most a 16th of the longest head of its group


@dataclass(frozen=True, slots=True, eq=False)
class HeadGroup:
    """Heads of a batch that hold the same number of entries, or nearly."""

    members: torch.Tensor  # (heads,) int64: row * kv_heads + KV head
    keys: torch.Tensor  # (heads, entries, head_dim)
    values: torch.Tensor  # (heads, entries, value_dim)
    padding: torch.Tensor | None  # (heads, entries) bool, True where nothing is; None: nowhere


def group_heads(
    keys: torch.Tensor, values: torch.Tensor, indices: torch.Tensor, counts: torch.Tensor
) -> tuple[HeadGroup, ...]:
    """Copy chosen entries, heads of equal length together.

    Args:
        keys: (batch, kv_heads, tokens, head_dim).
        values: (batch, kv_heads, tokens, value_dim).
        indices: (batch, kv_heads, slots) int64, ascending per head, unfilled slots in front.
        counts: (batch, kv_heads) int64, filled slots.
    """
    flat_counts, flat_indices = counts.flatten(), indices.flatten(0, 1)
    groups = []
    for shortest, longest in _spans(sorted(set(flat_counts.tolist()))):
        members = ((flat_counts >= shortest) & (flat_counts <= longest)).nonzero().squeeze(1)
        places = flat_indices[members, indices.shape[-1] - longest :]  # (heads, entries)
        where = (members // keys.shape[1]).unsqueeze(1), (members % keys.shape[1]).unsqueeze(1)
        missing = (longest - flat_counts[members]).unsqueeze(1)
        slot = torch.arange(longest, device=keys.device)
        padding = None if shortest == longest else slot < missing
        groups.append(HeadGroup(members, keys[(*where, places)], values[(*where, places)], padding))
    return tuple(groups)


def _spans(sizes: Sequence[int]) -> list[tuple[int, int]]:
    """(shortest, longest) of each group, for distinct lengths in ascending order."""
    if len(sizes) <= EXACT:
        return [(size, size) for size in sizes]
    spans: list[tuple[int, int]] = []
    for size in reversed(sizes):
        if spans and size * SLACK >= spans[-1][1] * (SLACK - 1):
            spans[-1] = (size, spans[-1][1])
        else:
            spans.append((size, size))
    return spans


def select_rows(
    groups: Iterable[HeadGroup], rows: torch.Tensor, kv_heads: int
) -> tuple[HeadGroup, ...]:
    """Copies for a new batch whose row i is the old row `rows[i]`."""
    found = []
    for group in groups:
        old = (group.members // kv_heads).to(rows.device)
        new, place = (rows.unsqueeze(1) == old).nonzero(as_tuple=True)
        new, place = new.to(group.keys.device), place.to(group.keys.device)
        if len(place):
            members = new * kv_heads + group.members[place] % kv_heads
            padding = None if group.padding is None else group.padding[place]
            found.append(HeadGroup(members, group.keys[place], group.values[place], padding))
    return tuple(found)


def uneven_attention(
    call: AttentionCall, groups: Sequence[HeadGroup], visible: torch.Tensor | None
) -> torch.Tensor:
    """Softmax attention over kept entries, all of them visible, and over later tokens.

    Args:
        call: The layer, with the keys and values of tokens that came after the eviction.
        groups: The kept entries; every KV head of every row is in exactly one group, and a group's
            members ascend.
        visible: (batch, 1, rows, later) bool, True where a row may look; None: everywhere.

    Returns:
        (batch, rows, heads, value_dim).
    """
    values, softcap = call.value, call.softcap
    batch, heads, rows, head_dim = call.query.shape
    kv_heads, later = call.key.shape[1:3]
    share = heads // kv_heads  # query heads a KV head
    pairs, queries = batch * kv_heads, share * rows

    def spread(tensor: torch.Tensor) -> torch.Tensor:
        """(batch, kv_heads, share, rows, x), expandable -> (pairs, queries, x)."""
        return tensor.expand(batch, kv_heads, share, rows, -1).reshape(pairs, queries, -1)

    def logits(asking: torch.Tensor, asked: torch.Tensor) -> torch.Tensor:
        found = asking @ asked.transpose(-1, -2)
        return found if softcap is None else torch.tanh(found / softcap) * softcap

    # 1. Later tokens, for all heads at once
    asking = call.query.reshape(pairs, queries, head_dim) * call.scaling
    late, late_values = logits(asking, call.key.flatten(0, 1)), values.flatten(0, 1)
    if visible is not None:
        late = late.masked_fill(~spread(visible.unsqueeze(2)), torch.finfo(late.dtype).min)
    if call.sinks is not None:
        column = spread(call.sinks.view(1, kv_heads, share, 1, 1)).to(late.dtype)
        late = torch.cat([late, column], dim=-1)
    # 2. Heads in the order of the groups; a single group has them in order
    if len(groups) > 1:
        order = torch.cat([group.members for group in groups])
        asking, late, late_values = asking[order], late[order], late_values[order]
    # 3. One softmax over both kinds, group by group
    found, begin = [], 0
    for group in groups:
        mine, size = slice(begin, begin + len(group.members)), group.keys.shape[1]
        early = logits(asking[mine], group.keys)  # (group's heads, queries, entries)
        if group.padding is not None:
            early = early.masked_fill(group.padding.unsqueeze(1), torch.finfo(early.dtype).min)
        both = torch.cat([early, late[mine]], dim=-1)
        shares = both.softmax(-1, dtype=torch.float32).to(values.dtype)
        from_late = shares[..., size : size + later] @ late_values[mine]
        found.append(torch.baddbmm(from_late, shares[..., :size], group.values))
        begin = mine.stop
    out = found[0]
    if len(groups) > 1:
        sorted_ = torch.cat(found)
        out = torch.empty_like(sorted_).index_copy_(0, order, sorted_)
    return out.view(batch, heads, rows, -1).transpose(1, 2).contiguous()

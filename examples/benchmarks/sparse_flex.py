"""Vertical-slash sparse attention by FlexAttention, one fused kernel: a candidate for CUDA.

Not part of the package: `sparse_prefill.py --device cuda` beside this file compares it with
gathered columns.
"""

from __future__ import annotations

import torch
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from draftsieve.core.speckv.sparse_prefill import SLASH

BLOCK = 128  # queries and keys of one block


def flex_sparse_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    columns: torch.Tensor,
    window: int,
    scaling: float,
) -> torch.Tensor:
    """The same as `sparse_attention`, which says what the arguments are.

    Blocks of 128 x 128 are skipped where nothing in them is visible, so it gains little where the
    columns are scattered. Without a compiler (on CPU) the whole matrix is formed: for tests only.
    """
    heads, tokens, _ = query.shape
    group = heads // key.shape[0]
    blocks = -(-tokens // BLOCK)
    picked = torch.zeros(key.shape[0], blocks * BLOCK, dtype=torch.bool, device=key.device)
    picked.scatter_(1, columns, True)

    def visible(
        batch: torch.Tensor, head: torch.Tensor, row: torch.Tensor, place: torch.Tensor
    ) -> torch.Tensor:
        near = place >= row // SLASH * SLASH - window
        return (near | picked[head // group, place]) & (place <= row)

    index = torch.arange(blocks, device=key.device)
    band = (index * BLOCK - window).div(BLOCK, rounding_mode="floor").unsqueeze(1)
    has_column = picked.view(key.shape[0], blocks, BLOCK).any(-1)
    needed = (index >= band) | has_column.unsqueeze(1)  # (kv_heads, query blocks, key blocks)
    needed = needed & (index <= index.unsqueeze(1))
    needed = needed.repeat_interleave(group, 0).unsqueeze(0)
    mask = BlockMask.from_kv_blocks(
        needed.sum(-1).int(),
        needed.int().argsort(dim=-1, descending=True, stable=True).int(),
        BLOCK_SIZE=BLOCK,
        mask_mod=visible,
        seq_lengths=(tokens, tokens),
    )
    run = torch.compile(flex_attention) if query.is_cuda else flex_attention
    states = query.unsqueeze(0), key.unsqueeze(0), value.unsqueeze(0)
    out = run(*states, block_mask=mask, scale=scaling, enable_gqa=group > 1)
    assert isinstance(out, torch.Tensor)  # no auxiliary output was asked for
    return out[0]

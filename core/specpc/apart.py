"""The draft reads passages apart from each other: each behind the prompt's beginning, alone.

Passages cannot see each other, and each one's positions go on from the prompt's beginning; what
follows the passages sees all of them. So attention costs what the longest passage does, and what a
passage is read as does not depend on its neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import DynamicCache, PreTrainedModel

from ..kv_cache.layers import StoppableCache, full_states, require_full_attention
from ..kv_cache.prefill import passes_of
from ..models.attention_capture import AttentionCallback, observing_until
from ..prompt.encoder import PromptTokens
from ..runtime.limits import check_deadline
from ..types import Segment

Block = tuple[int, int]  # first token of a passage, and the one behind it


def read_apart(
    model: PreTrainedModel,
    tokens: PromptTokens,
    callback: AttentionCallback,
    last: int | None = None,
) -> None:
    """Read a prompt with its passages apart; nothing is generated.

    Args:
        model: Full attention in every layer.
        tokens: The prompt.
        callback: Sees the pass over what follows the passages: its queries, and the keys of the
            whole prompt in the prompt's order.
        last: Index of the last layer that is wanted; None for all.

    Raises:
        ModelError: A layer is not plain full attention.
    """
    require_full_attention(model)
    last = model.config.get_text_config().num_hidden_layers - 1 if last is None else last
    ids, blocks = tokens.ids.to(model.device), passage_blocks(tokens)
    begin = blocks[0][0] if blocks else 0
    tail = blocks[-1][1] if blocks else 0
    cache = StoppableCache(config=model.config)
    with torch.no_grad():
        if begin:
            _read(model, ids[None, :begin], cache, torch.arange(begin)[None], None, last)
        parts = [cache, *_read_blocks(model, ids, blocks, cache, begin, last)]
        whole = _joined(model, parts, last)
        check_deadline()
        longest = max((stop - start for start, stop in blocks), default=0)
        positions = torch.arange(begin + longest, begin + longest + len(tokens) - tail)[None]
        _read(model, ids[None, tail:], whole, positions, callback, last)


def passage_blocks(tokens: PromptTokens) -> list[Block]:
    """Where each passage begins and ends; numbers and blank lines in front belong to it."""
    segment, passage = tokens.segment.tolist(), tokens.passage.tolist()
    found: list[Block] = []
    for place, index in enumerate(passage):
        if index < 0:
            continue
        if place and passage[place - 1] == index:
            found[-1] = (found[-1][0], place + 1)
            continue
        start = found[-1][1] if found else place
        while not found and start and segment[start - 1] == int(Segment.NUMBER):
            start -= 1
        found.append((start, place + 1))
    return found


def _read(
    model: PreTrainedModel,
    ids: torch.Tensor,
    cache: DynamicCache,
    positions: torch.Tensor,
    callback: AttentionCallback | None,
    last: int,
    mask: torch.Tensor | None = None,
) -> None:
    """One pass of (batch, new) ids behind a cache, up to the last layer that is wanted."""
    seen = cache.get_seq_length() + ids.shape[1]
    if mask is None:
        mask = torch.ones((ids.shape[0], seen), dtype=torch.int64, device=ids.device)
    with observing_until(model, callback, last):
        model.get_decoder()(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions.to(ids.device),
            past_key_values=cache,
            use_cache=True,
        )


def _read_blocks(
    model: PreTrainedModel,
    ids: torch.Tensor,
    blocks: Sequence[Block],
    prefix: DynamicCache,
    begin: int,
    last: int,
) -> list[DynamicCache]:
    """A cache for each passage that holds its own tokens only."""
    found: dict[int, DynamicCache] = {}
    lengths = [stop - start for start, stop in blocks]
    for rows in passes_of(model, lengths):
        size = max(lengths[row] for row in rows)
        padded = ids.new_zeros(len(rows), size)
        mask = torch.ones((len(rows), begin + size), dtype=torch.int64, device=ids.device)
        for place, row in enumerate(rows):
            padded[place, : lengths[row]] = ids[blocks[row][0] : blocks[row][1]]
            mask[place, begin + lengths[row] :] = 0
        cache = StoppableCache(config=model.config)
        for index, (keys, values) in enumerate(full_states(prefix)):
            shape = (len(rows), -1, -1, -1)
            cache.update(keys.expand(shape), values.expand(shape), index)
        positions = torch.arange(begin, begin + size).expand(len(rows), -1)
        _read(model, padded, cache, positions, None, last, mask)
        for place, row in enumerate(rows):
            found[row] = own = DynamicCache(config=model.config)
            for index, (keys, values) in enumerate(full_states(cache)):
                part = slice(place, place + 1), slice(None), slice(begin, begin + lengths[row])
                own.update(keys[part], values[part], index)
    return [found[row] for row in range(len(blocks))]


def _joined(model: PreTrainedModel, parts: Sequence[DynamicCache], last: int) -> DynamicCache:
    """The keys and values of all parts behind each other."""
    whole = StoppableCache(config=model.config)
    states = [full_states(part) for part in parts]
    for index in range(last + 1):
        layer = [found[index] for found in states if len(found) > index]
        if layer:
            keys, values = (torch.cat(list(each), dim=2) for each in zip(*layer, strict=True))
            whole.update(keys, values, index)
    return whole

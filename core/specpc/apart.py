"""The draft reads passages apart from each other: each behind the prompt's beginning, alone.

Passages cannot see each other, and each one's positions go on from the prompt's beginning; what
follows the passages sees all of them. So attention costs what the longest passage does, and what a
passage is read as does not depend on its neighbours.

In the same pass the draft may read the question behind each passage alone: how likely it finds it
there says which passage it is about (query likelihood: Ponte and Croft, 1998; by a language model
without training: arXiv 2204.07496).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from ..kv_cache.layers import StoppableCache, full_states, require_full_attention
from ..kv_cache.prefill import passes_of
from ..models.attention_capture import AttentionCallback, observing_until
from ..prompt.encoder import PromptTokens
from ..runtime.limits import check_deadline
from ..types import Segment

Block = tuple[int, int]  # first token of a passage, and the one behind it


@dataclass(frozen=True, slots=True, eq=False)
class _Asked:
    """What follows the passages, up to the question's end, and where the question stands in it."""

    ids: torch.Tensor  # (asked,) int64
    question: torch.Tensor  # (question,) int64, places in `ids`


def read_apart(
    model: PreTrainedModel,
    tokens: PromptTokens,
    callback: AttentionCallback,
    last: int | None = None,
    likelihood: bool = False,
) -> torch.Tensor | None:
    """Read a prompt with its passages apart; nothing is generated.

    Args:
        model: Full attention in every layer.
        tokens: The prompt.
        callback: Sees the pass over what follows the passages: its queries, and the keys of the
            whole prompt in the prompt's order.
        last: Index of the last layer that is wanted; None for all.
        likelihood: Read the question behind each passage alone too; passages then go through all
            layers.

    Returns:
        (passages,) float32, the mean log-probability of the question's tokens behind each passage,
        -inf for those without tokens; None where it is not wanted, or no question follows.

    Raises:
        ModelError: A layer is not plain full attention.
    """
    require_full_attention(model)
    last = model.config.get_text_config().num_hidden_layers - 1 if last is None else last
    ids, blocks = tokens.ids.to(model.device), passage_blocks(tokens)
    begin = blocks[0][0] if blocks else 0
    tail = blocks[-1][1] if blocks else 0
    cache = StoppableCache(config=model.config)
    asked = _question(tokens, tail) if likelihood else None
    stop = None if asked else last  # the layer at which passages stop
    found = torch.full((int(tokens.passage.max()) + 1 if len(tokens) else 0,), -torch.inf)
    with torch.no_grad():
        if begin:
            _read(model, ids[None, :begin], cache, torch.arange(begin)[None], None, stop)
        parts, likely = read_blocks(model, ids, blocks, cache, begin, stop, asked)
        whole = _joined(model, [cache, *parts], last)
        check_deadline()
        longest = max((stop - start for start, stop in blocks), default=0)
        positions = torch.arange(begin + longest, begin + longest + len(tokens) - tail)[None]
        _read(model, ids[None, tail:], whole, positions, callback, last)
    if asked is None:
        return None
    for (_, end), value in zip(blocks, likely, strict=True):
        found[int(tokens.passage[end - 1])] = value
    return found


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
    last: int | None,
    mask: torch.Tensor | None = None,
    logits: int = 0,
) -> torch.Tensor | None:
    """One pass of (batch, new) ids behind a cache, up to the last layer that is wanted.

    Without a last layer it is a whole pass, and gives the (batch, logits, vocabulary) newest ones.
    """
    seen = cache.get_seq_length() + ids.shape[1]
    if mask is None:
        mask = torch.ones((ids.shape[0], seen), dtype=torch.int64, device=ids.device)
    inputs: dict[str, Any] = {
        "input_ids": ids,
        "attention_mask": mask,
        "position_ids": positions.to(ids.device),
        "past_key_values": cache,
        "use_cache": True,
    }
    if last is None:
        check_deadline()
        return model(**inputs, logits_to_keep=max(1, logits)).logits  # type: ignore[no-any-return]
    with observing_until(model, callback, last):
        model.get_decoder()(**inputs)
    return None


def read_blocks(
    model: PreTrainedModel,
    ids: torch.Tensor,
    blocks: Sequence[Block],
    prefix: DynamicCache,
    begin: int,
    last: int | None,
    asked: _Asked | None,
) -> tuple[list[DynamicCache], list[float]]:
    """A cache for each passage that holds its own tokens only, and how likely the question is.

    Passages of a pass end in the same column, and the question begins in the next.
    """
    found: dict[int, DynamicCache] = {}
    likely = [0.0] * len(blocks)
    more = ids[:0] if asked is None else asked.ids.to(ids.device)
    lengths = [stop - start for start, stop in blocks]
    for rows in passes_of(model, lengths):
        size = max(lengths[row] for row in rows)
        columns = size + len(more)
        padded = ids.new_zeros(len(rows), columns)
        padded[:, size:] = more
        mask = torch.ones((len(rows), begin + columns), dtype=torch.int64, device=ids.device)
        positions = torch.zeros((len(rows), columns), dtype=torch.int64)
        for place, row in enumerate(rows):
            first = size - lengths[row]
            padded[place, first:size] = ids[blocks[row][0] : blocks[row][1]]
            mask[place, begin : begin + first] = 0
            positions[place] = (torch.arange(columns) - first).clamp(min=0) + begin
        cache = StoppableCache(config=model.config)
        for index, (keys, values) in enumerate(full_states(prefix)):
            shape = (len(rows), -1, -1, -1)
            cache.update(keys.expand(shape), values.expand(shape), index)
        logits = _read(model, padded, cache, positions, None, last, mask, len(more) + 1)
        if asked is not None and logits is not None:
            for row, value in zip(rows, _likelihoods(logits, asked).tolist(), strict=True):
                likely[row] = value
        for place, row in enumerate(rows):
            found[row] = own = DynamicCache(config=model.config)
            columns_of = slice(begin + size - lengths[row], begin + size)
            for index, (keys, values) in enumerate(full_states(cache)):
                part = slice(place, place + 1), slice(None), columns_of
                own.update(keys[part], values[part], index)
    return [found[row] for row in range(len(blocks))], likely


def _question(tokens: PromptTokens, tail: int) -> _Asked | None:
    """The question behind the passages; None where it stands elsewhere."""
    places = torch.nonzero(tokens.segment[tail:] == int(Segment.QUESTION)).squeeze(1)
    if not len(places) or not tail:
        return None
    return _Asked(tokens.ids[tail : tail + int(places[-1]) + 1], places)


def _likelihoods(logits: torch.Tensor, asked: _Asked) -> torch.Tensor:
    """(batch,) mean log-probability of the question, by (batch, asked + 1, vocabulary) logits."""
    wanted = logits[:, asked.question].float().log_softmax(-1)  # each predicts its own place
    said = asked.ids[asked.question].to(logits.device).expand(len(logits), -1)
    return wanted.gather(2, said.unsqueeze(2)).squeeze(2).mean(1)


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

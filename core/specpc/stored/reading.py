"""A question is read over stored passages: only the question's own tokens go through the draft.

The draft's pass runs over the fixed beginning and the question; in each layer the stored keys and
values are put between the two, at the positions that they were read at. So what the question sees
is what it would see if all passages had just been read apart (`../apart.py`), and the cost is that
of its own few tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel

from ...config import SpecPC
from ...kv_cache.layers import StoppableCache
from ...models.attention_capture import (
    AttentionCall,
    AttentionCallback,
    attention_output,
    attention_probabilities,
    observing,
    observing_until,
    weighted_values,
)
from ...prompt.encoder import PromptTokens
from ...store.codec import decode
from ...store.entries import Entry
from ...types import DraftReading
from ..draft_scores import NO_GUESS, Rows, row_weights, starting_layer
from ..head_weights import head_weights
from ..ranking import passages_to_ask
from .frame import Tail
from .layout import Layout

_AT_ONCE = 16  # passages behind which the question is read in one pass
Parts = Mapping[str, torch.Tensor]  # what the codec made, tokens first, heads second


@dataclass(frozen=True, slots=True, eq=False)
class StoredTokens:
    """What is stored of passages, behind each other."""

    keys: Parts  # each (tokens, key heads, ...)
    values: Parts  # each (tokens, value heads, ...)
    lengths: tuple[int, ...] = field(default=())  # tokens of each passage

    def of(self, passage: int) -> StoredTokens:
        """One of them, as views."""
        first = sum(self.lengths[:passage])
        own = slice(first, first + self.lengths[passage])
        cut = [
            {name: part[own] for name, part in parts.items()} for parts in (self.keys, self.values)
        ]
        return StoredTokens(cut[0], cut[1], (self.lengths[passage],))


@dataclass(frozen=True, slots=True, eq=False)
class Beginning:
    """Keys and values (1, kv_heads, prefix, width) of the fixed beginning, layer by layer."""

    states: tuple[tuple[torch.Tensor, torch.Tensor], ...]

    @property
    def tokens(self) -> int:
        """Its length."""
        return int(self.states[0][0].shape[2])

    def cache(self, model: PreTrainedModel, rows: int) -> StoppableCache:
        """A working cache of so many rows."""
        cache = StoppableCache(config=model.config)
        for layer, (keys, values) in enumerate(self.states):
            shape = (rows, -1, -1, -1)
            cache.update(keys.expand(shape), values.expand(shape), layer)
        return cache


def read_stored(
    model: PreTrainedModel,
    beginning: Beginning,
    layout: Layout,
    entries: Sequence[Entry | None],
    tail: Tail,
    tokens: PromptTokens,
    method: SpecPC,
    texts: Sequence[str],
    piece: int,
    also: AttentionCallback | None = None,
) -> DraftReading:
    """Score a prompt's tokens by a question over its stored passages.

    Args:
        model: The draft.
        beginning: Of the fixed prompt.
        layout: What is stored.
        entries: What is stored of each passage of the prompt; None for those without tokens.
        tail: The question and what stands around it.
        tokens: The prompt, whose tokens get the scores of the stored ones by their characters.
        method: Reduction or weights of heads, window and weighting; passages are read apart.
        texts: Of the passages.
        piece: Most tokens of a passage that were read at once.
        also: Sees the attention of the question's pass, for looking only.
    """
    stored, source = joined(entries), method.head_weights
    heads = None if source is None else head_weights(model, source)
    size = beginning.tokens + sum(stored.lengths) + len(tail.ids)
    window = min(method.window_size, method.capacity or size, len(tail.ids))
    weights = row_weights(torch.tensor([window]), window, method.weighted_query)
    seen = torch.ones((1, size), dtype=torch.bool, device=model.device)
    first = 0 if heads else starting_layer(model, method)
    rows = Rows(seen, weights.to(model.device), method, first, heads)
    last = layout.last_layer if heads is None else heads.last_layer
    positions = stands_at(beginning, entries, tail, piece)
    ask(model, beginning, layout, stored, tail, rows, last, positions, also)
    scores = rows.scores()[0].cpu()[beginning.tokens :]
    scores = scores if heads is None else heads.scores(scores)
    found, likely = _spread(scores, entries, tokens), None
    if method.likelihood_weight:
        likely = torch.full((len(entries),), -torch.inf)
        asked = passages_to_ask(texts, tokens, found, method)
        for start in range(0, len(asked), _AT_ONCE):
            some = asked[start : start + _AT_ONCE]
            alone = [stored.of(index) for index in some]
            likely[some] = likelihoods(model, beginning, layout, alone, tail)
    return DraftReading(found, NO_GUESS, likely)


def ask(
    model: PreTrainedModel,
    beginning: Beginning,
    layout: Layout,
    stored: StoredTokens,
    tail: Tail,
    rows: Rows,
    last: int,
    positions: torch.Tensor,
    also: AttentionCallback | None = None,
) -> None:
    """Read a question that sees all passages, up to the last layer that counts.

    Args:
        model: The draft.
        beginning: Of the fixed prompt.
        layout: What is stored.
        stored: The passages.
        tail: The question and what stands around it.
        rows: Takes the attention of the newest rows over beginning, passages and tail.
        last: Index of the last layer that is wanted.
        positions: (tail,) int64 where it stands.
        also: Sees the attention too, for looking only.
    """
    between = _Between(layout, [stored], beginning.tokens, rows)

    def watch(call: AttentionCall) -> torch.Tensor | None:
        if also is not None:
            also(call)
        return between(call)

    with torch.no_grad(), observing_until(model, watch, last):
        model.get_decoder()(**_inputs(model, beginning, tail, positions[None]))


def stands_at(
    beginning: Beginning, entries: Sequence[Entry | None], tail: Tail, piece: int
) -> torch.Tensor:
    """(tail,) int64: the positions of what follows passages, behind the longest of them."""
    longest = max((entry.rows for entry in entries if entry is not None), default=0)
    return torch.arange(len(tail.ids)) + beginning.tokens + min(piece, longest)


def likelihoods(
    model: PreTrainedModel,
    beginning: Beginning,
    layout: Layout,
    passages: Sequence[StoredTokens],
    tail: Tail,
) -> torch.Tensor:
    """How likely the question is behind each passage alone.

    Args:
        model: The draft.
        beginning: Of the fixed prompt.
        layout: What is stored: all layers.
        passages: Stored passages, one each.
        tail: The question and what stands around it.

    Returns:
        (passages,) float32, the mean log-probability of the question's tokens.
    """
    size = int(tail.question[-1]) + 1
    asked = Tail(tail.ids[:size], tail.segment[:size], tail.question)
    between = _Between(layout, passages, beginning.tokens, None)
    lengths = torch.tensor([sum(each.lengths) for each in passages])
    positions = torch.arange(len(asked.ids)) + beginning.tokens + lengths[:, None]
    inputs = _inputs(model, beginning, asked, positions)
    with torch.no_grad(), observing(model, between):
        logits = model(**inputs, logits_to_keep=(asked.question - 1).to(model.device)).logits
    said = asked.ids[asked.question].to(logits.device).expand(len(passages), -1)
    found: torch.Tensor = logits.float().log_softmax(-1).gather(2, said.unsqueeze(2))
    return found.squeeze(2).mean(1).cpu()


def _inputs(
    model: PreTrainedModel, beginning: Beginning, tail: Tail, positions: torch.Tensor
) -> dict[str, object]:
    count, size = len(positions), beginning.tokens + len(tail.ids)
    return {
        "input_ids": tail.ids.to(model.device).expand(count, -1),
        "attention_mask": torch.ones((count, size), dtype=torch.int64, device=model.device),
        "position_ids": positions.to(model.device),
        "past_key_values": beginning.cache(model, count),
        "use_cache": True,
    }


class _Between:
    """Attention of a pass over beginning and question, with stored passages between the two.

    Each row of the batch has passages of its own.
    """

    def __init__(
        self, layout: Layout, rows: Sequence[StoredTokens], begin: int, scoring: Rows | None
    ) -> None:
        self.layout, self.rows, self.begin, self.scoring = layout, rows, begin, scoring
        self.lengths = [sum(each.lengths) for each in rows]
        self.between = max(self.lengths)
        self.visible: torch.Tensor | None = None

    def __call__(self, call: AttentionCall) -> torch.Tensor | None:
        where = self.layout.key_range(call.layer)
        if where.start == where.stop:
            return None
        values = self.layout.value_range(call.layer)
        scored = self.scoring is not None and self.scoring.wants(call.layer)
        if not scored and values.start == values.stop:
            return None
        if self.visible is None:
            self.visible = self._visible(call)
        keys = self._inserted(call.key, [row.keys for row in self.rows], where, self.layout.keys)
        how = self.visible, call.scaling, call.softcap, call.sinks
        seen = attention_probabilities(call.query, keys, *how) if scored else None
        if seen is not None and self.scoring is not None:
            self.scoring.add(call.layer, seen[:, :, -self.scoring.weights.shape[1] :], 0)
        if values.start == values.stop:
            return None
        given = [row.values for row in self.rows]
        inside = self._inserted(call.value, given, values, self.layout.values)
        if seen is None:
            return attention_output(call.query, keys, inside, *how)
        return weighted_values(seen, inside).transpose(1, 2).to(call.query.dtype)

    def _visible(self, call: AttentionCall) -> torch.Tensor:
        """(batch, 1, rows, keys) bool: all of the beginning and the passages, the own tokens."""
        batch, _, rows, _ = call.query.shape
        seen = torch.zeros(batch, rows, call.key.shape[2] + self.between, dtype=torch.bool)
        seen[:, :, : self.begin] = True
        for row, length in enumerate(self.lengths):
            seen[row, :, self.begin : self.begin + length] = True
        seen[:, :, -rows:] = torch.ones(rows, rows).tril().bool()
        return seen.unsqueeze(1).to(call.key.device)

    def _inserted(
        self,
        own: torch.Tensor,
        stored: Sequence[Parts],
        where: slice,
        places: Sequence[tuple[int, int]],
    ) -> torch.Tensor:
        """(batch, kv_heads, begin + passages + rows, width) float32."""
        batch, heads, size, width = own.shape
        shape, begin = (batch, heads, size + self.between, width), self.begin
        held = [head for _, head in places[where]]
        full = len(held) == heads and batch == 1
        out = (torch.empty if full else torch.zeros)(shape)
        out[:, :, :begin] = own[:, :, :begin]
        out[:, :, begin + self.between :] = own[:, :, begin:]
        for row, (parts, length) in enumerate(zip(stored, self.lengths, strict=True)):
            place = out[row, :, begin : begin + length].transpose(0, 1)  # (length, heads, width)
            if len(held) == heads:
                decode(parts, self.layout.codec, where, place)
            else:
                place[:, held] = decode(parts, self.layout.codec, where)
        return out.to(own.device)


def joined(entries: Sequence[Entry | None]) -> StoredTokens:
    """Stored passages behind each other."""
    full = [entry for entry in entries if entry is not None]
    lengths = tuple(0 if entry is None else entry.rows for entry in entries)

    def parts(kind: str) -> Mapping[str, torch.Tensor]:
        names = [n for n in (full[0].tensors if full else ()) if n.startswith(f"{kind}.")]
        return {n.removeprefix(f"{kind}."): torch.cat([e.tensors[n] for e in full]) for n in names}

    return StoredTokens(parts("keys"), parts("values"), lengths)


def _spread(
    scores: torch.Tensor, entries: Sequence[Entry | None], tokens: PromptTokens
) -> torch.Tensor:
    """(tokens,) scores of a prompt's tokens, from those of stored ones by their characters."""
    found, first = torch.zeros(len(tokens)), 0
    for index, entry in enumerate(entries):
        if entry is None:
            continue
        own = scores[first : first + entry.rows]
        first += entry.rows
        mine = (tokens.passage == index).nonzero().squeeze(1)
        ends = entry.tensors["bounds"][:, 1].contiguous()
        places = torch.searchsorted(ends, tokens.start[mine].contiguous(), right=True)
        found[mine] = own[places.clamp(max=len(own) - 1)]
    return found

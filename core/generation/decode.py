"""Target decoding: one loop for greedy and sampled answers, alone or in left-padded batches.

Our own loop instead of `model.generate`: each row draws from its own seeded generator (so a
request's output does not depend on what runs beside it), a row leaves the batch when it is
finished, a consumer cancels by closing the iterator, and nothing global is touched.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import cast

import torch
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream
from transformers import PreTrainedModel

from ..config import Generation
from ..kv_cache.layers import attending
from ..kv_cache.prefill import Start, from_scratch
from ..runtime.limits import check_deadline
from .constrained import Constraint
from .sampling import Sampler
from .speculative.tree_attention import TreeReader, obstacle
from .speculative.verify import Speculation, verified_tokens


class Batch:
    """Rows that a model continues side by side; the KV cache lives as long as the batch.

    Args:
        model: The target.
        start: Its cache, and what each row feeds next.
        samplers: One for each row.
    """

    def __init__(self, model: PreTrainedModel, start: Start, samplers: Sequence[Sampler]) -> None:
        self.model, self.cache, self.samplers = model, start.cache, list(samplers)
        self.feed, self.mask, self.positions = start.feed, start.mask, start.positions

    def step(self) -> list[int]:
        """Read what each row feeds, and choose its next token."""
        check_deadline()
        with torch.no_grad(), attending(self.model, self.cache):
            logits = self.model(
                input_ids=self.feed,
                attention_mask=self.mask,
                position_ids=self.positions,
                past_key_values=self.cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits[:, -1]  # (batch, vocabulary)
        chosen = [sampler.choose(row) for sampler, row in zip(self.samplers, logits, strict=True)]
        self.feed = torch.tensor(chosen, device=self.mask.device).unsqueeze(1)
        self.mask = torch.cat([self.mask, torch.ones_like(self.mask[:, :1])], dim=1)
        self.positions = self.positions[:, -1:] + 1
        return chosen

    def keep(self, rows: Sequence[int]) -> None:
        """Let only some rows go on; the others' share of the cache is freed."""
        if len(rows) == len(self.samplers):
            return
        places = torch.tensor(rows, device=self.mask.device)
        # it selects too, and every kind of layer has it
        self.cache.reorder_cache(cast(torch.LongTensor, places))
        self.samplers = [self.samplers[row] for row in rows]
        self.feed, self.mask = self.feed[places], self.mask[places]
        self.positions = self.positions[places]


def next_tokens(
    model: PreTrainedModel,
    prompts: Sequence[torch.Tensor],
    generation: Generation,
    start: Start | None = None,
    constraints: Sequence[Constraint | None] | None = None,
    speculation: Speculation | None = None,
) -> Iterator[list[int]]:
    """Generate token by token; close the iterator to stop, which frees the KV cache.

    Args:
        model: The target.
        prompts: One (tokens,) int64 tensor per row.
        generation: Sampling options of all rows; `max_new_tokens` bounds the steps, end tokens do
            not.
        start: A prefilled cache; None reads the prompts.
        constraints: Where each row stands in its grammar, or None for rows without one.
        speculation: Drafts for a single row; where the model or the cache cannot verify them, its
            tally says why and decoding goes on without.

    Yields:
        The next token of every row.
    """
    grammars = constraints or [None] * len(prompts)
    samplers = [Sampler(p, generation, c) for p, c in zip(prompts, grammars, strict=True)]
    batch = Batch(model, start or from_scratch(model, prompts), samplers)
    yield from _tokens(batch, generation.max_new_tokens, prompts[0], speculation)


def _tokens(
    batch: Batch, limit: int, prompt: torch.Tensor, speculation: Speculation | None
) -> Generator[list[int]]:
    """The next token of every row that is in the batch when its step comes."""
    yield (chosen := batch.step())
    if speculation is not None and _can_verify(batch, speculation):
        reader = TreeReader(batch.model, batch.cache, batch.mask[:, :-1])
        choose, said = batch.samplers[0].choose, prompt.tolist()
        for token in verified_tokens(reader, choose, speculation, said, chosen[0], limit - 1):
            yield [token]
        return
    for _ in range(limit - 1):
        yield batch.step()


def _can_verify(batch: Batch, speculation: Speculation) -> bool:
    tally = speculation.tally
    tally.note = tally.note or obstacle(batch.model, batch.cache)
    return tally.note is None


@dataclass(slots=True)
class RowText:
    """Turns one row's tokens into text as they come, and knows when the row is finished.

    A character whose last bytes never come is left out. Text that may become a stop string is
    held back until that is decided. Where a grammar leaves nothing to say, the row is finished.
    """

    tokenizer: Tokenizer
    ends: frozenset[int]
    stop: tuple[str, ...]
    limit: int
    constraint: Constraint | None = None
    tokens: int = 0
    finish_reason: str | None = None
    _held: str = ""
    _stream: DecodeStream = field(default_factory=lambda: DecodeStream(skip_special_tokens=True))

    def push(self, token: int) -> str:
        """Take the next token and return the text that is now certain (often empty)."""
        self.tokens += 1
        if token in self.ends:
            return self._finish("stop")
        self._held += self._stream.step(self.tokenizer, token) or ""
        found = [place for text in self.stop if (place := self._held.find(text)) >= 0]
        if found:
            self._held = self._held[: min(found)]
            return self._finish("stop_string")
        if self.constraint is not None and self.constraint.complete:
            return self._finish("stop")
        if self.tokens >= self.limit:
            return self._finish("length")
        ready = len(self._held) - self._undecided()
        text, self._held = self._held[:ready], self._held[ready:]
        return text

    def _finish(self, reason: str) -> str:
        self.finish_reason = reason
        text, self._held = self._held, ""
        return text

    def _undecided(self) -> int:
        """Length of the longest tail that a stop string starts with."""
        longest = 0
        for text in self.stop:
            for size in range(min(len(text) - 1, len(self._held)), longest, -1):
                if self._held.endswith(text[:size]):
                    longest = size
                    break
        return longest


def decode_text(
    model: PreTrainedModel,
    prompts: Sequence[torch.Tensor],
    generation: Sequence[Generation],
    rows: Sequence[RowText],
    start: Start | None = None,
    speculation: Speculation | None = None,
) -> Iterator[list[str]]:
    """Generate until every row is finished; yields each row's new text at every step.

    A finished row leaves the batch: it is fed no further, and its grammar stays where it is.
    """
    each = zip(prompts, generation, rows, strict=True)
    samplers = [Sampler(prompt, options, row.constraint) for prompt, options, row in each]
    batch = Batch(model, start or from_scratch(model, prompts), samplers)
    places = list(range(len(rows)))  # of the rows that are still in the batch
    limit = max(options.max_new_tokens for options in generation)
    with closing(_tokens(batch, limit, prompts[0], speculation)) as steps:
        for chosen in steps:
            pieces = [""] * len(rows)
            for place, token in zip(places, chosen, strict=True):
                pieces[place] = rows[place].push(token)
            yield pieces
            going = [i for i, place in enumerate(places) if rows[place].finish_reason is None]
            if not going:
                return
            batch.keep(going)
            places = [places[i] for i in going]

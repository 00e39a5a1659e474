"""Target decoding: one loop for greedy and sampled answers, alone or in left-padded batches.

Our own loop instead of `model.generate`: each row draws from its own seeded generator (so a
request's output does not depend on what runs beside it), rows join while others go on and leave
when they are finished, a consumer cancels by dropping the batch, and nothing global is touched.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from transformers import PreTrainedModel

from ..config import Generation
from ..kv_cache.batch import can_go_on_together
from ..kv_cache.prefill import Start, from_scratch
from ..kv_cache.rows import Rows
from .constrained import Constraint
from .row_text import RowText
from .sampling import Sampler
from .speculative.tree_attention import TreeReader, obstacle, rotation_border
from .speculative.verify import Speculation, verified_tokens


class Row:
    """One answer on its way.

    Args:
        prompt: (tokens,) int64 that the target has read or will read.
        options: How its tokens are chosen.
        text: What they say, and where that ends.
    """

    def __init__(self, prompt: torch.Tensor, options: Generation, text: RowText) -> None:
        self.prompt, self.options, self.text = prompt, options, text
        self.sampler = Sampler(prompt, options, text.constraint)
        self.error: Exception | None = None  # what ended it before it was finished

    @property
    def finished(self) -> bool:
        """Whether nothing more is to be said."""
        return self.error is not None or self.text.finish_reason is not None

    def choose(self, logits: torch.Tensor) -> int:
        """The next token by (vocabulary,) logits; a failure ends this row alone."""
        try:
            return self.sampler.choose(logits)
        except Exception as error:  # noqa: BLE001 - whoever asked for the row is told
            self.error = error
            return 0


class Batch:
    """Answers that a target goes on with side by side, one token a step.

    Args:
        model: The target.
        start: Its cache, and what each row feeds first.
        rows: The answers; those that are finished leave.
        speculation: Drafts for a single row; where the model or the cache cannot verify them, its
            tally says why and decoding goes on without.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        start: Start,
        rows: Sequence[Row],
        speculation: Speculation | None = None,
    ) -> None:
        self.rows, self._state = list(rows), Rows(model, start)
        self._speculation = speculation
        self._verified: Iterator[int] | None = None  # the tokens to come, where drafts are verified

    def step(self) -> list[tuple[Row, str]]:
        """Every row's next token, as the text that is now certain; finished rows then leave.

        A pass that fails or is broken off ends the batch and frees its cache.
        """
        try:
            tokens = self._tokens()
        except BaseException:
            self._verified = None
            self._state.drop()
            raise
        said = [
            (row, "" if row.error is not None else row.text.push(token))
            for row, token in zip(self.rows, tokens, strict=True)
        ]
        self.leave([row for row in self.rows if row.finished])
        return said

    def leave(self, rows: Sequence[Row]) -> None:
        """Let some rows go, finished or not."""
        staying = [place for place, row in enumerate(self.rows) if row not in rows]
        if staying:
            self._state.keep(staying)
        self.rows = [self.rows[place] for place in staying]

    def can_join(self, other: Batch) -> bool:
        """Whether each row gets the same beside those of another batch as it gets alone."""
        return self._goes_with_others and other._goes_with_others

    def join(self, other: Batch) -> None:
        """Take in another batch's rows; both have made a step."""
        self._state.join(other._state)
        self.rows += other.rows

    @property
    def _goes_with_others(self) -> bool:
        model, cache = self._state.model, self._state.cache
        lengths_matter, _ = rotation_border(model.config.get_text_config())
        return self._verified is None and lengths_matter is None and can_go_on_together(cache)

    def _tokens(self) -> list[int]:
        if self._verified is not None:
            return [next(self._verified)]
        logits = self._state.read()
        tokens = [row.choose(its) for row, its in zip(self.rows, logits, strict=True)]
        if self._speculation is not None:
            row, limit = self.rows[0], self.rows[0].options.max_new_tokens
            self._verified = _verified(
                self._state, row.sampler, row.prompt, self._speculation, tokens[0], limit
            )
            self._speculation = None
        if self._verified is None:
            self._state.feed(tokens)
        return tokens


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
        speculation: As for `Batch`.

    Yields:
        The next token of every row.
    """
    state, limit = Rows(model, start or from_scratch(model, prompts)), generation.max_new_tokens
    grammars = constraints or [None] * len(prompts)
    samplers = [Sampler(p, generation, c) for p, c in zip(prompts, grammars, strict=True)]
    for step in range(limit):
        tokens = [its.choose(row) for its, row in zip(samplers, state.read(), strict=True)]
        yield tokens
        if step == 0 and speculation is not None:
            verified = _verified(state, samplers[0], prompts[0], speculation, tokens[0], limit)
            if verified is not None:
                yield from ([token] for token in verified)
                return
        state.feed(tokens)


def _verified(
    state: Rows,
    sampler: Sampler,
    prompt: torch.Tensor,
    speculation: Speculation,
    first: int,
    limit: int,
) -> Iterator[int] | None:
    """What follows a row's first token, with drafts; None where nothing can verify them."""
    tally = speculation.tally
    tally.note = tally.note or obstacle(state.model, state.cache)
    if tally.note is not None:
        return None
    reader = TreeReader(state.model, state.cache, state.mask)
    said = prompt.tolist()
    return verified_tokens(reader, sampler.choose, speculation, said, first, limit - 1)

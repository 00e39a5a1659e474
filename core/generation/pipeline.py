"""The stages of a request behind `Engine`, in order.

compress (SpecPC) -> encode -> plan the eviction (SpecKV) -> evict while reading -> decode.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..config import Generation, Method, OnError, SpecPC, stages
from ..errors import PromptError
from ..kv_cache.layers import has_sliding_layers
from ..kv_cache.prefill import Start, from_scratch
from ..models.footprint import explain_out_of_memory
from ..models.loading import end_token_ids
from ..prompt.encoder import PromptEncoder, PromptTokens
from ..prompt.messages import Prompt
from ..request import Memories, Request, earliest
from ..runtime.limits import Clock, until
from ..specpc.draft import DraftModel
from ..specpc.pipeline import compress
from ..specpc.sparse_positions import kept_places, start_at
from ..types import Chunk
from .answer import AnswerChunks
from .constrained import Grammars
from .decode import Batch, Row
from .eviction import new_guesses, plan_evictions, start_evictions
from .pair import Pair
from .row_text import RowText
from .speculative.drafters.store import TrigramStore
from .speculative.select import Drafters, DraftPlan
from .speculative.verify import Speculation


class Pipeline:
    """Runs requests through a target and, where a method asks for it, a draft.

    Args:
        target: The model that answers.
        tokenizer: Its tokenizer.
        encoder: Its prompt encoder.
        draft: The model that reads first, or None.
        draft_store: Tri-grams for drafting, shared with whoever else has them; None for own ones.
    """

    def __init__(
        self,
        target: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        encoder: PromptEncoder,
        draft: DraftModel | None,
        draft_store: TrigramStore | None = None,
    ) -> None:
        self.pair = Pair(target, tokenizer, encoder, draft)
        self.drafters = Drafters(
            tokenizer, self.pair.models["draft"], self.pair.same_tokens, draft_store
        )
        self._grammars = Grammars(tokenizer.backend_tokenizer)
        self._models = self.pair.models

    def stream(
        self,
        prompt: Prompt,
        method: Method | None,
        options: Generation,
        on_error: OnError,
        memories: Memories | None = None,
    ) -> Iterator[Chunk]:
        """One request piece by piece; the last chunk carries the answer."""
        (request,) = self.prepare([prompt], method, [options], on_error, memories)
        chunks = AnswerChunks(request)
        for (piece,) in self.decode([request]):
            yield from chunks.of(piece)
        yield chunks.last()

    def prepare(
        self,
        prompts: Sequence[Prompt],
        method: Method | None,
        options: Sequence[Generation],
        on_error: OnError,
        memories: Memories | None = None,
    ) -> list[Request]:
        """All that happens before the target reads; each prompt gets what it gets alone.

        Args:
            prompts: What is asked; the draft reads and guesses as a batch.
            method: How to compress; None reads everything.
            options: Of each prompt.
            on_error: What a failed compression does.
            memories: What is known of a single prompt's beginning.
        """
        specpc, speckv = stages(method)
        for own in options:
            if own.drafting is not None:
                self.drafters.check(own.drafting)
        requests = [Request(*each, memories) for each in zip(prompts, options, strict=True)]
        with until(earliest(requests)):
            if specpc is not None:
                with explain_out_of_memory("", **self._models):
                    compress(self.pair.need_draft(), requests, specpc, on_error)
            for request in requests:
                self._encode(request, specpc)
            if speckv is not None:
                plan_evictions(self.pair, requests, speckv, on_error)
        for request in requests:
            request.row, request.drafts = self._row(request), self._plan_drafts(request)
        return requests

    def decode(
        self, requests: Sequence[Request], start: Start | None = None
    ) -> Iterator[list[str]]:
        """Read the prompts and generate as one batch; yields each request's new text.

        Evicted caches of models with sliding windows cannot be padded: those run one by one.

        Args:
            requests: Prepared ones.
            start: What `begin` gave for them, where it was called before.
        """
        evicts = any(request.eviction is not None for request in requests)
        if len(requests) > 1 and evicts and has_sliding_layers(self.pair.target):
            for place, request in enumerate(requests):
                for (piece,) in self.decode([request]):
                    yield [piece if i == place else "" for i in range(len(requests))]
            return
        batch, said = self.prefill(requests, start)
        while True:
            if error := next((row.error for row, _ in said if row.error is not None), None):
                raise error
            pieces = dict(said)
            yield [pieces.get(request.row, "") for request in requests]
            if not batch.rows:
                return
            said = self.step(batch, requests, earliest(requests))

    def prefill(
        self, requests: Sequence[Request], start: Start | None = None
    ) -> tuple[Batch, list[tuple[Row, str]]]:
        """Let the target read prompts, evicting on the way where asked; the first text of each."""
        with until(earliest(requests)), explain_out_of_memory(_describe(requests), **self._models):
            speculation = self._speculate(requests)
            with _clocked(requests, "prefill"):
                batch = self._batch(requests, start or self.begin(requests), speculation)
                return batch, batch.step()

    def _batch(
        self, requests: Sequence[Request], start: Start | None, speculation: Speculation | None
    ) -> Batch:
        """The requests' rows; who holds `start` meanwhile would keep its cache."""
        ids, rows = [request.ids for request in requests], [request.row for request in requests]
        target = self.pair.target
        return Batch(target, start or from_scratch(target, ids), rows, speculation)

    def step(
        self, batch: Batch, requests: Sequence[Request], deadline: float | None
    ) -> list[tuple[Row, str]]:
        """The next text of each row of a batch.

        Args:
            batch: What `prefill` made.
            requests: Whose rows these are; their clocks go on.
            deadline: When nobody waits for any of them any more.
        """
        with (
            until(deadline),
            explain_out_of_memory(_describe(requests), **self._models),
            _clocked(requests, "decode"),
        ):
            return batch.step()

    def _encode(self, request: Request, specpc: SpecPC | None) -> None:
        """Count and number the target's tokens, of what is left and of the original."""
        pair, shorter = self.pair, request.shorter
        with request.clock("encode"):
            request.tokens = request.original = pair.encoder.encode(shorter)
            if shorter is not request.prompt:
                request.original = pair.encoder.encode(request.prompt)
        if pair.context_window is not None and len(request.tokens) > pair.context_window:
            raise PromptError(
                f"The prompt has {len(request.tokens)} tokens, the target reads at most "
                f"{pair.context_window}: give fewer passages, or compress them "
                f"(method=SpecPC(capacity={pair.context_window // 2}))."
            )
        if specpc is not None and specpc.positions == "keep":
            _keep_positions(request, pair.context_window)

    def _row(self, request: Request) -> Row:
        """The answer to come, ended by the generation's limit or the target's window."""
        options, ends = request.generation, frozenset(end_token_ids(self.pair.target).tolist())
        size = len(request.tokens if request.positions is None else request.original)
        room = (self.pair.context_window or size + options.max_new_tokens) - size
        grammar = options.grammar
        text = RowText(
            tokenizer=self.pair.tokenizer.backend_tokenizer,
            ends=ends,
            stop=options.stop,
            limit=max(1, min(options.max_new_tokens, room)),
            constraint=None if grammar is None else self._grammars.start(grammar, ends),
        )
        return Row(request.ids, options, text)

    def _plan_drafts(self, request: Request) -> DraftPlan | None:
        """What drafting starts from; a guess is made later, and only where nobody made one yet."""
        if request.generation.drafting is None:
            return None
        guess = None if request.eviction is None else request.eviction.lookahead
        own = request.draft_guess
        if guess is None and own is not None and own.numel() > 1:
            guess = self.pair.translated(own)
        return DraftPlan(
            request.generation.drafting,
            request.ids,
            request.original.ids,
            guess if guess is not None and guess.numel() else None,
            lambda: new_guesses(self.pair, [request])[0],
        )

    def _speculate(self, requests: Sequence[Request]) -> Speculation | None:
        """The drafter of a request that runs alone; others are told why they have none."""
        for request in requests:
            if request.drafts is None:
                continue
            if len(requests) > 1:
                request.drafts.tally.note = f"decoded in a batch of {len(requests)} prompts"
            elif request.positions is not None:
                request.drafts.tally.note = 'tokens stand at their old positions (positions="keep")'
            else:
                with request.clock("draft"):
                    return self.drafters.start(request.drafts)
        return None

    def begin(self, requests: Sequence[Request]) -> Start | None:
        """Where decoding begins, evicted if asked for; None to read the prompts as they are."""
        target, memory = self.pair.target, requests[0].target_memory
        ids = [request.ids for request in requests]
        if any(request.eviction is not None for request in requests):
            return start_evictions(self.pair, requests)
        if any(request.positions is not None for request in requests):
            return start_at(target, ids, [request.positions for request in requests])
        return None if memory is None else memory.start(target, ids[0])


@contextmanager
def _clocked(requests: Sequence[Request], stage: str) -> Iterator[None]:
    """Add the block's seconds to each request's stage."""
    clock = Clock()
    try:
        with clock(stage):
            yield
    finally:
        for request in requests:
            request.clock.add(clock.seconds)


def _keep_positions(request: Request, window: int | None) -> None:
    """Let the target read the kept tokens of the original prompt where they stand."""
    context, original = request.context, request.original
    if context is None or not context.stats.compressed:
        return
    if window is not None and len(original) > window:
        raise PromptError(
            f'positions="keep", but the whole prompt has {len(original)} tokens and the '
            f'target knows positions below {window} only: use positions="reset".'
        )
    spans = ((span.passage_index, span.start, span.end) for span in context.spans)
    request.positions = kept_places(original, spans)
    columns = (original.ids, original.segment, original.passage, original.start, original.end)
    request.tokens = PromptTokens(*(column[request.positions] for column in columns))


def _describe(requests: Sequence[Request]) -> str:
    """What is done and how large it is, for an error message."""
    longest = max(len(request.tokens) for request in requests)
    count = "a prompt of" if len(requests) == 1 else f"{len(requests)} prompts of up to"
    kept = [request.eviction.capacity for request in requests if request.eviction is not None]
    cache = f"a cache capacity of {max(kept):,} entries" if kept else "a full cache, no SpecKV"
    return f"answering {count} {longest:,} tokens ({cache})"

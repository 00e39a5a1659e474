"""The stages of a request behind `Engine`, in order.

compress (SpecPC) -> encode -> plan the eviction (SpecKV) -> evict while reading -> decode.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..config import Generation, Method, OnError, SpecPC, stages
from ..errors import PromptError
from ..kv_cache.layers import has_sliding_layers
from ..kv_cache.prefill import Start
from ..models.footprint import explain_out_of_memory
from ..models.loading import end_token_ids
from ..prompt.encoder import PromptEncoder, PromptTokens
from ..prompt.messages import Prompt
from ..prompt.tool_calls import ToolReader, parse_tool_calls
from ..request import Memories, Request, earliest
from ..runtime.limits import Clock, until
from ..specpc.draft import DraftModel
from ..specpc.pipeline import compress
from ..specpc.sparse_positions import kept_places, start_at
from ..types import Answer, Chunk, Usage
from .constrained import Grammars
from .decode import RowText, decode_text
from .eviction import new_guesses, plan_evictions, start_evictions
from .pair import Pair
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
        reader = ToolReader(_calls_first(request)) if prompt.tools else None
        text = ""
        for (piece,) in self.decode([request]):
            text += piece
            said, calls = (piece, ()) if reader is None else reader.push(piece)
            if said or calls:
                yield Chunk(said, tool_calls=calls)
        yield Chunk("" if reader is None else reader.close(), answer_of(request, text))

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
                with explain_out_of_memory("", **self.pair.models):
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
        deadline, stage = earliest(requests), "prefill"
        with explain_out_of_memory(_describe(requests), **self.pair.models):
            with until(deadline):
                speculation = self._speculate(requests)
            steps = self._steps(requests, speculation, start)
            while True:
                clock = Clock()
                with until(deadline), clock(stage):
                    pieces = next(steps, None)
                for request in requests:
                    request.clock.add(clock.seconds)
                if pieces is None:
                    return
                yield pieces
                stage = "decode"

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

    def _row(self, request: Request) -> RowText:
        """The answer to come, ended by the generation's limit or the target's window."""
        options, ends = request.generation, frozenset(end_token_ids(self.pair.target).tolist())
        size = len(request.tokens if request.positions is None else request.original)
        room = (self.pair.context_window or size + options.max_new_tokens) - size
        grammar = options.grammar
        return RowText(
            tokenizer=self.pair.tokenizer.backend_tokenizer,
            ends=ends,
            stop=options.stop,
            limit=max(1, min(options.max_new_tokens, room)),
            constraint=None if grammar is None else self._grammars.start(grammar, ends),
        )

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

    def _steps(
        self,
        requests: Sequence[Request],
        speculation: Speculation | None,
        start: Start | None,
    ) -> Iterator[list[str]]:
        """Evict while the prompts are read, if a method asks for it, and decode."""
        ids = [request.ids for request in requests]
        options = [request.generation for request in requests]
        rows = [request.row for request in requests]
        begun = self.begin(requests) if start is None else start
        yield from decode_text(self.pair.target, ids, options, rows, begun, speculation)

    def begin(self, requests: Sequence[Request]) -> Start | None:
        """Where decoding begins, evicted if asked for; None to read the prompts as they are."""
        target, memory = self.pair.target, requests[0].target_memory
        if any(request.eviction is not None for request in requests):
            return start_evictions(self.pair, requests)
        if any(request.positions is not None for request in requests):
            places = [request.positions for request in requests]
            return start_at(target, [request.ids for request in requests], places)
        return None if memory is None else memory.start(target, requests[0].ids)


def answer_of(request: Request, text: str) -> Answer:
    """What a request that has been decoded gives back."""
    plan, tools = request.eviction, request.prompt.tools
    parts = parse_tool_calls(text, _calls_first(request)) if tools else (text, (), ())
    said, calls, broken = parts
    entries = None if plan is None else plan.capacity
    return Answer(
        text=said,
        spans=() if request.context is None else request.context.spans,
        usage=Usage(len(request.original), len(request.tokens), request.row.tokens, entries),
        timings=dict(request.clock.seconds),
        finish_reason=request.row.finish_reason or "length",
        lookahead=None if plan is None else plan.text,
        context=request.context,
        cache_bytes=request.cache_bytes if plan is not None else None,
        tool_calls=calls,
        broken_calls=broken,
        drafting=None if request.drafts is None else request.drafts.tally.value(),
        fallback=request.fallback,
    )


def _calls_first(request: Request) -> bool:
    """Tool calls stand at the answer's beginning or nowhere."""
    grammar = request.generation.grammar
    return grammar is not None and grammar.calls_first


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

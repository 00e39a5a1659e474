"""The stages of a request behind `Engine`: compress, encode, guess, evict, decode."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .cache import cache_bytes, has_sliding_layers
from .clock import Clock
from .compressor import Compressor, OnError
from .config import Generation, Method, SpecKV
from .constrained import Grammars
from .deadline import deadline_after, until
from .decode import RowText, decode_text
from .draft import end_token_ids
from .drafters.store import TrigramStore
from .drafting import Drafters, DraftPlan
from .encoding import PromptEncoder
from .errors import NO_DRAFT, BudgetError, ModelError, PromptError
from .lookahead import look_ahead
from .memory import Memory
from .models import context_window, explain_out_of_memory
from .prompt import Prompt
from .speckv import evict, token_capacity
from .tools import ToolReader, parse_tool_calls
from .tracing import stages
from .types import Answer, Chunk, CompressedContext, PromptTokens, Usage
from .verify import Speculation

MAX_LOOKAHEAD = 256  # tokens that the draft guesses at most unless the method says otherwise


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt on its way through the engine."""

    ids: torch.Tensor  # (tokens,) what the target reads
    original_tokens: int
    context: CompressedContext | None
    options: Generation
    clock: Clock
    row: RowText
    eviction: EvictionPlan | None
    memory: Memory | None  # of the prompt's beginning; requests with one run alone
    reads_tools: bool  # the answer may hold tool calls
    deadline: float | None
    drafts: DraftPlan | None  # None: no drafting
    sizes: dict[str, int] = field(default_factory=dict)  # bytes, filled in on the way

    @property
    def protected(self) -> torch.Tensor:
        """(tokens,) bool: KV entries that always stay."""
        plan = self.eviction
        return torch.ones_like(self.ids, dtype=torch.bool) if plan is None else plan.protected

    def answer(self, text: str) -> Answer:
        entries = None if self.eviction is None else self.eviction.capacity
        said, calls, broken = parse_tool_calls(text) if self.reads_tools else (text, (), ())
        return Answer(
            text=said,
            spans=() if self.context is None else self.context.spans,
            usage=Usage(self.original_tokens, self.ids.numel(), self.row.tokens, entries),
            timings=dict(self.clock.seconds),
            finish_reason=self.row.finish_reason or "length",
            lookahead=None if self.eviction is None else self.eviction.text,
            context=self.context,
            cache_bytes=None if entries is None else self.sizes.get("cache"),
            tool_calls=calls,
            broken_calls=broken,
            drafting=None if self.drafts is None else self.drafts.tally.value(),
        )


@dataclass(frozen=True, slots=True)
class EvictionPlan:
    """What SpecKV needs for one request."""

    method: SpecKV
    capacity: int
    lookahead: torch.Tensor  # (guessed,) int64, the target's tokens
    text: str
    protected: torch.Tensor  # (tokens,) bool


def _protected_entries(tokens: PromptTokens, method: SpecKV, capacity: int) -> torch.Tensor:
    """(tokens,) bool: all but the passages; without passages the paper's window.

    Raises:
        BudgetError: They exceed the capacity.
    """
    if bool(tokens.protected.all()):
        place = torch.arange(len(tokens))
        return place >= len(tokens) - 1 - min(method.window_size, capacity)
    fixed = int(tokens.protected[:-1].sum())
    if fixed > capacity:
        raise BudgetError(
            f"SpecKV capacity={capacity}, but question, system text and template alone take "
            f"{fixed} entries. Raise the capacity, or give a ratio."
        )
    return tokens.protected


def _describe(requests: Sequence[Request]) -> str:
    """What is done and how large it is, for an error message."""
    longest = max((request.ids.numel() for request in requests), default=0)
    count = "a prompt of" if len(requests) == 1 else f"{len(requests)} prompts of up to"
    kept = [request.eviction.capacity for request in requests if request.eviction is not None]
    cache = f"a cache capacity of {max(kept):,} entries" if kept else "a full cache, no SpecKV"
    return f"answering {count} {longest:,} tokens ({cache})"


@dataclass(frozen=True, slots=True)
class Memories:
    """What both models know of a session's documents."""

    target: Memory
    draft: Memory | None


class Pipeline:
    """Runs requests through a target and, where a method asks for it, a draft.

    Args:
        target: The model that answers.
        tokenizer: Its tokenizer.
        encoder: Its prompt encoder.
        compressor: The draft, or None.
        draft_store: Tri-grams for drafting, shared with whoever else has them; None for own ones.
    """

    def __init__(
        self,
        target: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        encoder: PromptEncoder,
        compressor: Compressor | None,
        draft_store: TrigramStore | None = None,
    ) -> None:
        self.target, self.tokenizer, self.encoder = target, tokenizer, encoder
        self.compressor = compressor
        self.context_window = context_window(target)
        self._grammars = Grammars(tokenizer.backend_tokenizer)
        self._models = {"target": target, "draft": None if compressor is None else compressor.model}
        theirs = None if compressor is None else compressor.tokenizer
        self._same_tokens = (
            theirs is None or theirs is tokenizer or (theirs.get_vocab() == tokenizer.get_vocab())
        )
        draft = self._models["draft"]
        self.drafters = Drafters(tokenizer, draft, self._same_tokens, draft_store)

    def stream(
        self,
        prompt: Prompt,
        method: Method | None,
        options: Generation,
        on_error: OnError,
        memories: Memories | None = None,
    ) -> Iterator[Chunk]:
        """One request piece by piece; the last chunk carries the answer."""
        request = self.prepare(prompt, method, options, on_error, memories)
        reader = ToolReader() if request.reads_tools else None
        text = ""
        for (piece,) in self.decode([request]):
            text += piece
            said, calls = (piece, ()) if reader is None else reader.push(piece)
            if said or calls:
                yield Chunk(said, tool_calls=calls)
        yield Chunk("" if reader is None else reader.close(), request.answer(text))

    def prepare(
        self,
        prompt: Prompt,
        method: Method | None,
        options: Generation,
        on_error: OnError,
        memories: Memories | None = None,
    ) -> Request:
        """Compress and encode one prompt, and let the draft guess where the method needs it."""
        specpc, speckv = stages(method)
        if options.drafting is not None:
            self.drafters.check(options.drafting)
        clock, deadline = Clock(), deadline_after(options.timeout)
        context: CompressedContext | None = None
        shorter = prompt
        if specpc is not None:
            with until(deadline), explain_out_of_memory("", **self._models):
                shorter, context = self.need_compressor().compress_prompt(
                    prompt, specpc, on_error=on_error, max_new_tokens=options.max_new_tokens
                )
            clock.add(context.stats.seconds)
        with clock("encode"):
            tokens = self.encoder.encode(shorter)
            original = tokens if shorter is prompt else self.encoder.encode(prompt)
        if self.context_window is not None and len(tokens) > self.context_window:
            raise PromptError(
                f"The prompt has {len(tokens)} tokens, the target reads at most "
                f"{self.context_window}: give fewer passages, or compress them "
                f"(method=SpecPC(capacity={self.context_window // 2}))."
            )
        eviction = None
        if speckv is not None:
            with until(deadline), clock("draft"):
                eviction = self._plan_eviction(shorter, tokens, context, speckv, options, memories)
        drafts = None
        if options.drafting is not None:
            drafts = self._plan_drafts(
                options, tokens.ids, original.ids, shorter, context, eviction, memories
            )
        row = self._row(len(tokens), options)
        memory = None if memories is None else memories.target
        return Request(
            ids=tokens.ids,
            original_tokens=len(original),
            context=context,
            options=options,
            clock=clock,
            row=row,
            eviction=eviction,
            memory=memory,
            reads_tools=bool(prompt.tools),
            deadline=deadline,
            drafts=drafts,
        )

    def _plan_eviction(
        self,
        prompt: Prompt,
        tokens: PromptTokens,
        context: CompressedContext | None,
        method: SpecKV,
        options: Generation,
        memories: Memories | None,
    ) -> EvictionPlan | None:
        """The draft's guessed answer in the target's tokens; None where all entries fit."""
        fixed = int(tokens.protected.sum()) if len(prompt.passages) else 0
        capacity = token_capacity(method, len(tokens), fixed)
        if len(tokens) <= capacity:
            return None
        protected = _protected_entries(tokens, method, capacity)

        def draft(wanted: int) -> torch.Tensor:
            return self._draft_guess(prompt, context, wanted, memories)

        wanted = method.lookahead_tokens or min(options.max_new_tokens, MAX_LOOKAHEAD)
        work = f"guessing the answer to a prompt of {len(tokens):,} tokens (capacity {capacity:,})"
        with explain_out_of_memory(work, **self._models), torch.no_grad():
            guessed = look_ahead(
                self.target, tokens.ids, method, capacity, wanted, draft, protected
            )
        room = (self.context_window or len(tokens) + len(guessed)) - len(tokens)
        text = str(self.tokenizer.decode(guessed.tolist(), skip_special_tokens=True))
        return EvictionPlan(method, capacity, guessed[:room], text, protected)

    def _draft_guess(
        self,
        prompt: Prompt,
        context: CompressedContext | None,
        wanted: int,
        memories: Memories | None,
    ) -> torch.Tensor:
        """The draft's answer in the target's tokens: what SpecPC already has, or a new one."""
        compressor = self.need_compressor()
        if context is not None and context.lookahead_ids:
            guessed = torch.tensor(context.lookahead_ids)
        else:
            memory = None if memories is None else memories.draft
            guessed = compressor.guess(prompt, wanted, memory)
        if self._same_tokens:
            return guessed
        text = str(compressor.tokenizer.decode(guessed.tolist(), skip_special_tokens=True))
        return torch.tensor(self.encoder.encode_text(text), dtype=torch.int64)

    def _plan_drafts(
        self,
        options: Generation,
        ids: torch.Tensor,
        original: torch.Tensor,
        prompt: Prompt,
        context: CompressedContext | None,
        eviction: EvictionPlan | None,
        memories: Memories | None,
    ) -> DraftPlan:
        """What drafting starts from; a guess is made later, and only where nobody made one yet."""
        assert options.drafting is not None
        guess = None if eviction is None else eviction.lookahead
        if guess is None and context is not None and len(context.lookahead_ids) > 1:
            guess = self._draft_guess(prompt, context, 0, None)

        def ask() -> torch.Tensor:
            wanted = min(options.max_new_tokens, MAX_LOOKAHEAD)
            return self._draft_guess(prompt, None, wanted, memories)

        known = guess if guess is not None and guess.numel() else None
        return DraftPlan(options.drafting, ids, original, known, ask)

    def _row(self, prompt_tokens: int, options: Generation) -> RowText:
        """The answer of one row, ended by the generation's limit or the target's window."""
        room = (self.context_window or prompt_tokens + options.max_new_tokens) - prompt_tokens
        ends, grammar = frozenset(end_token_ids(self.target).tolist()), options.grammar
        return RowText(
            tokenizer=self.tokenizer.backend_tokenizer,
            ends=ends,
            stop=options.stop,
            limit=max(1, min(options.max_new_tokens, room)),
            constraint=None if grammar is None else self._grammars.start(grammar, ends),
        )

    def decode(self, requests: Sequence[Request]) -> Iterator[list[str]]:
        """Read the prompts and generate as one batch; yields each request's new text.

        Evicted caches of models with sliding windows cannot be padded: those run one by one.
        """
        evicts = any(request.eviction is not None for request in requests)
        if len(requests) > 1 and evicts and has_sliding_layers(self.target):
            for place, request in enumerate(requests):
                for (piece,) in self.decode([request]):
                    yield [piece if i == place else "" for i in range(len(requests))]
            return
        prompts = [request.ids for request in requests]
        rows = [request.row for request in requests]
        deadlines = [r.deadline for r in requests if r.deadline is not None]
        deadline = min(deadlines, default=None)
        stage = "prefill"
        with explain_out_of_memory(_describe(requests), **self._models):
            with until(deadline):
                speculation = self._speculate(requests)
            steps = self._steps(requests, prompts, rows, speculation)
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

    def _speculate(self, requests: Sequence[Request]) -> Speculation | None:
        """The drafter of a request that runs alone; rows of a batch are told why they have none."""
        planned = [request for request in requests if request.drafts is not None]
        if len(requests) > 1:
            for request in planned:
                assert request.drafts is not None
                request.drafts.tally.note = f"decoded in a batch of {len(requests)} prompts"
            return None
        for request in planned:
            assert request.drafts is not None
            with request.clock("draft"):
                return self.drafters.start(request.drafts)
        return None

    def _steps(
        self,
        requests: Sequence[Request],
        prompts: Sequence[torch.Tensor],
        rows: Sequence[RowText],
        speculation: Speculation | None,
    ) -> Iterator[list[str]]:
        """Evict while the prompts are read, if a method asks for it, and decode."""
        plans = [request.eviction for request in requests]
        chosen = next((plan for plan in plans if plan is not None), None)
        start = None
        if chosen is not None:
            nothing = torch.tensor([], dtype=torch.int64)
            start = evict(
                self.target,
                prompts,
                [nothing if plan is None else plan.lookahead for plan in plans],
                chosen.method,
                [
                    p.numel() if q is None else q.capacity
                    for p, q in zip(prompts, plans, strict=True)
                ],
                [request.protected for request in requests],
                requests[0].memory,
            ).start
            for request in requests:
                request.sizes["cache"] = cache_bytes(start.cache) // len(requests)
        elif requests[0].memory is not None:
            start = requests[0].memory.start(self.target, prompts[0])
        options = [request.options for request in requests]
        yield from decode_text(self.target, prompts, options, rows, start, speculation)

    def need_compressor(self) -> Compressor:
        """The draft, or a `ModelError` where there is none."""
        if self.compressor is None:
            raise ModelError(NO_DRAFT)
        return self.compressor

"""What happens to prompts before they are decoded: compress, encode, guess, plan the eviction."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..compressor import Compressor
from ..config import Generation, Method, OnError, SpecKV, SpecPC, stages
from ..errors import NO_DRAFT, BudgetError, ModelError, PromptError
from ..models.loading import context_window, end_token_ids, explain_out_of_memory
from ..prompt.encoder import PromptEncoder, PromptTokens
from ..prompt.messages import Prompt
from ..runtime.clock import Clock
from ..runtime.deadline import deadline_after, until
from ..speckv.evict import token_capacity
from ..speckv.lookahead import look_ahead
from ..speckv.scorers import needs_draft
from ..specpc.sparse_positions import kept_places
from ..types import CompressedContext
from .constrained import Grammars
from .decode import RowText
from .request import EvictionPlan, Memories, Request
from .speculative.drafters.store import TrigramStore
from .speculative.select import Drafters, DraftPlan

MAX_LOOKAHEAD = 256  # tokens that the draft guesses at most unless the method says otherwise


@dataclass(slots=True, eq=False)
class Work:
    """One prompt while it is prepared."""

    prompt: Prompt
    options: Generation
    clock: Clock = field(default_factory=Clock)
    context: CompressedContext | None = None
    eviction: EvictionPlan | None = None
    positions: torch.Tensor | None = None  # (tokens,) where kept tokens stay at their places
    deadline: float | None = field(init=False)
    shorter: Prompt = field(init=False)  # what the target reads
    tokens: PromptTokens = field(init=False)  # of `shorter`, by the target's tokenizer
    original: PromptTokens = field(init=False)  # of `prompt`

    def __post_init__(self) -> None:
        self.deadline, self.shorter = deadline_after(self.options.timeout), self.prompt

    @property
    def known_guess(self) -> torch.Tensor | None:
        """(guessed,) int64 of the draft's tokens, where SpecPC's reading has left an answer."""
        ids = () if self.context is None else self.context.lookahead_ids
        return torch.tensor(ids) if ids else None


def _wanted(method: SpecKV, options: Generation) -> int:
    """Most tokens of a lookahead."""
    return method.lookahead_tokens or min(options.max_new_tokens, MAX_LOOKAHEAD)


def _guessing(asked: Sequence[tuple[Work, int, torch.Tensor]]) -> str:
    """What is done and how large it is, for an error message."""
    work, capacity, _ = max(asked, key=lambda each: len(each[0].tokens))
    what = "answer to a prompt of" if len(asked) == 1 else f"answers to {len(asked)} prompts up to"
    return f"guessing the {what} {len(work.tokens):,} tokens (capacity {capacity:,})"


def _keep_positions(work: Work, window: int | None) -> None:
    """Let the target read the kept tokens of the original prompt where they stand."""
    if work.context is None or not work.context.stats.compressed:
        return
    if window is not None and len(work.original) > window:
        raise PromptError(
            f'positions="keep", but the whole prompt has {len(work.original)} tokens and the '
            f'target knows positions below {window} only: use positions="reset".'
        )
    spans = ((span.passage_index, span.start, span.end) for span in work.context.spans)
    work.positions, tokens = kept_places(work.original, spans), work.original
    columns = (tokens.ids, tokens.segment, tokens.passage, tokens.start, tokens.end)
    work.tokens = PromptTokens(*(column[work.positions] for column in columns))


class Preparer:
    """Prepares requests of one engine.

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
        self._same_prompts = compressor is not None and encoder.encodes_like(compressor.encoder)
        draft = self._models["draft"]
        self.drafters = Drafters(tokenizer, draft, self._same_tokens, draft_store)

    def __call__(
        self,
        prompts: Sequence[Prompt],
        method: Method | None,
        options: Sequence[Generation],
        on_error: OnError,
        memories: Memories | None = None,
    ) -> list[Request]:
        """Compress and encode prompts, and let the draft guess where the method needs it.

        The draft reads and guesses as a batch; each prompt gets what it gets alone.
        """
        specpc, speckv = stages(method)
        for own in options:
            if own.drafting is not None:
                self.drafters.check(own.drafting)
        works = [Work(*pair) for pair in zip(prompts, options, strict=True)]
        with until(earliest(work.deadline for work in works)):
            if specpc is not None:
                self._compress(works, specpc, on_error)
            for work in works:
                self._encode(work)
                if specpc is not None and specpc.positions == "keep":
                    _keep_positions(work, self.context_window)
            if speckv is not None:
                self._plan_evictions(works, speckv, memories)
        return [self._request(work, memories) for work in works]

    def _compress(self, works: Sequence[Work], method: SpecPC, on_error: OnError) -> None:
        """Let the draft shorten the passages."""
        with explain_out_of_memory("", **self._models):
            found = self.need_compressor().compress_prompts(
                [work.prompt for work in works],
                method,
                on_error=on_error,
                max_new_tokens=[work.options.max_new_tokens for work in works],
            )
        for work, (shorter, context) in zip(works, found, strict=True):
            work.shorter, work.context = shorter, context
            work.clock.add(context.stats.seconds)

    def _encode(self, work: Work) -> None:
        """Count and number the target's tokens."""
        with work.clock("encode"):
            work.tokens = self.encoder.encode(work.shorter)
            work.original = work.tokens
            if work.shorter is not work.prompt:
                work.original = self.encoder.encode(work.prompt)
        if self.context_window is not None and len(work.tokens) > self.context_window:
            raise PromptError(
                f"The prompt has {len(work.tokens)} tokens, the target reads at most "
                f"{self.context_window}: give fewer passages, or compress them "
                f"(method=SpecPC(capacity={self.context_window // 2}))."
            )

    def _request(self, work: Work, memories: Memories | None) -> Request:
        """What is decoded."""
        drafts = None
        if work.options.drafting is not None:
            drafts = self._plan_drafts(work, memories)
        last = len(work.tokens) if work.positions is None else len(work.original)
        return Request(
            ids=work.tokens.ids,
            original_tokens=len(work.original),
            context=work.context,
            options=work.options,
            clock=work.clock,
            row=self._row(last, work.options),
            eviction=work.eviction,
            memory=None if memories is None else memories.target,
            reads_tools=bool(work.prompt.tools),
            deadline=work.deadline,
            drafts=drafts,
            positions=work.positions,
        )

    def _plan_evictions(
        self, works: Sequence[Work], method: SpecKV, memories: Memories | None
    ) -> None:
        """The guessed answers in the target's tokens; nothing is planned where all entries fit."""
        asked: list[tuple[Work, int, torch.Tensor]] = []  # with capacity and protected entries
        for work in works:
            fixed = int(work.tokens.protected.sum()) if len(work.shorter.passages) else 0
            capacity = token_capacity(method, len(work.tokens), fixed)
            if len(work.tokens) > capacity:
                asked.append((work, capacity, _protected_entries(work.tokens, method, capacity)))
        if not asked:
            return
        clock = Clock()
        with clock("draft"), explain_out_of_memory(_guessing(asked), **self._models):
            drafted = [torch.tensor([], dtype=torch.int64)] * len(asked)
            if needs_draft(method):
                drafted = self._draft_guesses([work for work, *_ in asked], method, memories)
            for (work, capacity, protected), guess in zip(asked, drafted, strict=True):
                work.eviction = self._plan_eviction(
                    work, method, capacity, protected, guess, memories
                )
        for work, *_ in asked:
            work.clock.add(clock.seconds)

    def _plan_eviction(
        self,
        work: Work,
        method: SpecKV,
        capacity: int,
        protected: torch.Tensor,
        drafted: torch.Tensor,
        memories: Memories | None,
    ) -> EvictionPlan:
        """With the draft's guess, or the one that the scorer asks for in its place."""
        ids, wanted = work.tokens.ids, _wanted(method, work.options)
        with torch.no_grad():
            guessed = look_ahead(
                self.target,
                ids,
                method,
                capacity,
                wanted,
                lambda _: drafted,
                protected,
                None if memories is None else memories.target,
            )
        room = (self.context_window or ids.numel() + len(guessed)) - ids.numel()
        text = str(self.tokenizer.decode(guessed.tolist(), skip_special_tokens=True))
        return EvictionPlan(method, capacity, guessed[:room], text, protected)

    def _draft_guesses(
        self, works: Sequence[Work], method: SpecKV, memories: Memories | None
    ) -> list[torch.Tensor]:
        """The draft's answers in the target's tokens: what SpecPC already has, or new ones."""
        compressor = self.need_compressor()
        known = {id(work): work.known_guess for work in works}
        new = [work for work in works if known[id(work)] is None]
        wanted = [_wanted(method, work.options) for work in new]
        if memories is not None and memories.draft is not None:
            guesses = [
                compressor.guess(work.shorter, most, memories.draft)
                for work, most in zip(new, wanted, strict=True)
            ]
        else:
            known_tokens = [work.tokens for work in new] if self._same_prompts else None
            guesses = compressor.guess_many([work.shorter for work in new], wanted, known_tokens)
        known.update((id(work), guess) for work, guess in zip(new, guesses, strict=True))
        return [self._translated(known[id(work)]) for work in works]

    def _translated(self, guessed: torch.Tensor | None) -> torch.Tensor:
        """The draft's tokens as the target's, carried over as text where they differ."""
        assert guessed is not None  # every work has one by now
        if self._same_tokens:
            return guessed
        theirs = self.need_compressor().tokenizer
        text = str(theirs.decode(guessed.tolist(), skip_special_tokens=True))
        return torch.tensor(self.encoder.encode_text(text), dtype=torch.int64)

    def _plan_drafts(self, work: Work, memories: Memories | None) -> DraftPlan:
        """What drafting starts from; a guess is made later, and only where nobody made one yet."""
        assert work.options.drafting is not None
        guess = None if work.eviction is None else work.eviction.lookahead
        if guess is None and work.known_guess is not None and work.known_guess.numel() > 1:
            guess = self._translated(work.known_guess)

        def ask() -> torch.Tensor:
            memory = None if memories is None else memories.draft
            wanted = min(work.options.max_new_tokens, MAX_LOOKAHEAD)
            return self._translated(self.need_compressor().guess(work.shorter, wanted, memory))

        known = guess if guess is not None and guess.numel() else None
        ids, original = work.tokens.ids, work.original.ids
        return DraftPlan(work.options.drafting, ids, original, known, ask)

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

    def need_compressor(self) -> Compressor:
        """The draft, or a `ModelError` where there is none."""
        if self.compressor is None:
            raise ModelError(NO_DRAFT)
        return self.compressor


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


def earliest(deadlines: Iterable[float | None]) -> float | None:
    """The deadline of a batch is its first member's."""
    return min((moment for moment in deadlines if moment is not None), default=None)

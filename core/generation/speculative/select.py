"""Which drafter a request gets (`Generation.drafting`), and what an engine's drafters share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from threading import Lock

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...config import DraftKind
from ...errors import NO_DRAFT, ModelError
from ...models.loading import context_window
from .drafters.aded import AdedDrafter
from .drafters.auto import AutoDrafter, Pace
from .drafters.graph import GraphDrafter
from .drafters.lookahead import LookaheadDrafter
from .drafters.lookup import LookupDrafter
from .drafters.model import ModelDrafter
from .drafters.store import TrigramStore, vocabulary_fingerprint
from .drafters.tree import Drafter, UnionDrafter
from .verify import Speculation, Tally


@dataclass(frozen=True, slots=True, eq=False)
class DraftPlan:
    """What drafting for one request starts from. All ids are the target's."""

    kind: DraftKind
    prompt: torch.Tensor  # (tokens,) int64, what the target reads
    original: torch.Tensor  # (tokens,) int64, before it was compressed
    guess: torch.Tensor | None  # (guessed,) int64, an answer that the draft has made already
    ask: Callable[[], torch.Tensor]  # makes the draft guess one
    tally: Tally = field(default_factory=Tally)


class Drafters:
    """Makes drafters; an engine has one, and with it one store that no other engine sees.

    Args:
        tokenizer: The target's.
        draft: The draft model, if there is one.
        same_tokens: Whether its tokens are the target's.
        store: Shared with whoever else has it; None makes an empty one when it is first needed.

    Raises:
        ModelError: The store was made with another tokenizer.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        draft: PreTrainedModel | None,
        same_tokens: bool,
        store: TrigramStore | None = None,
    ) -> None:
        self.draft, self.same_tokens, self._store = draft, same_tokens, store
        self.pace = Pace()
        self._lock = Lock()
        if store is not None and store.vocabulary:
            own = vocabulary_fingerprint(tokenizer.get_vocab())
            if own != store.vocabulary:
                raise ModelError(
                    "The draft store was made with another tokenizer than the target's: build it "
                    "again with 'draftsieve drafts build --target ...'."
                )

    @property
    def store(self) -> TrigramStore:
        """The tri-grams that this engine's requests read and teach."""
        with self._lock:
            if self._store is None:
                self._store = TrigramStore()
            return self._store

    def check(self, kind: DraftKind) -> None:
        """Raise `ModelError` where the engine lacks what a kind of drafting needs."""
        if kind in ("model", "graph", "lookahead") and self.draft is None:
            raise ModelError(NO_DRAFT)
        if kind in ("model", "graph") and not self.same_tokens:
            raise ModelError(
                f"drafting={kind!r} proposes the draft model's own tokens, but draft and target "
                "have different vocabularies: use drafting='lookahead' or 'auto'."
            )

    def start(self, plan: DraftPlan) -> Speculation | None:
        """The drafter of one request; "model" and "graph" read the prompt here.

        None where the draft model cannot read that much: the plan's tally says so.
        """
        if plan.kind in ("model", "graph") and self.draft is not None:
            window = context_window(self.draft)
            if window is not None and plan.prompt.numel() >= window:
                plan.tally.note = (
                    f"the prompt has {plan.prompt.numel()} tokens, the draft reads at most {window}"
                )
                return None
        return Speculation(self._drafter(plan), plan.tally)

    def _drafter(self, plan: DraftPlan) -> Drafter:
        prompt, original = plan.prompt, plan.original.tolist()
        if plan.kind in ("model", "graph"):
            assert self.draft is not None  # checked when the request was prepared
            if plan.kind == "model":
                return ModelDrafter(self.draft, prompt)
            return GraphDrafter(self.draft, prompt)
        if plan.kind == "lookup":
            return LookupDrafter(original)
        if plan.kind == "lookahead":
            guess = plan.ask() if plan.guess is None else plan.guess
            return LookaheadDrafter(guess.tolist())
        if plan.kind == "aded":
            return AdedDrafter(self.store, prompt.tolist())
        cheap: list[Drafter] = [] if plan.guess is None else [LookaheadDrafter(plan.guess.tolist())]
        cheap.append(LookupDrafter(original))
        cheap.append(AdedDrafter(self.store, prompt.tolist(), search="best_first"))
        return AutoDrafter(UnionDrafter(cheap), self.pace, plan.tally)

"""SpecKV for requests: how much each may keep, what is protected, whose guess is read behind it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

import torch

from ..config import Generation, OnError, SpecKV
from ..errors import BudgetError, ModelError, OutOfMemoryError, PromptError
from ..kv_cache.evicted_memory import EvictedMemory
from ..kv_cache.layers import cache_bytes
from ..kv_cache.prefill import Start
from ..kv_cache.prefix import Memory
from ..models.footprint import explain_out_of_memory
from ..prompt.encoder import PromptTokens
from ..request import EvictionPlan, Request
from ..runtime.limits import Clock
from ..speckv.batch import start_evicted
from ..speckv.evict import evict, token_capacity
from ..speckv.lookahead import NOTHING, own_lookahead
from ..speckv.scorers import SCORERS, kvzip, needs_draft
from .pair import Pair
from .related import related_sentences

logger = logging.getLogger(__name__)
MAX_SENTENCE = 96  # tokens of a sentence that is read behind the guess, on average
MAX_LOOKAHEAD = 256  # tokens that the draft guesses at most unless the method says otherwise


def plan_evictions(
    pair: Pair, requests: Sequence[Request], method: SpecKV, on_error: OnError = "raise"
) -> None:
    """Fill in `eviction` of the requests whose prompts exceed the budget.

    Args:
        pair: Target and draft.
        requests: With the target's tokens; the draft guesses their answers as a batch.
        method: Budget, scorer and lookahead.
        on_error: "raise", or "original" to read a request that fails with its full cache.
    """
    for request in requests:
        try:
            request.eviction = _budget(request, method)
        except BudgetError as error:
            _fall_back(request, error, on_error)
    planned = [request for request in requests if request.eviction is not None]
    if not planned:
        return
    if needs_draft(method):
        pair.need_draft()  # a missing model is no fault of a request
    clock = Clock()
    try:
        with clock("draft"), explain_out_of_memory(_describe(planned), **pair.models):
            guesses = _guesses(pair, planned, method)
    except (PromptError, OutOfMemoryError) as error:
        if len(planned) == 1:
            _fall_back(planned[0], error, on_error)
            return
        for request in planned:
            plan_evictions(pair, [request], method, on_error)
        return
    for request, guess in zip(planned, guesses, strict=True):
        assert request.eviction is not None  # chosen above
        room = _room(pair, request, len(guess))
        text = str(pair.tokenizer.decode(guess.tolist(), skip_special_tokens=True))
        request.eviction = replace(request.eviction, lookahead=guess[:room], text=text)
        request.clock.add(clock.seconds)


def start_evictions(pair: Pair, requests: Sequence[Request]) -> Start:
    """Read requests, at least one of which evicts, and evict on the way."""
    plans = [request.eviction for request in requests]
    asked = (
        pair.target,
        [request.ids for request in requests],
        [NOTHING if r.eviction is None else _behind(pair, r, r.eviction) for r in requests],
        next(plan.method for plan in plans if plan is not None),
        [len(r.tokens) if r.eviction is None else r.eviction.capacity for r in requests],
        [request.protected for request in requests],
        requests[0].target_memory,
    )
    start = evict(*asked).start if len(requests) == 1 else start_evicted(*asked)
    for request in requests:
        request.cache_bytes = cache_bytes(start.cache) // len(requests)
    return start


def evict_beginning(
    pair: Pair, memory: Memory, protected: torch.Tensor, method: SpecKV
) -> EvictedMemory:
    """Keep a part of a prompt's beginning for whatever will be asked.

    Args:
        pair: Its target reads the last tokens anew.
        memory: The whole beginning.
        protected: (tokens,) bool: entries that always stay.
        method: Its scorer must do without a question.

    Raises:
        ModelError: The scorer looks ahead at an answer.
        BudgetError: What is protected exceeds the capacity.
    """
    if SCORERS[method.scorer].lookahead not in ("none", "request"):
        raise ModelError(
            f"scorer={method.scorer!r} looks ahead at the answer to a question, but none has been "
            'asked yet: use scorer="kvzip", or give the method with each question.'
        )
    fixed = int(protected[:-1].sum())
    capacity = token_capacity(method, memory.ids.numel(), int(protected.sum()))
    if fixed > capacity:
        raise BudgetError(
            f"SpecKV capacity={capacity}, but system text and template alone take {fixed} entries. "
            "Raise the capacity, or give a ratio."
        )
    request = torch.tensor(pair.encoder.encode_text(kvzip.REQUEST), dtype=torch.int64)
    done = evict(pair.target, [memory.ids], [request], method, [capacity], [protected], memory)
    return EvictedMemory(memory.ids, (), done.start, memory.entry_bytes)


def _behind(pair: Pair, request: Request, plan: EvictionPlan) -> torch.Tensor:
    """(tokens,) int64 that the target reads behind the prompt, or prepares with."""
    scorer, sentences = SCORERS[plan.method.scorer], plan.method.lookahead_sentences
    if scorer.lookahead == "request":
        return torch.tensor(pair.encoder.encode_text(kvzip.REQUEST), dtype=torch.int64)
    if not sentences or not scorer.asks:
        return plan.lookahead
    text = related_sentences(request.shorter, sentences)
    more = pair.encoder.encode_text(text)[: MAX_SENTENCE * sentences]
    both = torch.cat([plan.lookahead, torch.tensor(more, dtype=torch.int64)])
    return both[: _room(pair, request, len(both))]


def _room(pair: Pair, request: Request, wanted: int) -> int:
    """Tokens that the target's window holds behind a prompt."""
    window = pair.context_window
    return wanted if window is None else window - len(request.tokens)


def new_guesses(
    pair: Pair, requests: Sequence[Request], method: SpecKV | None = None
) -> list[torch.Tensor]:
    """The draft's answers to what the target reads, (guessed,) int64 each in the target's tokens.

    From a store with all layers and all passages of a prompt it answers the whole prompt, without
    reading it and with the default system text; another prompt is read.

    Args:
        pair: Target and draft.
        requests: With the target's tokens.
        method: Says how long a guess may be; None for as long as the answer.
    """
    limits = [_longest(method, request.generation) for request in requests]
    found = _stored_guesses(pair, requests, limits)
    new = [place for place in range(len(requests)) if place not in found]
    if new:
        made = _read_guesses(pair, [requests[n] for n in new], [limits[n] for n in new])
        found.update(zip(new, made, strict=True))
    return [pair.translated(found[place]) for place in range(len(requests))]


def _stored_guesses(
    pair: Pair, requests: Sequence[Request], limits: Sequence[int]
) -> dict[int, torch.Tensor]:
    """(guessed,) int64 of the draft's tokens, for the requests that its store answers."""
    store = pair.need_draft().store
    if store is None or requests[0].memories is not None:
        return {}
    return {
        place: store.guess(request.prompt, limit)
        for place, (request, limit) in enumerate(zip(requests, limits, strict=True))
        if store.guesses(request.prompt)
    }


def _read_guesses(
    pair: Pair, requests: Sequence[Request], limits: Sequence[int]
) -> list[torch.Tensor]:
    """(guessed,) int64 each of the draft's tokens; the prompts are read as a batch."""
    draft, memories = pair.need_draft(), requests[0].memories
    same, memory = pair.same_prompts, None if memories is None else memories.draft
    prompts = [r.tokens if same else draft.encoder.encode(r.shorter) for r in requests]
    return draft.guess(prompts, limits, memory)


def _guesses(pair: Pair, requests: Sequence[Request], method: SpecKV) -> list[torch.Tensor]:
    """(guessed,) int64 each: the draft's, or what the scorer wants in its place."""
    if needs_draft(method):
        new = [request for request in requests if request.draft_guess is None]
        made = iter(new_guesses(pair, new, method) if new else ())
        known = [request.draft_guess for request in requests]  # what SpecPC's reading has left
        return [next(made) if guess is None else pair.translated(guess) for guess in known]
    found = []
    for request in requests:
        plan, most = request.eviction, _longest(method, request.generation)
        assert plan is not None  # the caller chose requests that have one
        kept, memory = plan.protected, request.target_memory
        with torch.no_grad():
            found.append(
                own_lookahead(pair.target, request.ids, method, plan.capacity, most, kept, memory)
            )
    return found


def _longest(method: SpecKV | None, generation: Generation) -> int:
    """Most tokens of a guess."""
    wanted = None if method is None else method.lookahead_tokens
    return wanted or min(generation.max_new_tokens, MAX_LOOKAHEAD)


def _budget(request: Request, method: SpecKV) -> EvictionPlan | None:
    """Capacity and protected entries; None where all entries fit."""
    tokens = request.tokens
    fixed = int(tokens.protected.sum()) if len(request.shorter.passages) else 0
    capacity = token_capacity(method, len(tokens), fixed)
    if len(tokens) <= capacity:
        return None
    return EvictionPlan(method, capacity, NOTHING, "", _protected(tokens, method, capacity))


def _protected(tokens: PromptTokens, method: SpecKV, capacity: int) -> torch.Tensor:
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


def _fall_back(request: Request, error: Exception, on_error: OnError) -> None:
    """Go on with the full cache, unless the failure is to be raised."""
    if on_error == "raise":
        raise error
    logger.warning("SpecKV failed, the cache stays whole: %s", error)
    logger.debug("The failure in full:", exc_info=error)
    request.eviction, request.fallback = None, f"{type(error).__name__}: {error}"


def _describe(requests: Sequence[Request]) -> str:
    """What is done and how large it is, for an error message."""
    longest = max(requests, key=lambda request: len(request.tokens))
    what = "answer to a prompt of"
    if len(requests) > 1:
        what = f"answers to {len(requests)} prompts up to"
    capacity = 0 if longest.eviction is None else longest.eviction.capacity
    return f"guessing the {what} {len(longest.tokens):,} tokens (capacity {capacity:,})"

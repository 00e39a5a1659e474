"""What SpecPC does with requests: encode -> read with the draft -> rank the units, fit the budget.

`compress` is the whole path. A request that fails goes on with its passages as they were asked,
where the caller wants that; the others of the batch do not notice.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial

import torch
from torch.nn import functional

from ..config import OnError, SpecPC
from ..errors import ModelError, RequestTimeoutError
from ..models.embedder import cosines, load_embedder
from ..models.footprint import explain_out_of_memory
from ..request import Request
from ..runtime.limits import Clock
from ..types import DraftReading
from .chunking import group_texts, plan_groups, spread_scores
from .draft import DraftModel
from .fitting import Budget, fit
from .head_weights import head_weights, settled
from .ranking import Nearness, only_best, rank_units
from .result import describe, failed, no_embedder, unchanged

logger = logging.getLogger(__name__)


def compress(
    draft: DraftModel, requests: Sequence[Request], method: SpecPC, on_error: OnError = "raise"
) -> None:
    """Shorten the passages of requests; fills in `shorter`, `context` and what leads to them.

    Args:
        draft: Who reads.
        requests: Read as a batch; each gets what it gets alone.
        method: Budget and options.
        on_error: "raise" raises the first failure; with "original" each request fails alone.
    """
    note = None
    if draft.store is None:
        method = settled(method, draft.model)
    else:
        method, note = draft.store.settled(method)
        _say_once(note)
    if method.head_weights is not None:  # a missing file is no fault of a single request
        head_weights(draft.model, method.head_weights)
    near = _nearness(method)
    for request in requests:
        request.note = note
        with _forgiving(draft, request, on_error), explain_out_of_memory(draft=draft.model):
            _encode(draft, request, method)
    _read(draft, [r for r in requests if r.context is None], method, on_error)
    for request in requests:
        if request.context is None:
            with _forgiving(draft, request, on_error):
                _choose(draft, request, method, near)


def _nearness(method: SpecPC) -> Nearness | None:
    """What an embedder says; nothing where none is asked. A missing one is no request's fault."""
    _say_once(no_embedder(method))
    if not method.semantic_weight or method.embedder is None:
        return None
    return partial(cosines, load_embedder(method.embedder))


@cache
def _say_once(note: str | None) -> None:
    if note is not None:
        logger.info(note)


def _encode(draft: DraftModel, request: Request, method: SpecPC) -> None:
    """Number the tokens and plan what the draft reads; nothing where the budget holds all."""
    prompt = request.prompt
    with request.clock("encode"):
        request.draft_tokens = tokens = draft.encoder.encode(prompt)
        request.budget = budget = Budget.of(method, tokens)
    size = int((~tokens.protected).sum())
    whole = size < method.min_tokens or budget.measure(tokens) <= budget.limit
    if not size or (whole and method.max_passages is None and method.score_mass is None):
        request.context = unchanged(request, method)
        return
    fixed = len(draft.encoder.encode(prompt.with_texts([""] * len(prompt.passages))))
    budget.require_room(fixed)
    request.lookahead_tokens = method.lookahead_tokens or request.generation.max_new_tokens
    request.groups, request.parts = (), [tokens]
    room = draft.context_window and draft.context_window - request.lookahead_tokens
    if room is None or len(tokens) <= room or draft.store is not None:
        return
    texts = [passage.text for passage in prompt.passages]
    request.groups = plan_groups(texts, tokens, fixed, room)
    logger.info("The prompt exceeds the draft's window: %d groups.", len(request.groups))
    request.parts = [
        draft.encoder.encode(prompt.with_texts(group_texts(len(texts), texts, group)))
        for group in request.groups
    ]


def _read(
    draft: DraftModel, requests: Sequence[Request], method: SpecPC, on_error: OnError
) -> None:
    """Let the draft read requests as a batch; where that fails, each alone."""
    if not requests:
        return
    clock = Clock()
    try:
        with clock("draft"), explain_out_of_memory(_describe(requests, method), draft=draft.model):
            found = iter(_readings(draft, requests, method))
    except Exception as error:
        if len(requests) > 1 and not isinstance(error, RequestTimeoutError):
            for request in requests:
                _read(draft, [request], method, on_error)
            return
        if on_error == "raise":
            raise
        for request in requests:
            _fall_back(draft, request, error)
        return
    for request in requests:
        request.clock.add(clock.seconds)
        request.reading = _whole_reading(request, [next(found) for _ in request.parts])


def _readings(draft: DraftModel, requests: Sequence[Request], method: SpecPC) -> list[DraftReading]:
    """One for each part of each request."""
    if draft.store is None:
        parts = [part for request in requests for part in request.parts]
        guessed = [request.lookahead_tokens for request in requests for _ in request.parts]
        return draft.read(parts, method, guessed)
    reading, new = draft.store.reading, draft.store_new
    return [reading(r.prompt, part, method, new) for r in requests for part in r.parts]


def _choose(draft: DraftModel, request: Request, method: SpecPC, near: Nearness | None) -> None:
    """Rank the units of a request that has been read, and keep what the budget holds."""
    prompt, tokens, budget = request.prompt, request.draft_tokens, request.budget
    assert tokens is not None and budget is not None and request.reading is not None  # noqa: PT018
    scores = request.reading.scores
    if not bool(torch.isfinite(scores).all()):
        raise ModelError("The draft's attention is not finite; try another dtype (float32).")
    with request.clock("select"):
        texts = [passage.text for passage in prompt.passages]
        texts = only_best(texts, tokens, scores, method.max_passages)
        kept = fit(
            texts,
            rank_units(
                texts,
                tokens,
                scores,
                method,
                prompt.question,
                near,
                request.reading.likelihood,
            ),
            limit=budget.limit,
            first_guess=budget.first_guess(tokens),
            measure=lambda short: budget.measure(draft.encoder.encode(prompt.with_texts(short))),
            count=draft.encoder.count,
            marker=method.gap_marker if method.positions == "reset" else None,
        )
        request.shorter = prompt.with_texts(kept.texts)
        after = draft.encoder.encode(request.shorter)
    request.context = describe(request, method, after, kept.bounds)


def _whole_reading(request: Request, parts: Sequence[DraftReading]) -> DraftReading:
    """Scores of all tokens; a prompt read in groups leaves no lookahead."""
    tokens = request.draft_tokens
    if not request.groups or tokens is None:
        return parts[0]
    scores = torch.zeros(len(tokens))
    likely = [part.likelihood for part in parts if part.likelihood is not None]
    for group, read, found in zip(request.groups, request.parts, parts, strict=True):
        spread_scores(scores, tokens, group, read, found.scores)
    most = max((len(row) for row in likely), default=0)
    padded = [functional.pad(row, (0, most - len(row)), value=-torch.inf) for row in likely]
    likelihood = torch.stack(padded).amax(0) if padded else None
    return DraftReading(scores, torch.tensor([], dtype=torch.int64), likelihood)


def _describe(requests: Sequence[Request], method: SpecPC) -> str:
    """What the draft reads and how large it is, for an error message."""
    longest = max(len(request.draft_tokens or ()) for request in requests)
    room = f"capacity {method.capacity:,}" if method.capacity else f"ratio {method.ratio}"
    many = "a prompt of" if len(requests) == 1 else f"{len(requests)} prompts of up to"
    return f"the draft read {many} {longest:,} tokens ({room})"


@contextmanager
def _forgiving(draft: DraftModel, request: Request, on_error: OnError) -> Iterator[None]:
    """Let a failure be this request's alone, unless it is to be raised."""
    try:
        yield
    except Exception as error:
        if on_error == "raise":
            raise
        _fall_back(draft, request, error)


def _fall_back(draft: DraftModel, request: Request, error: Exception) -> None:
    """Go on with the passages as they were asked; say so."""
    logger.warning("Compression failed, the passages stay whole: %s", error)
    logger.debug("The failure in full:", exc_info=error)
    request.shorter = request.prompt
    request.context = failed(request.prompt, draft.encoder.count, error)
    request.fallback = request.context.stats.fallback

"""Every method that the evaluation knows, by name: what it keeps of an item, and what it answers.

A budget is a share of the passages' tokens for all of them, as in `SpecPC.ratio` and
`SpecKV.ratio`; question, system text and template come on top. Methods on prompts are measured in
draft tokens of the kept text, methods on the cache in entries per KV head.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, TypeVar, get_args

from ..config import Scorer as CacheScorer
from ..config import SpecKV, SpecKVPC, SpecPC
from ..errors import ConfigError
from ..models.embedder import load_embedder
from ..speckv.scorers import SCORERS
from ..specpc.bm25 import bm25
from ..specpc.head_weights import head_weights, settled
from ..types import Answer
from . import scorers, specprefill, stored, surprise
from .baselines import Kept, truncation_head, truncation_middle, truncation_tail
from .likelihood import AnswerReading
from .shared import Bench, Case
from .survival import kept_spans
from .text_only import (
    EMBEDDED,
    SEED,
    Shorten,
    Shortened,
    at_random,
    joined,
    passages,
    sentences,
    truncated,
    whole,
)

OPTIONS, CACHE_OPTIONS = "specpc:", "speckv:"  # name options of SpecPC, of SpecKV
_NEEDS_ALL_QUERIES = {"h2o"}  # cannot go on from a shared prefill


_NEWEST = SpecPC.preset("2026-12")
_DRAFT_ALONE = SpecPC.preset("2026-12", semantic_weight=0.0)
STORED = {"stored": _DRAFT_ALONE, "stored-embedder": _NEWEST}  # passages come from a store
_Options = TypeVar("_Options", SpecPC, SpecKV)


@dataclass(frozen=True, slots=True)
class Run:
    """What one method did with one item.

    `prompt_tokens` is what the target read, `cache_tokens` what its cache holds per KV head when
    decoding starts; `kept` is None where the passages' text stayed whole. Seconds count what the
    method needs alone: shared readings are added to each method that uses them. `reading` is the
    target's of the reference answer, where it was read; `own_divergence` how far it strays from
    its own answer to the whole prompt, known for methods on the cache.
    """

    text: str
    prompt_tokens: int
    cache_tokens: int
    kept: Kept | None
    draft_seconds: float
    target_seconds: float
    reading: AnswerReading | None = None
    own_divergence: float | None = None


@dataclass(frozen=True, slots=True)
class EvalMethod:
    """A method: `kind` is "none", "prompt", "cache" or "both".

    `check` raises a `DraftSieveError` where something that the method needs is not there: an
    installed package, or what belongs to the pair. `keep` shortens without a target, so that
    nothing is answered; None where there is no text to keep.
    """

    name: str
    kind: str
    run: Callable[[Case, float], Run]
    check: Callable[[Bench], object] | None = None
    keep: Callable[[Case, float], Run] | None = None


def _on_cache(options: SpecKV | None, case: Case, share: float) -> Run:
    """The whole prompt, and of its cache what SpecKV with these options keeps."""
    method = None
    if options is not None:
        method = options.model_copy(update={"capacity": None, "ratio": share})
    case.once.saved = 0.0
    shared = options is None or options.scorer not in _NEEDS_ALL_QUERIES
    answer, reading, strays = case.answer_and_read(case.prompt, method, shared=shared)
    guess = answer.timings.get("draft", 0.0)
    target = _target_seconds(answer) + (case.prefill_seconds if shared else 0.0)
    by_draft = options is not None and SCORERS[options.scorer].lookahead == "draft"
    tokens = answer.usage.prompt_tokens
    return Run(
        answer.text,
        tokens,
        answer.usage.cache_entries or tokens,
        None,
        guess + case.once.saved if by_draft else 0.0,
        target if by_draft else target + guess,
        reading,
        strays,
    )


def _both(case: Case, share: float) -> Run:
    """SpecKV-PC: the prompt to twice the share, then half of the cache."""
    first = SpecPC(ratio=min(1.0, 2 * share), lookahead_tokens=8)
    method = SpecKVPC(specpc=first, speckv=SpecKV(ratio=share / min(1.0, 2 * share)))
    case.once.saved = 0.0
    answer, reading, strays = case.answer_and_read(case.prompt, method, shared=False)
    assert answer.context is not None  # a prompt stage describes what it kept
    timings = answer.timings
    tokens = answer.usage.prompt_tokens
    return Run(
        answer.text,
        tokens,
        answer.usage.cache_entries or tokens,
        kept_spans(answer.context, len(case.item.passages)),
        timings.get("draft", 0.0) + timings.get("select", 0.0) + case.once.saved,
        _target_seconds(answer),
        reading,
        strays,
    )


def _timed(shorten: Shorten, case: Case, share: float) -> tuple[Kept, Sequence[str], float]:
    """What stays, and the seconds that it takes a method that shares nothing."""
    case.once.saved = 0.0
    began = time.perf_counter()
    kept, texts = shorten(case, share)
    return kept, texts, time.perf_counter() - began + case.once.saved


def _kept(shorten: Shorten, case: Case, share: float) -> Run:
    """What stays, which no target reads; tokens are the draft's."""
    kept, texts, draft_seconds = _timed(shorten, case, share)
    tokens = len(case.bench.draft.encoder.encode(case.prompt.with_texts(texts)))
    return Run("", tokens, tokens, kept, draft_seconds, 0.0)


def _on_prompt(shorten: Shorten, case: Case, share: float) -> Run:
    """Shorter passages, at new positions."""
    kept, texts, draft_seconds = _timed(shorten, case, share)
    answer, reading, _ = case.answer_and_read(case.prompt.with_texts(texts), None, shared=False)
    tokens = answer.usage.prompt_tokens
    return Run(answer.text, tokens, tokens, kept, draft_seconds, _target_seconds(answer), reading)


def _in_place(shorten: Shorten, case: Case, share: float) -> Run:
    """A part of the prompt's tokens, each at its original position."""
    kept, _, draft_seconds = _timed(shorten, case, share)
    read = time.perf_counter()
    text, tokens = case.answer_in_place(kept)
    target_seconds = time.perf_counter() - read
    reading = case.read_reference(case.start_in_place(kept)[1])
    return Run(text, tokens, tokens, kept, draft_seconds, target_seconds, reading)


def _target_seconds(answer: Answer) -> float:
    return answer.timings.get("prefill", 0.0) + answer.timings.get("decode", 0.0)


# ---------------------------------------------------------------- what stays of a prompt


def _specpc(options: SpecPC, case: Case, share: float) -> Shortened:
    method = _asking(options, case.bench).model_copy(update={"capacity": None, "ratio": share})
    shorter, context = case.bench.draft.compress_prompt(case.prompt, method)
    kept = kept_spans(context, len(case.item.passages))
    return kept, [passage.text for passage in shorter.passages]


def _asking(options: SpecPC, bench: Bench) -> SpecPC:
    """With the bench's embedder, where the options weigh one and name none."""
    if not options.semantic_weight or options.embedder is not None:
        return options
    return options.model_copy(update={"embedder": bench.embedder})


def _specprefill(case: Case, share: float) -> Shortened:
    model = case.bench.draft.model
    scores = case.once("specprefill", lambda: specprefill.read(model, case.tokens.ids))
    kept = specprefill.keep_chunks(case.tokens, scores, case.budget(share))
    return joined(case, specprefill.kept_characters(case.tokens, kept, len(case.item.passages)))


def _surprise(case: Case, share: float) -> Shortened:
    model, count = case.bench.draft.model, case.bench.draft.count_tokens
    scores = case.once("surprise", lambda: surprise.token_surprise(model, case.tokens.ids))
    budget = case.budget(share)
    return surprise.keep_highest(case.item.passages, case.tokens, scores, budget, count)


def _contrast(case: Case, share: float) -> Shortened:
    draft = case.bench.draft
    tokens, scores = case.once(
        "contrast", lambda: surprise.contrast(draft.model, draft.encoder, case.item)
    )
    budget = case.budget(share)
    return surprise.keep_highest(case.item.passages, tokens, scores, budget, draft.count_tokens)


# ---------------------------------------------------------------- names


def prompt_method(
    name: str, shorten: Shorten, check: Callable[[Bench], object] | None = None
) -> EvalMethod:
    """A method that shortens passages, which are then read at new positions."""
    run = partial(_on_prompt, shorten)
    return EvalMethod(name, "prompt", run, check, partial(_kept, shorten))


def _placed(
    name: str, shorten: Shorten, check: Callable[[Bench], object] | None = None
) -> EvalMethod:
    run = partial(_in_place, shorten)
    return EvalMethod(name, "prompt", run, check, partial(_kept, shorten))


def _by_specpc(name: str, options: SpecPC) -> EvalMethod:
    """SpecPC with options of its own."""

    def check(bench: Bench) -> None:
        if (source := settled(options, bench.draft.model).head_weights) is not None:
            head_weights(bench.draft.model, source)
        if options.semantic_weight and options.embedder is not None:
            load_embedder(options.embedder)

    made = _placed if options.positions == "keep" else prompt_method
    return made(name, partial(_specpc, options), check)


def _by_store(name: str, options: SpecPC, store: dict[str, Any]) -> EvalMethod:
    """SpecPC with passages that were read before; the reading takes no part in the seconds."""

    def shorten(case: Case, share: float) -> Shortened:
        return stored.shorten(_asking(options, case.bench), store, case, share)

    def first(then: Callable[..., Run], case: Case, share: float) -> Run:
        stored.prepare(case, store)
        return then(shorten, case, share)

    return EvalMethod(name, "prompt", partial(first, _on_prompt), keep=partial(first, _kept))


def _by_speckv(name: str, options: SpecKV) -> EvalMethod:
    """SpecKV with options of its own."""
    return EvalMethod(name, "cache", partial(_on_cache, options))


def _listed() -> tuple[EvalMethod, ...]:
    def sklearn(_: Bench) -> None:
        scorers.require_eval("sklearn", "TF-IDF")

    on_cache = [_by_speckv(name, SpecKV(scorer=name, seed=SEED)) for name in get_args(CacheScorer)]
    return (
        EvalMethod("none", "none", partial(_on_cache, None), keep=partial(_kept, whole)),
        *on_cache,
        _by_speckv("speckv-2026-12", SpecKV.preset("2026-12")),
        EvalMethod("speckv-pc", "both", _both),
        _by_specpc("specpc", SpecPC()),
        _by_specpc("specpc-keep", SpecPC(positions="keep")),
        _by_specpc("specpc-2026-11", SpecPC.preset("2026-11")),
        _by_specpc("specpc-2026-12", _DRAFT_ALONE),
        _by_specpc("specpc-2026-12-embedder", _NEWEST),
        _placed("specprefill", _specprefill),
        prompt_method("perplexity", _surprise),
        prompt_method("contrastive-perplexity", _contrast),
        prompt_method("bm25-sentences", partial(sentences, bm25)),
        prompt_method("bm25-turns", partial(sentences, bm25, turns=True)),
        prompt_method("bm25-passages", partial(passages, bm25)),
        prompt_method("tfidf-sentences", partial(sentences, scorers.tfidf), sklearn),
        prompt_method("lsa-sentences", partial(sentences, scorers.lsa), sklearn),
        prompt_method("head", partial(truncated, truncation_head)),
        prompt_method("tail", partial(truncated, truncation_tail)),
        prompt_method("middle", partial(truncated, truncation_middle)),
        prompt_method("random-sentences", at_random),
    )


METHODS: Mapping[str, EvalMethod] = {method.name: method for method in _listed()}
# Changes of the paper's settings, one by one, and those that go well together.
_CHANGES = (
    "unit=sentence",
    "lookahead_tokens=8",
    "lookahead_tokens=16",
    "head_weights=calibrated",
    "unit=sentence,reduction=mean",
    "unit=sentence,reduction=mean-max",
    "unit=sentence,unit_score=mean",
    "unit=sentence,lexical_weight=0.5",
    "unit=sentence,passage_floor=1",
    "unit=sentence,score_mass=0.5",
    "unit=sentence,positions=keep",
    "unit=sentence,head_weights=calibrated",
    "unit=sentence,lookahead_tokens=8",
    "unit=sentence,lookahead_tokens=16",
    "unit=sentence,lookahead_tokens=16,unit_score=mean",
    "unit=sentence,lookahead_tokens=16,reduction=mean-max",
    "unit=sentence,lookahead_tokens=16,lexical_weight=0.25",
    "unit=sentence,lookahead_tokens=16,reduction=mean-max,lexical_weight=0.25",
)
GROUPS: Mapping[str, tuple[str, ...]] = {
    "prompt": tuple(name for name, method in METHODS.items() if method.kind == "prompt"),
    "cache": tuple(name for name, method in METHODS.items() if method.kind == "cache"),
    "all": tuple(METHODS),
    "improvements": ("specpc", "specpc-keep", *(OPTIONS + change for change in _CHANGES)),
    "kv": (
        "none",
        "speckv-2026-12",
        *(name for name in get_args(CacheScorer) if name not in ("h2o", "key_norm")),
    ),
    "table": ("none", "speckv", "speckv-pc", "snapkv", "laq", "streaming", "random", "oracle"),
}


def find_methods(names: Sequence[str]) -> list[EvalMethod]:
    """Methods by name or group, each once and in the order asked for.

    Args:
        names: Of `METHODS` and `GROUPS`, "embedding:MODEL" for sentences by an encoder and others
            of `EMBEDDED`, "stored:codec=int8" for the newest preset with passages from a store
            ("stored-embedder:" with an embedder), or "specpc:unit=sentence,reduction=mean" for
            SpecPC with these options, and likewise "speckv:scorer=snapkv,reduction=mean" for
            SpecKV.

    Raises:
        ConfigError: There is no such method, or an option of SpecPC or SpecKV is invalid.
    """
    found: dict[str, EvalMethod] = {}
    for name in names:
        for single in GROUPS.get(name, (name,)):
            found[single] = _find(single)
    return list(found.values())


def _find(name: str) -> EvalMethod:
    prefix, _, model = name.partition(":")
    if prefix in EMBEDDED:
        load = cache(lambda: EMBEDDED[prefix](scorers.embedding(model)))
        return prompt_method(name, lambda case, share: load()(case, share), lambda _: load())
    if prefix in STORED:
        return _by_store(name, STORED[prefix], _store_options(name, model))
    if name.startswith(OPTIONS):
        return _by_specpc(name, _options(SpecPC, OPTIONS, name))
    if name.startswith(CACHE_OPTIONS):
        return _by_speckv(name, _options(SpecKV, CACHE_OPTIONS, name))
    if name not in METHODS:
        raise ConfigError(
            f"There is no method {name!r}; there are {sorted(METHODS)}, the groups "
            f"{sorted(GROUPS)}, {', '.join(EMBEDDED)} with :MODEL for methods by an encoder, "
            f"{' and '.join(STORED)} with :NAME=VALUE,... for options of a store, and "
            f"{OPTIONS}NAME=VALUE,... or {CACHE_OPTIONS}NAME=VALUE,... for options of SpecPC or "
            "SpecKV."
        )
    return METHODS[name]


def _store_options(name: str, text: str) -> dict[str, Any]:
    """Options of a store from "codec=int4,layers=all"."""
    pairs = (part.partition("=") for part in text.split(","))
    found: dict[str, Any] = {key: value for key, _, value in pairs}
    wrong = sorted(found.keys() - stored.OPTIONS)
    if wrong:
        raise ConfigError(
            f"{name} holds no options of a store: {wrong}; there are {sorted(stored.OPTIONS)}."
        )
    if "first_layer" in found:
        found["first_layer"] = int(found["first_layer"])
    return found


def _options(kind: type[_Options], prefix: str, name: str) -> _Options:
    """Options from "specpc:unit=sentence,lookahead_tokens=8"; values are JSON, or else text."""
    found: dict[str, Any] = {}
    for part in name.removeprefix(prefix).split(","):
        key, _, value = part.partition("=")
        try:
            found[key.strip()] = json.loads(value)
        except ValueError:
            found[key.strip()] = value
    try:
        return kind(**found)
    except ConfigError as error:
        raise ConfigError(f"{name} holds no options of {kind.__name__}. {error}") from error

"""Allocation failures inside a layer: the cache goes, the error tells sizes, the next works."""

from __future__ import annotations

import gc
import re
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from draftsieve import Engine, Generation, SpecKV, SpecKVPC, SpecPC
from draftsieve.core.compressor import Compressor
from draftsieve.core.errors import DraftSieveError, OutOfMemoryError
from draftsieve.core.models.footprint import explain_out_of_memory
from draftsieve.core.models.loading import load_model

from .adapters_fixtures import QUESTION, TEXTS, tiny_model, tiny_tokenizer

SHORT = Generation(max_new_tokens=8)
SPECKV = SpecKV(ratio=0.5)
METHODS = [None, SPECKV, SpecKVPC(specpc=SpecPC(ratio=0.7), speckv=SPECKV)]


def _more_than_there_is() -> None:
    torch.empty(2**60, dtype=torch.uint8)


def _cuda() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")


def _python() -> None:
    raise MemoryError


FAILURES = [_more_than_there_is, _cuda, _python]


class _Watched:
    """Weak references to the caches, and their tensors, that were at work."""

    def __init__(self) -> None:
        self.caches: list[weakref.ref[Any]] = []
        self.calls = 0

    def see(self, cache: Any) -> None:
        if cache is None:  # a draft that guesses one token needs none
            return
        self.caches.append(weakref.ref(cache))
        for layer in cache.layers:
            self.caches.append(weakref.ref(layer))
            if layer.keys is not None:
                self.caches += [weakref.ref(layer.keys), weakref.ref(layer.values)]

    @property
    def alive(self) -> int:
        return sum(ref() is not None for ref in self.caches)


@contextmanager
def failing(model: torch.nn.Module, fail: Callable[[], None], after: int = 0) -> Iterator[_Watched]:
    """The second layer fails at its call number `after`, when the first one has its entries."""
    watched = _Watched()

    def hook(_module: torch.nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
        watched.see(kwargs["past_key_values"])
        watched.calls += 1
        if watched.calls > after:
            fail()

    handle = model.model.layers[1].register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield watched
    finally:
        handle.remove()


def _engine() -> Engine:
    return Engine(
        tiny_model(64, seed=2), tiny_tokenizer(), draft_model=tiny_model(32, seed=1), name="tiny"
    )


@pytest.mark.parametrize("fail", FAILURES)
@pytest.mark.parametrize("after", [0, 3], ids=["prefill", "decode"])
@pytest.mark.parametrize("method", METHODS, ids=["full", "speckv", "speckvpc"])
def test_the_cache_is_freed_and_the_next_request_works(
    method: SpecKV | SpecKVPC | None, after: int, fail: Callable[[], None]
) -> None:
    engine = _engine()
    expected = engine.answer(QUESTION, TEXTS, method=method, generation=SHORT)
    gc.collect()
    gc.disable()  # what is freed must not have waited for the collector
    try:
        with failing(engine.target, fail, after) as watched:
            with pytest.raises(OutOfMemoryError) as caught:
                engine.answer(QUESTION, TEXTS, method=method, generation=SHORT)
            assert watched.calls == after + 1
            assert watched.alive == 0  # although `caught` holds the error and its traceback
    finally:
        gc.enable()
    text = str(caught.value)
    tokens = expected.usage.prompt_tokens
    assert f"a prompt of {tokens:,} tokens" in text
    if method is None:
        assert "no SpecKV" in text
    else:
        assert f"capacity of {expected.usage.cache_entries:,} entries" in text
    assert re.search(r"target \d+ MB, draft \d+ MB", text)
    assert "smaller capacity" in text
    assert isinstance(caught.value, MemoryError | DraftSieveError)
    assert engine.answer(QUESTION, TEXTS, method=method, generation=SHORT).text == expected.text


@pytest.mark.parametrize("method", [None, SPECKV])
def test_sessions_survive_a_question_that_did_not_fit(method: SpecKV | None) -> None:
    engine = _engine()
    session = engine.session(TEXTS)
    expected = session.answer(QUESTION, method=method, generation=SHORT).text
    with (
        failing(engine.target, _cuda) as watched,
        pytest.raises(OutOfMemoryError, match=r"a prompt of \d+ tokens") as caught,
    ):
        session.answer(QUESTION, method=method, generation=SHORT)
    assert watched.caches
    assert watched.alive == 0, caught
    assert session.answer(QUESTION, method=method, generation=SHORT).text == expected
    with (
        failing(engine.target, _cuda) as watched,
        pytest.raises(OutOfMemoryError, match=r"reading \d+ tokens"),
    ):
        engine.session(TEXTS)
    assert watched.alive == 0


def test_a_stream_that_runs_out_frees_its_cache() -> None:
    engine = _engine()
    with failing(engine.target, _more_than_there_is, after=3) as watched:
        stream = engine.stream(QUESTION, TEXTS, method=SPECKV, generation=SHORT)
        with pytest.raises(OutOfMemoryError):
            list(stream)
    assert watched.alive == 0
    assert next(stream, None) is None


def test_a_batch_names_how_many_prompts_there_were() -> None:
    engine = _engine()
    with (
        failing(engine.target, _cuda) as watched,
        pytest.raises(OutOfMemoryError, match=r"2 prompts of up to \d+ tokens"),
    ):
        engine.answer_many([QUESTION] * 2, [TEXTS, TEXTS[:1]], generation=SHORT)
    assert watched.alive == 0


def test_a_draft_that_runs_out_is_named_with_its_prompt() -> None:
    engine = _engine()
    assert engine.draft is not None
    assert engine.compressor is not None
    with failing(engine.draft, _cuda) as watched:
        with pytest.raises(OutOfMemoryError, match=r"draft read a prompt of \d+ tokens \(ratio"):
            engine.answer(QUESTION, TEXTS, method=SpecPC(ratio=0.5), generation=SHORT)
        with pytest.raises(OutOfMemoryError, match=r"guessing .* of \d+ tokens \(capacity \d+\)"):
            engine.answer(QUESTION, TEXTS, method=SPECKV, generation=SHORT)
        with pytest.raises(OutOfMemoryError, match="capacity 100") as caught:
            Compressor(engine.draft, tiny_tokenizer()).compress(
                QUESTION, TEXTS, SpecPC(capacity=100)
            )
        context = engine.compress(QUESTION, TEXTS, SpecPC(ratio=0.5), on_error="original")
    assert watched.alive == 0, caught
    assert "OutOfMemoryError" in (context.stats.fallback or "")
    assert engine.answer(QUESTION, TEXTS, method=SPECKV, generation=SHORT).text


def test_a_trace_that_runs_out_says_so() -> None:
    engine = _engine()
    ids = torch.arange(5, 90).unsqueeze(0)
    with failing(engine.target, _cuda), pytest.raises(OutOfMemoryError, match="tracing 85 tokens"):
        engine.trace(ids, SpecKV(capacity=40))


def test_a_model_that_does_not_fit_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.nn.Module, "to", lambda *_a, **_k: _more_than_there_is())
    monkeypatch.setattr(torch.Tensor, "to", lambda *_a, **_k: _more_than_there_is())
    with pytest.raises(OutOfMemoryError, match="while loading 'builtin:draft'") as caught:
        load_model("builtin:draft", device="cpu", progress=False)
    assert "bits=4" in str(caught.value)


@pytest.mark.parametrize(
    ("message", "known"),
    [
        ("CUDA error: out of memory", True),
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", True),
        ("MPS backend out of memory (MPS allocated: 9 GB)", True),
        ("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.", True),
        ("The size of tensor a (3) must match the size of tensor b (4)", False),
    ],
)
def test_what_counts_as_out_of_memory(message: str, known: bool) -> None:
    expected = OutOfMemoryError if known else RuntimeError
    with pytest.raises(expected) as caught, explain_out_of_memory("trying"):
        raise RuntimeError(message)
    assert isinstance(caught.value, OutOfMemoryError) == known

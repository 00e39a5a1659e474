"""Time limits and cancellations end a request at its next layer or token, wherever it is."""

from __future__ import annotations

import asyncio
import copy
import gc
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn
from transformers import DynamicCache

from draftsieve import Generation, SpecKV, SpecPC
from draftsieve.core.compressor import Compressor
from draftsieve.core.conversation.compressor import TurnCompressor
from draftsieve.core.conversation.turns import Turn
from draftsieve.core.errors import RequestTimeoutError
from draftsieve.core.runtime.worker import Worker

from .adapters_fixtures import QUESTION, TEXTS, tiny_compressor, tiny_engine

LONG = Generation(max_new_tokens=200)


def caches() -> int:
    gc.collect()
    return sum(issubclass(type(thing), DynamicCache) for thing in gc.get_objects())


class Gate:
    """Holds a model in its first layer at a chosen pass, and counts what runs behind that."""

    def __init__(self, passes: int) -> None:
        self.reached, self.released = threading.Event(), threading.Event()
        self.passes, self.layers = passes, 0  # layers that ran after the release

    def first(self, *_: Any) -> None:
        self.passes -= 1
        if self.passes == 0:
            self.reached.set()
            assert self.released.wait(20)

    def later(self, *_: Any) -> None:
        self.layers += self.released.is_set()


@contextmanager
def gated(model: Any, passes: int) -> Iterator[Gate]:
    gate = Gate(passes)
    first, second = model.model.layers[0], model.model.layers[1]
    hooks = [first.self_attn.q_proj.register_forward_hook(gate.first)]
    hooks += [layer.mlp.register_forward_hook(gate.later) for layer in (first, second)]
    try:
        yield gate
    finally:
        gate.released.set()
        for hook in hooks:
            hook.remove()


async def cancelled_inside(gate: Gate, work: Awaitable[Any], worker: Worker) -> None:
    """Cancel while the model is held, let it go on, and wait until its thread is free again."""
    task = asyncio.ensure_future(work)
    assert await asyncio.to_thread(gate.reached.wait, 20)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    gate.released.set()
    assert await worker.run(lambda: True)


@pytest.mark.parametrize(
    ("method", "model", "passes"),
    [
        (None, "target", 1),  # the target reads the prompt
        (None, "target", 5),  # it decodes
        (SpecPC(ratio=0.5), "draft", 1),  # the draft reads
        (SpecPC(ratio=0.5, lookahead_tokens=8), "draft", 4),  # it looks ahead
        (SpecKV(ratio=0.5), "draft", 1),
        (SpecKV(ratio=0.5, lookahead_tokens=40), "draft", 6),
        (SpecKV(ratio=0.5), "target", 1),  # the cache is evicted
    ],
)
async def test_a_cancelled_request_ends_at_the_next_layer(
    method: Any, model: str, passes: int
) -> None:
    engine = tiny_engine()
    with gated(getattr(engine, model), passes) as gate:
        asked = engine.aanswer(QUESTION, TEXTS, method=method, generation=LONG)
        await cancelled_inside(gate, asked, engine._worker)
        assert gate.layers == 0  # not even the layer it was held in was finished


async def test_cancelled_compressions_end_at_the_next_layer() -> None:
    compressor = tiny_compressor()
    turns = TurnCompressor(compressor, SpecPC(capacity=200))
    old = [Turn(" ".join([text] * 4), "never") for text in TEXTS]
    calls: list[Callable[[], Awaitable[Any]]] = [
        lambda: compressor.acompress(QUESTION, TEXTS, SpecPC(ratio=0.5), on_error="original"),
        lambda: compressor.aguess_answer(QUESTION, TEXTS, on_error="original"),
        lambda: turns.acompress(QUESTION, old, on_error="original"),
    ]
    for call in calls:
        with gated(compressor.model, 1) as gate:
            await cancelled_inside(gate, call(), compressor.worker)
            assert gate.layers == 0


@pytest.mark.parametrize(("model", "passes"), [("target", 1), ("draft", 1)])
async def test_a_session_stops_reading_at_the_next_layer(model: str, passes: int) -> None:
    engine = tiny_engine()
    session = engine.session(TEXTS[:1])
    for read in (lambda: engine.asession(TEXTS), lambda: session.aextend(TEXTS)):
        held = caches()
        with gated(getattr(engine, model), passes) as gate:
            await cancelled_inside(gate, read(), engine._worker)
            assert gate.layers == 0
        assert caches() == held


@pytest.mark.parametrize("model", ["target", "draft"])
def test_a_session_that_takes_too_long_ends_at_the_next_layer(model: str) -> None:
    engine = tiny_engine()
    session = engine.session(TEXTS[:1])
    reads: list[Callable[..., Any]] = [engine.session, session.extend]
    for read in reads:
        with gated(getattr(engine, model), 1) as gate:
            timer = threading.Timer(0.2, gate.released.set)
            timer.start()
            with pytest.raises(RequestTimeoutError):
                read(TEXTS, timeout=0.1)
            timer.join()
            assert gate.layers == 0
        assert read(TEXTS, timeout=60.0).passages


async def test_a_waiting_request_that_is_cancelled_never_runs() -> None:
    engine = tiny_engine()
    with gated(engine.target, 1) as gate:
        first = asyncio.create_task(engine.aanswer(QUESTION, TEXTS, generation=LONG))
        assert await asyncio.to_thread(gate.reached.wait, 20)
        second = asyncio.create_task(engine.aanswer(QUESTION, TEXTS, generation=LONG))
        await asyncio.sleep(0.01)
        for task in (first, second):
            task.cancel()
        assert len(await asyncio.gather(first, second, return_exceptions=True)) == 2
        gate.released.set()
        assert await engine._worker.run(lambda: True)
        assert (gate.layers, gate.passes) == (0, 0)


async def test_asynchronous_requests_take_turns() -> None:
    engine, running, most = tiny_engine(), 0, 0

    def enter(*_: Any) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)

    def leave(*_: Any) -> None:
        nonlocal running
        running -= 1

    model: nn.Module = engine.target
    hooks = [model.register_forward_pre_hook(enter), model.register_forward_hook(leave)]
    short = Generation(max_new_tokens=6)
    try:
        asked = [engine.aanswer(QUESTION, TEXTS, generation=short) for _ in range(6)]
        answers = await asyncio.gather(*asked)
    finally:
        for hook in hooks:
            hook.remove()
    assert most == 1
    assert {answer.text for answer in answers} == {
        engine.answer(QUESTION, TEXTS, generation=short).text
    }


async def test_time_in_the_queue_counts() -> None:
    engine = tiny_engine()
    late = Generation(max_new_tokens=4, timeout=0.05)
    with gated(engine.target, 1) as gate:
        first = asyncio.create_task(engine.aanswer(QUESTION, TEXTS, generation=LONG))
        assert await asyncio.to_thread(gate.reached.wait, 20)
        second = asyncio.create_task(engine.aanswer(QUESTION, TEXTS, generation=late))
        await asyncio.sleep(0.1)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first  # else its worker may run on before it hears of it
        gate.released.set()
        with pytest.raises(RequestTimeoutError):
            await second
        assert gate.layers == 0


@pytest.mark.parametrize(
    ("method", "model", "passes"),
    [
        (None, "target", 1),
        (SpecPC(ratio=0.5), "draft", 1),
        (SpecPC(ratio=0.5, lookahead_tokens=8), "draft", 4),
        (SpecKV(ratio=0.5, lookahead_tokens=40), "draft", 6),
        (SpecKV(ratio=0.5), "target", 1),
    ],
)
def test_a_request_out_of_time_ends_at_the_next_layer(
    method: Any, model: str, passes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, clock = tiny_engine(), [0.0]
    short = Generation(max_new_tokens=4)
    before = engine.answer(QUESTION, TEXTS, method=method, generation=short).text
    held = caches()
    clocks = SimpleNamespace(monotonic=lambda: clock[0], perf_counter=time.perf_counter)
    monkeypatch.setattr("draftsieve.core.runtime.limits.time", clocks)
    with gated(getattr(engine, model), passes) as gate:

        def run_out() -> None:
            assert gate.reached.wait(20)
            clock[0] = 10.0
            gate.released.set()

        waiter = threading.Thread(target=run_out)
        waiter.start()
        late = LONG.model_copy(update={"timeout": 5.0})
        with pytest.raises(RequestTimeoutError):
            engine.answer(QUESTION, TEXTS, method=method, generation=late)
        waiter.join()
        assert gate.layers == 0
    assert caches() == held
    assert engine.answer(QUESTION, TEXTS, method=method, generation=short).text == before


async def test_an_error_in_the_worker_is_the_callers() -> None:
    def fail() -> None:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        await Worker().run(fail)


def test_copies_have_workers_of_their_own() -> None:
    worker = Worker()
    assert isinstance(copy.deepcopy(worker), Worker)
    assert isinstance(copy.copy(worker), Worker)
    assert copy.copy(worker) is not worker
    assert isinstance(copy.deepcopy(tiny_compressor()), Compressor)

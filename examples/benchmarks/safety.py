"""Figures of safety: requests at once, requests that break, passages that attack.

1. Half of the requests run as tasks, half in threads of their own, with different methods and
   options; each answer is compared with the one of the same request alone.
2. Requests are broken in the middle of a forward pass of the draft or the target by an exception, a
   timeout or a cancellation; afterwards the engine is asked again and KV caches still held are
   counted.
3. Hostile passages (`hostile.py`) are encoded and compressed; control tokens among the passages'
   tokens, crashes, and spans that do not slice the original text exactly are counted. A single word
   of a million characters is compressed apart.

Run `python examples/benchmarks/safety.py`.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

from hostile import FACTS, hostile_prompts
from transformers import DynamicCache

from draftsieve import Answer, CompressedContext, Engine, Generation, Prompt, SpecKV, SpecPC
from draftsieve.core.errors import RequestTimeoutError
from draftsieve.core.types import Segment

QUESTION = "When does the ferry to Holm leave?"
METHODS = (None, SpecPC(ratio=0.5), SpecKV(ratio=0.4), SpecPC(ratio=0.7, unit="word"))
SHORT = Generation(max_new_tokens=8)
GENERATIONS = (SHORT, Generation(max_new_tokens=8, temperature=1.0, seed=11))


def main(argv: Sequence[str] | None = None) -> None:
    """Print the three figures."""
    options = _options(argv)
    engine = Engine.load(options.target, options.draft, progress=False)
    concurrency(engine, options.requests)
    faults(engine)
    hostile(engine, options.passages)
    long_word(engine, options.word)


def concurrency(engine: Engine, count: int) -> None:
    """Answers of requests at once that equal those of the same requests one by one."""

    def job(number: int) -> tuple[list[str], dict[str, Any]]:
        method = METHODS[number % len(METHODS)]
        generation = GENERATIONS[number // len(METHODS) % len(GENERATIONS)]
        return [*FACTS, f"Number {number}."], {"method": method, "generation": generation}

    def ask(number: int) -> str:
        texts, options = job(number)
        return engine.answer(QUESTION, texts, **options).text

    async def ask_later(number: int) -> str:
        texts, options = job(number)
        return (await engine.aanswer(QUESTION, texts, **options)).text

    async def at_once() -> list[str]:
        asked = (ask_later(n) if n % 2 else asyncio.to_thread(ask, n) for n in range(count))
        return list(await asyncio.gather(*asked))

    serial, began = [ask(number) for number in range(count)], time.perf_counter()
    mixed = asyncio.run(at_once())
    same = sum(a == b for a, b in zip(serial, mixed, strict=True))
    seconds = time.perf_counter() - began
    print(f"{same} of {count} requests at once (half async) equal serial ones, {seconds:.1f} s")


class BrokenError(RuntimeError):
    """Raised in the middle of a forward pass."""


def faults(engine: Engine) -> None:
    """Requests broken in the middle: what they leave behind."""
    asked = {"question": QUESTION, "passages": FACTS}
    before = {method: engine.answer(**asked, method=method, generation=SHORT) for method in METHODS}
    held, tried, usable = _caches(), 0, 0
    for name, fault in {"exception": _exception, "timeout": _timeout, "cancel": _cancel}.items():
        for which, method in _places(engine):
            tried += 1
            if not fault(engine, which, {**asked, "method": method}):
                print(f"  the {name} did not reach the {which} with {method!r}")
            again = engine.answer(**asked, method=method, generation=SHORT)
            usable += again.text == before[method].text
    print(
        f"{tried} requests broken by an exception, a timeout or a cancellation: the engine answers "
        f"as before after {usable}; {_caches() - held} KV caches are left over"
    )


def _places(engine: Engine) -> Iterator[tuple[str, Any]]:
    """Models in which a request with a method can break."""
    for method in METHODS:
        yield "target", method
        if method is not None and engine.draft is not None:
            yield "draft", method


@contextmanager
def _hooked(engine: Engine, which: str, hook: Callable[..., None]) -> Iterator[None]:
    """Call a hook behind the first layer of a model."""
    handle = getattr(engine, which).model.layers[0].register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _exception(engine: Engine, which: str, asked: dict[str, Any]) -> bool:
    def fail(*_: Any) -> None:
        raise BrokenError

    with _hooked(engine, which, fail):
        return _ends_with(BrokenError, lambda: engine.answer(**asked, generation=SHORT))


def _timeout(engine: Engine, which: str, asked: dict[str, Any]) -> bool:
    late = SHORT.model_copy(update={"timeout": 0.05})
    with _hooked(engine, which, lambda *_: time.sleep(0.1)):
        return _ends_with(RequestTimeoutError, lambda: engine.answer(**asked, generation=late))


def _cancel(engine: Engine, which: str, asked: dict[str, Any]) -> bool:
    async def cancelled() -> Answer:
        reached, loop = asyncio.Event(), asyncio.get_running_loop()

        def hold(*_: Any) -> None:
            loop.call_soon_threadsafe(reached.set)
            time.sleep(0.05)

        with _hooked(engine, which, hold):
            task = asyncio.create_task(engine.aanswer(**asked, generation=SHORT))
            waiting = asyncio.create_task(reached.wait())
            await asyncio.wait({task, waiting}, return_when=asyncio.FIRST_COMPLETED)
            waiting.cancel()
            task.cancel()
            return await task

    return _ends_with(asyncio.CancelledError, lambda: asyncio.run(cancelled()))


def _ends_with(error: type[BaseException], call: Callable[[], Any]) -> bool:
    try:
        call()
    except error:
        return True
    return False


def _caches() -> int:
    gc.collect()
    return sum(issubclass(type(thing), DynamicCache) for thing in gc.get_objects())


def hostile(engine: Engine, count: int) -> None:
    """Hostile passages: control tokens that came through, crashes, wrong spans."""
    compressor = engine.compressor
    assert compressor is not None
    added = compressor.tokenizer.added_tokens_decoder.items()
    unknown = compressor.tokenizer.unk_token_id
    controls = {i for i, token in added if token.content.strip() and i != unknown}
    found = crashes = wrong = 0
    for texts in hostile_prompts(count):
        tokens = compressor.encoder.encode(Prompt.from_question(QUESTION, texts))
        read = tokens.ids[tokens.segment == int(Segment.PASSAGE)].tolist()
        found += sum(token in controls for token in read)
        try:
            context = compressor.compress(QUESTION, texts, SpecPC(ratio=0.3))
        except Exception as error:  # noqa: BLE001 - it is counted
            crashes += 1
            print(f"  {type(error).__name__}: {error}")
        else:
            wrong += _wrong_passages(context, texts)
    print(
        f"{count} hostile passages: {found} control tokens, {crashes} crashes, "
        f"{wrong} passages whose spans do not slice the original exactly"
    )


def long_word(engine: Engine, characters: int) -> None:
    """One word without a gap, as long as a whole book."""
    assert engine.compressor is not None
    texts, began = [("abcdefgh" * (characters // 8 + 1))[:characters], *FACTS], time.perf_counter()
    context = engine.compressor.compress(QUESTION, texts, SpecPC(ratio=0.05))
    stats = context.stats
    print(
        f"a word of {characters:,} characters: {stats.compressed_passage_tokens:,} of "
        f"{stats.passage_tokens:,} tokens kept in {time.perf_counter() - began:.1f} s, "
        f"{_wrong_passages(context, texts)} passages with wrong spans"
    )


def _wrong_passages(context: CompressedContext, texts: Sequence[str]) -> int:
    wrong = 0
    for index, (passage, text) in enumerate(zip(context.passages, texts, strict=True)):
        spans = [(s.start, s.end) for s in context.spans if s.passage_index == index]
        ascending = all(end < start for (_, end), (start, _) in pairwise(spans))
        inside = all(0 <= start < end <= len(text) for start, end in spans)
        whole = " … ".join(text[start:end] for start, end in spans)
        wrong += not (ascending and inside and whole == passage.text)
    return wrong


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", default="builtin:target")
    parser.add_argument("--draft", default="builtin:draft")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--passages", type=int, default=2000)
    parser.add_argument("--word", type=int, default=1_000_000, help="characters of the long word")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()

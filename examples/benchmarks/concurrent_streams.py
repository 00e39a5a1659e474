"""Requests that arrive together: streamed one after another, streamed at once, and as one batch.

Every request has its own question and passages and decodes the same number of tokens. "First token"
is what a user waits for the first words (all requests are made at the same moment), "pause" the
longest time that a stream stood still afterwards, while other prompts were read. Ways alternate, so
that a busy moment of the machine hits all of them; cells are medians over the repeats. Prints a
Markdown table. Run `python examples/benchmarks/concurrent_streams.py`, with `--random` for a target
of random weights (about 50M parameters) behind the bundled tokenizer.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from compression_cost import python_reference, take
from serving import random_pair

from draftsieve import Engine, Generation, SpecKV, SpecPC
from draftsieve.core.config import Method

METHODS: dict[str, Method | None] = {
    "none": None,
    "specpc": SpecPC(ratio=0.3),
    "speckv": SpecKV(ratio=0.25, scorer="snapkv"),
}


@dataclass(frozen=True, slots=True)
class Timed:
    """One request's seconds since all were made."""

    tokens: tuple[float, ...]  # when each piece of its text came

    @property
    def first(self) -> float:
        """Until the first words."""
        return self.tokens[0]

    @property
    def pause(self) -> float:
        """Longest time between two pieces."""
        pairs = zip(self.tokens, self.tokens[1:], strict=False)
        return max((later - earlier for earlier, later in pairs), default=0.0)


@dataclass(frozen=True, slots=True)
class Work:
    """The requests."""

    engine: Engine
    questions: Sequence[str]
    passages: Sequence[Sequence[str]]
    method: Method | None
    generation: Generation

    async def stream(self, place: int, began: float) -> Timed:
        """One request."""
        options = {"method": self.method, "generation": self.generation}
        question, passages = self.questions[place], self.passages[place]
        chunks = self.engine.astream(question, passages, **options)  # type: ignore[arg-type]
        return Timed(tuple([time.perf_counter() - began async for chunk in chunks]))

    async def in_turn(self) -> list[Timed]:
        """Each request once the one before is done."""
        began = time.perf_counter()
        return [await self.stream(place, began) for place in range(len(self.questions))]

    async def at_once(self) -> list[Timed]:
        """All requests at the same moment."""
        began = time.perf_counter()
        places = range(len(self.questions))
        return await asyncio.gather(*(self.stream(place, began) for place in places))

    async def batch(self) -> list[Timed]:
        """One call, which gives nothing before the end."""
        began = time.perf_counter()
        self.engine.answer_many(
            self.questions, self.passages, self.method, generation=self.generation
        )
        return [Timed((time.perf_counter() - began,))] * len(self.questions)


def main(argv: Sequence[str] | None = None) -> int:
    """Time all ways and print the table."""
    options = _options(argv)
    engine = Engine.load(options.target, options.draft, progress=False)
    if options.random:
        assert engine.tokenizer is not None  # `load` always brings one
        engine = random_pair(engine.tokenizer, options)
    for model in (engine.target, engine.draft):  # all requests decode as many tokens
        assert model is not None  # a draft was loaded
        model.generation_config.eos_token_id = None
    text = python_reference()
    texts = [
        [*text.paragraphs[place:], *text.paragraphs[:place]] for place in range(options.requests)
    ]
    work = Work(
        engine,
        text.questions[: options.requests],
        [take(each, options.tokens, engine.count_tokens) for each in texts],
        METHODS[options.method],
        Generation(max_new_tokens=options.new_tokens),
    )
    size = f"{engine.target.num_parameters() / 1e6:.0f}M"
    print(f"{engine.model_name} {size}, {torch.get_num_threads()} threads, {options.requests}")
    print(f"requests of about {options.tokens} tokens, {options.new_tokens} new ones each, method")
    print(f"{options.method}, medians of {options.repeats} repeats.\n")
    print("| way | seconds | first token: median | latest | pause: median | longest |")
    print("|---|---:|---:|---:|---:|---:|")
    ways: dict[str, Callable[[], Coroutine[Any, Any, list[Timed]]]] = {
        "`astream`, one after another": work.in_turn,
        "`astream`, all at once": work.at_once,
        "`answer_many`": work.batch,
    }
    for way in (work.batch, work.at_once):  # warm up: both threads have pools of their own
        asyncio.run(way())
    runs: dict[str, list[list[Timed]]] = {name: [] for name in ways}
    for _ in range(options.repeats):
        for name, way in ways.items():
            runs[name].append(asyncio.run(way()))
    for name, found in runs.items():
        print(f"| {name} | {' | '.join(_cells(found))} |")
    return 0


def _cells(runs: Sequence[Sequence[Timed]]) -> list[str]:
    """Medians over the repeats of: all done, first tokens, pauses."""
    first = [[timed.first for timed in run] for run in runs]
    pauses = [[timed.pause for timed in run] for run in runs]
    values = [
        median(max(timed.tokens[-1] for timed in run) for run in runs),
        median(map(median, first)),
        median(map(max, first)),
        median(map(median, pauses)),
        median(map(max, pauses)),
    ]
    return [f"{value:.2f}" for value in values]


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", default="builtin:target")
    parser.add_argument("--draft", default="builtin:draft")
    parser.add_argument("--random", action="store_true", help="random weights, bundled tokenizer")
    parser.add_argument("--hidden", type=int, default=640, help="of the random target")
    parser.add_argument("--layers", type=int, default=10, help="of the random target")
    parser.add_argument("--device", default="cpu", help="of the random pair")
    parser.add_argument("--method", choices=sorted(METHODS), default="none")
    parser.add_argument("--requests", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=1200, help="of each request's passages")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    return parser.parse_args(argv)


if __name__ == "__main__":
    raise SystemExit(main())

"""A session against reading the documents again: seconds and bytes a question.

The same questions are put to (a) `Engine.answer`, which reads the documents every time, and (b)
`Engine.session`, which has read them once, with the numbers as they are, rounded to int8, and
mapped from a file. Every way is run with all cache entries and with SpecKV. Seconds a question
after 1, 2, 5 and 10 questions include the one reading of the documents (for the mapped file: its
opening). "Held" are the keys and values of both models outside any working cache. Runs of all ways
alternate; cells are medians with the fastest and slowest run. "Same" is the share of answers equal
to those of reading again with the same method. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch
from compression_cost import Text, python_reference, take
from serving import entry_bytes, random_pair

from draftsieve import Engine, Generation, SpecKV
from draftsieve.core.models.devices import pick_device
from draftsieve.core.session import Session

READ_AGAIN = "read again"


@dataclass(slots=True)
class Way:
    """One way of answering with one method, over all repeats."""

    held: int = 0  # bytes outside the working cache
    working: int = 0  # bytes of the working cache when decoding starts
    opening: list[float] = field(default_factory=list)  # seconds before the first question
    questions: list[list[float]] = field(default_factory=list)  # per repeat, seconds of each
    texts: list[str] = field(default_factory=list)

    def seconds(self, count: int) -> list[float]:
        """Seconds a question after so many questions, for each repeat."""
        pairs = zip(self.opening, self.questions, strict=True)
        return [(opening + sum(each[:count])) / count for opening, each in pairs]


def main(argv: Sequence[str] | None = None) -> int:
    """Time all pairs, and print the table."""
    options = _options(argv)
    text = python_reference()
    bundled = Engine.load("builtin:target", "builtin:draft", device=options.device, progress=False)
    assert bundled.tokenizer is not None  # `load` always brings one
    assert bundled.draft is not None
    for model in (bundled.target, bundled.draft):  # every way decodes as many tokens
        model.generation_config.eos_token_id = None
    counts = options.counts
    print(f"{options.device}, {torch.get_num_threads()} threads, {options.new_tokens} new tokens,")
    print(f"{options.lookahead} tokens of lookahead, SpecKV keeps 1 of every {options.share}")
    print(f"passage tokens, {options.repeats} alternating repeats. Seconds a question:\n")
    print(
        "| pair | documents | way | held | working cache | opening s | "
        + " | ".join(f"{count} asked" for count in counts)
        + " | same |"
    )
    print("|---|---:|---|---:|---:|---:|" + "---:|" * (len(counts) + 1))
    for name in options.models:
        engine, length = bundled, options.length
        if name == "random":
            engine, length = random_pair(bundled.tokenizer, options), options.random_length
        label = f"{name} {engine.target.num_parameters() / 1e6:.0f}M"
        for line in table(label, engine, text, length, options):
            print(line, flush=True)
    return 0


def table(
    name: str, engine: Engine, text: Text, length: int, options: argparse.Namespace
) -> list[str]:
    """One row for each way and method."""
    passages = take(text.paragraphs, length, engine.count_tokens)
    asked = list(text.questions[: max(options.counts)])
    methods = {
        "all entries": None,
        "SpecKV": SpecKV(ratio=1 / options.share, lookahead_tokens=options.lookahead),
    }
    found: dict[tuple[str, str], Way] = {}
    documents = 0
    with TemporaryDirectory() as folder:
        first = engine.session(passages)
        documents = first.stats.tokens
        first.save(folder)
        openings: dict[str, Callable[[], Session | None]] = {
            READ_AGAIN: lambda: None,
            "session": lambda: engine.session(passages),
            "session, int8": lambda: engine.session(passages, storage="int8"),
            "session, file": lambda: engine.load_session(Path(folder)),
        }
        for repeat in range(options.repeats + 1):
            for way, begin in openings.items():
                for label, method in methods.items():
                    place = found.setdefault((way, label), Way())
                    run(place, engine, begin, passages, asked, method, options, warm=not repeat)
    lines = []
    for (way, label), place in found.items():
        again = found[(READ_AGAIN, label)].texts
        same = sum(a == b for a, b in zip(place.texts, again, strict=True)) / len(again)
        cells = [
            name,
            f"{documents:,}",
            f"{way}, {label}",
            f"{place.held / 1e6:.1f} MB",
            f"{place.working / 1e6:.1f} MB",
            _spread(place.opening),
            *(_spread(place.seconds(count)) for count in options.counts),
            f"{same:.0%}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def run(
    place: Way,
    engine: Engine,
    begin: Callable[[], Session | None],
    passages: Sequence[str],
    asked: Sequence[str],
    method: SpecKV | None,
    options: argparse.Namespace,
    *,
    warm: bool,
) -> None:
    """Open, ask everything once, and note what it cost; the warming round is not noted."""
    generation = Generation(max_new_tokens=options.new_tokens)
    began = time.perf_counter()
    session = begin()
    opening = time.perf_counter() - began
    seconds: list[float] = []
    texts: list[str] = []
    for question in asked[:1] if warm else asked:
        began = time.perf_counter()
        if session is None:
            answer = engine.answer(question, passages, method=method, generation=generation)
        else:
            answer = session.answer(question, method=method, generation=generation)
        seconds.append(time.perf_counter() - began)
        texts.append(answer.text)
    if warm:
        return
    place.opening.append(opening)
    place.questions.append(seconds)
    place.texts = texts
    place.held = 0 if session is None else session.bytes
    whole = answer.usage.prompt_tokens * entry_bytes(engine.target)
    place.working = whole if answer.cache_bytes is None else answer.cache_bytes


def _spread(values: Sequence[float]) -> str:
    return f"{median(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    known = ["bundled", "random"]
    parser.add_argument("--models", nargs="+", choices=known, default=known)
    parser.add_argument("--length", type=int, default=1800, help="bundled pair")
    parser.add_argument("--random-length", type=int, default=1024)
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 2, 5, 10])
    parser.add_argument("--share", type=int, default=8, help="keep 1 of so many passage tokens")
    parser.add_argument("--lookahead", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--quick", action="store_true", help="a smoke test: small and once")
    options = parser.parse_args(argv)
    options.device = pick_device(options.device)
    if options.quick:
        options.length, options.random_length, options.counts = 300, 300, [1, 2]
        options.new_tokens, options.lookahead, options.repeats = 4, 2, 1
        options.hidden, options.layers = 256, 2
    return options


if __name__ == "__main__":
    raise SystemExit(main())

"""`make demo`: ask a handbook with and without compression, then count surviving answers.

Part 1 asks 40 questions of an invented organisation's handbook and compares the target's answers
on everything that was retrieved with its answers on what SpecPC kept. Part 2 asks the language
reference that each Python carries, and measures how often the characters of the answer survive,
against simple baselines that keep as many tokens. Runs without a network.
"""

from __future__ import annotations

import argparse
import json
import re
import resource
import textwrap
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from rich.console import Console
from rich.progress import track
from rich.table import Table

from draftsieve import Answer, Compressor, Engine, Generation, Passage, SpecPC
from draftsieve.core.evaluation.baselines import (
    Kept,
    random_sentences,
    ranked_passages,
    ranked_sentences,
    truncation_head,
)
from draftsieve.core.evaluation.intervals import paired_difference, wilson
from draftsieve.core.evaluation.python_reference import read_reference
from draftsieve.core.evaluation.realtext.contexts import Around, real_items
from draftsieve.core.evaluation.realtext.rankings import by_words
from draftsieve.core.evaluation.survival import Method, Outcome, compression, measure
from draftsieve.core.evaluation.tasks import EvalItem
from draftsieve.integrations.cli import main as cli
from draftsieve.integrations.cli.render import highlighted
from draftsieve.integrations.html_view import render_html
from draftsieve.retrievers.bm25 import Bm25Index
from draftsieve.retrievers.folder import read_folder

DATA = Path(__file__).resolve().parent / "data"
SEED = 2026
HANDBOOK_TOKENS, HANDBOOK_METHOD = 1500, SpecPC.preset("2026-11", ratio=0.3)
REFERENCE_TOKENS, REFERENCE_RATIO = 1800, 0.25
SHOWN, HIGHLIGHTED = 8, 2  # questions printed in full, and those with their kept text
out = Console(markup=False, highlight=False, emoji=False)
if not out.is_terminal:
    out.width = 118  # rows of the tables on one line each, also in a file
errors = Console(stderr=True)
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Asked:
    """One question of the handbook, answered from the whole context and from what was kept."""

    question: str
    expected: str
    passages: tuple[Passage, ...]
    found: bool  # the retriever found the right document
    plain: Answer
    kept: Answer

    def right(self, answer: Answer) -> bool:
        return normalised(answer.text) == normalised(self.expected)


def main(argv: Sequence[str] | None = None) -> int:
    """Run both parts and print the closing table."""
    options = _options(argv)
    began = time.perf_counter()
    engine = Engine.load(options.target, options.draft, progress=not options.quiet)
    compressor = engine.compressor
    assert compressor is not None  # there is a draft
    asked = ask_handbook(engine, compressor, options.questions, quiet=options.quiet)
    show_asked(asked)
    show_eviction(asked[0].question, options)
    options.html.parent.mkdir(parents=True, exist_ok=True)
    first = asked[0]
    page = render_html(first.question, first.kept, first.kept.context, first.passages)
    options.html.write_text(page, encoding="utf-8")
    outcomes = survival(compressor, options.reference_questions, quiet=options.quiet)
    show_survival(outcomes)
    show_summary(asked, outcomes)
    out.print(f"Kept text of the first question as a web page: {options.html}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    out.print(f"Wall time {time.perf_counter() - began:.0f} s, peak memory {peak:.0f} MiB")
    return 0


def show_eviction(question: str, options: argparse.Namespace) -> None:
    """The command line with SpecKV and SpecKV-PC."""
    for method in ("speckv", "speckv-pc"):
        line = ["ask", question, "--docs", str(DATA / "handbook"), "--method", method]
        line += ["--ratio", "0.3", "--max-new-tokens", "48"]
        out.rule(f"draftsieve ask ... --method {method} --ratio 0.3")
        models = ["--target", options.target, "--draft", options.draft]
        if cli([*line, *models, "--no-progress"]):
            raise SystemExit("draftsieve ask failed")


# ---------------------------------------------------------------- part 1: the handbook


def ask_handbook(engine: Engine, compressor: Compressor, limit: int, *, quiet: bool) -> list[Asked]:
    """Answer every question twice, on the same retrieved passages."""
    index = Bm25Index.from_passages(read_folder(DATA / "handbook"))
    lines = (DATA / "handbook_questions.jsonl").read_text(encoding="utf-8").splitlines()
    generation = Generation(max_new_tokens=48)
    asked = []
    for entry in _track([json.loads(line) for line in lines[:limit]], "handbook", quiet):
        question = entry["question"]
        passages = retrieve(index, question, compressor)
        plain = engine.answer(question, passages, generation=generation)
        kept = engine.answer(question, passages, method=HANDBOOK_METHOD, generation=generation)
        found = any(entry["document"] in passage.metadata["source"] for passage in passages)
        asked.append(Asked(question, entry["answer"], passages, found, plain, kept))
    return asked


def retrieve(index: Bm25Index, question: str, compressor: Compressor) -> tuple[Passage, ...]:
    """The best passages by BM25, as many as fit the token budget."""
    chosen, left = [], HANDBOOK_TOKENS
    for passage, _ in index.search(question, 60):
        size = compressor.count_tokens(passage.text)
        if size <= left:
            chosen.append(passage)
            left -= size
    return tuple(chosen)


def normalised(text: str) -> list[str]:
    """Case, articles, end punctuation, white space and the order of listed values do not count."""
    values = re.sub(r"\b(a|an|the)\b", " ", text.casefold()).split(", ")
    return sorted(" ".join(value.split()).strip(".;:!?\"'") for value in values)


def shortened(text: str) -> str:
    """A long answer, cut for the list."""
    return textwrap.shorten(text, 90, placeholder=" …")


def show_asked(asked: Sequence[Asked]) -> None:
    """Print the first questions with their answers, and for some the passages that mattered."""
    out.rule("Handbook: the first questions")
    for place, row in enumerate(asked[:SHOWN]):
        before, after = row.kept.usage.original_prompt_tokens, row.kept.usage.prompt_tokens
        out.print(f"\n{place + 1}. {row.question}", style="bold")
        out.print(f"   expected     {row.expected}")
        for name, answer in (("whole", row.plain), ("SpecPC", row.kept)):
            mark, style = ("✓", "green") if row.right(answer) else ("✗", "red")
            out.print(f"   {name:<12} {shortened(answer.text)} {mark}", style=style)
        out.print(f"   prompt tokens {before} → {after}", style="dim")
        if place < HIGHLIGHTED:
            _show_best(row, count=3)


def _show_best(row: Asked, count: int) -> None:
    """Print the passages with the best scores, kept text highlighted."""
    context = row.kept.context
    assert context is not None  # a method was given
    best = sorted(range(len(row.passages)), key=lambda i: -context.sizes[i].score)[:count]
    for place in sorted(best):
        out.print(f"   [{place + 1}] {row.passages[place].id}", style="dim")
        out.print(highlighted(row.passages[place], place, context, styled=out.is_terminal))


# ---------------------------------------------------------------- part 2: the language reference


def survival(compressor: Compressor, limit: int, *, quiet: bool) -> list[Outcome]:
    """Run SpecPC and the baselines over the same items, at the size that SpecPC used."""
    reference, count = read_reference(DATA / "python_reference.jsonl"), compressor.count_tokens
    around = Around("bm25", REFERENCE_TOKENS, by_words())
    found = real_items(reference, around, count, count=limit, seed=SEED)
    items = [item for item in found if item.evidence]  # the others are answered nowhere
    outcomes: list[Outcome] = []
    for name, method in methods(compressor).items():
        budgets = outcomes[0].kept_tokens if outcomes else (0,) * len(items)
        outcomes.append(measure(name, method, _track(items, name, quiet), budgets, count))
    return outcomes


def methods(compressor: Compressor) -> dict[str, Method]:
    """SpecPC, whose size is the budget of the others, its sentence units, and the baselines."""
    count, score = compressor.count_tokens, by_words()

    def sentences(item: EvalItem, budget: int) -> Kept:
        return ranked_sentences(item.question, item.passages, budget, count, score)

    def passages(item: EvalItem, budget: int) -> Kept:
        return ranked_passages(item.question, item.passages, budget, count, score)

    def chance(item: EvalItem, budget: int) -> Kept:
        return random_sentences(item.passages, budget, count, f"{SEED}:{item.id}")

    return {
        "SpecPC": compression(compressor, SpecPC(ratio=REFERENCE_RATIO)),
        "SpecPC, preset": compression(compressor, SpecPC.preset("2026-11", ratio=REFERENCE_RATIO)),
        "BM25 sentences": sentences,
        "BM25 passages": passages,
        "truncation": lambda item, budget: truncation_head(item.passages, budget, count),
        "random sentences": chance,
    }


def show_survival(outcomes: Sequence[Outcome]) -> None:
    """Print survival with 95 % intervals, and what SpecPC wins or loses against each other."""
    total = len(outcomes[0].at_offset)
    out.print()
    out.rule("Python's language reference: do the answer's characters survive?")
    table = Table(
        "method", title=f"{total} questions, about {REFERENCE_RATIO:.0%} kept, 95 % intervals"
    )
    for head in ("tokens kept", "at the marked place", "text readable", "ms a question"):
        table.add_column(head, justify="right")
    for outcome in outcomes:
        rates = [_rate(sum(hits), total) for hits in (outcome.at_offset, outcome.as_text)]
        speed = f"{1000 * outcome.seconds / total:.0f}"
        table.add_row(outcome.name, f"{outcome.share:.1%}", *rates, speed)
    out.print(table)
    for first in outcomes[:2]:
        for second in outcomes[2:]:
            out.print(verdict(first, second))


def verdict(first: Outcome, second: Outcome) -> str:
    """One sentence on the paired difference at the marked place."""
    gap, low, high = paired_difference(first.at_offset, second.at_offset, seed=SEED)
    word = "wins against" if low > 0 else "LOSES to" if high < 0 else "is level with"
    interval = f"[{100 * low:+.1f}, {100 * high:+.1f}]"
    return f"{first.name} {word} {second.name}: {100 * gap:+.1f} points {interval}"


# ---------------------------------------------------------------- the closing table


def show_summary(asked: Sequence[Asked], outcomes: Sequence[Outcome]) -> None:
    """Print the figures that count."""
    total = len(asked)
    out.print()
    table = Table("handbook", title=f"Summary: {total} handbook questions")
    for head in ("exact match", "prompt tokens, mean", "seconds a question"):
        table.add_column(head, justify="right")
    for name, answers in (
        ("whole context", [row.plain for row in asked]),
        ("SpecPC", [row.kept for row in asked]),
    ):
        hits = sum(row.right(answer) for row, answer in zip(asked, answers, strict=True))
        tokens = sum(answer.usage.prompt_tokens for answer in answers) / total
        seconds = sum(sum(answer.timings.values()) for answer in answers) / total
        table.add_row(name, _rate(hits, total), f"{tokens:.0f}", f"{seconds:.2f}")
    out.print(table)
    found = sum(row.found for row in asked)
    out.print(f"The retriever found the right document for {found} of {total} questions.")
    best = max(outcomes, key=lambda outcome: sum(outcome.at_offset))
    out.print(f"Most surviving answers on the language reference: {best.name}.")


def _rate(hits: int, total: int) -> str:
    low, high = wilson(hits, total)
    return f"{hits / total:.1%} [{100 * low:.1f}, {100 * high:.1f}]"


def _track(items: Sequence[T], label: str, quiet: bool) -> Iterable[T]:
    return track(items, description=f"{label:<18}", console=errors, disable=quiet)


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", default="builtin:target")
    parser.add_argument("--draft", default="builtin:draft")
    parser.add_argument("--questions", type=int, default=40, help="handbook questions")
    parser.add_argument("--reference-questions", type=int, default=120, help="seeded subset")
    parser.add_argument("--html", type=Path, default=Path("demo_output/kept.html"))
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    return parser.parse_args(argv)


if __name__ == "__main__":
    raise SystemExit(main())

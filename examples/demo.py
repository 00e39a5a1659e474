"""`make demo`: a real small model answers questions, from everything and from what SpecPC kept.

Part 1 asks an invented organisation's handbook, part 2 the language reference that each Python
carries; both answers stand side by side with their tokens and seconds. Part 3 measures how often
the characters of the answer survive, against simple baselines that keep as many tokens. The model,
SmolLM2-135M-Instruct, is fetched once (93 MB); where that fails the bundled pair stands in.
"""

from __future__ import annotations

import argparse
import json
import re
import resource
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from rich.console import Console
from rich.progress import track
from rich.table import Table

from draftsieve import Answer, Compressor, Engine, Generation, Passage, SpecKV, SpecKVPC, SpecPC
from draftsieve.core.config import DEFAULT_METHOD, NEWEST_PRESET
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
from draftsieve.core.evaluation.spoken import score_spoken
from draftsieve.core.evaluation.survival import Method, Outcome, compression, measure
from draftsieve.core.evaluation.tasks import EvalItem
from draftsieve.core.models.names import BUILTIN, DEFAULT_MODEL
from draftsieve.integrations.cli.choice import obtain
from draftsieve.integrations.cli.render import highlighted, printable, show_costs
from draftsieve.integrations.html_view import render_html
from draftsieve.retrievers.bm25 import Bm25Index
from draftsieve.retrievers.folder import read_folder

DATA = Path(__file__).resolve().parent / "data"
SEED = 2026
TOKENS = 1000  # of the retrieved passages
METHOD, RATIO = DEFAULT_METHOD, DEFAULT_METHOD.ratio or 0.35
GENERATION = Generation(max_new_tokens=32)
SPLIT = {"all-values": r", ", "two-fact": r" and "}  # how the handbook's questions list answers
LIMITS = """\
What this shows: SmolLM2 has 135 million parameters and answers few of such questions, in whole \
sentences and with everything in front of it too, so a wrong answer says little about what it was \
given; what is kept for a target does not depend on the target, and survival counts that. Draft \
and target are one model here, so reading first can hardly save time; it does where the target is \
larger, or paid for by the token."""
out = Console(markup=False, highlight=False, emoji=False)
if not out.is_terminal:
    out.width = 118  # rows of the tables on one line each, also in a file
errors = Console(stderr=True)
T = TypeVar("T")
Items = list[tuple[EvalItem, tuple[Passage, ...]]]  # with ids and titles of the passages


@dataclass(frozen=True, slots=True)
class Asked:
    """One question, answered from everything that was retrieved and from what was kept of it."""

    item: EvalItem
    passages: tuple[Passage, ...]
    whole: Answer
    kept: Answer

    def right(self, answer: Answer) -> bool:
        """Whether the answer contains what was asked for; in a sentence or not."""
        return score_spoken(self.item, answer.text).recall == 1


def main(argv: Sequence[str] | None = None) -> int:
    """Run all parts and print the closing table."""
    options = _options(argv)
    began = time.perf_counter()
    engine = load(options)
    compressor = engine.compressor
    assert compressor is not None  # there is a draft
    handbook = handbook_items(compressor)[: options.questions]
    out.rule("The handbook, retrieved by BM25")
    asked = ask(engine, handbook)
    show_eviction(engine, asked[0])
    write_page(asked[0], options.html)
    reference = reference_items(compressor, options.reference_questions)
    out.rule("Python's language reference, the passage that answers among what BM25 finds")
    asked_too = ask(engine, reference[: options.questions])
    outcomes = survival(compressor, reference, quiet=options.quiet)
    show_survival(outcomes)
    show_summary({"handbook": asked, "language reference": asked_too})
    if not options.target.startswith(BUILTIN):
        out.print(LIMITS, style="dim")
    out.print(f"Kept text of the first question as a web page: {options.html}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    out.print(f"Wall time {time.perf_counter() - began:.0f} s, peak memory {peak:.0f} MiB")
    return 0


def load(options: argparse.Namespace) -> Engine:
    """The models that were named, else SmolLM2, which is fetched, else the bundled pair."""
    if options.target is None:
        why = obtain(lambda _: True, bars=not options.quiet, timeout=300)
        if why is not None:
            out.print(f"The bundled pair, made for demonstration, stands in: {why}.", style="bold")
        options.target = DEFAULT_MODEL if why is None else f"{BUILTIN}target"
    bundled = options.target.startswith(BUILTIN)
    draft = options.draft or (f"{BUILTIN}draft" if bundled else options.target)
    out.print(f"target {options.target}, draft {draft}, preset {NEWEST_PRESET}, {RATIO:.0%} kept")
    return Engine.load(options.target, draft, progress=not options.quiet)


# ---------------------------------------------------------------- questions and their passages


def handbook_items(compressor: Compressor) -> Items:
    """Questions with the best passages by BM25, as many as fit."""
    index = Bm25Index.from_passages(read_folder(DATA / "handbook"))
    lines = (DATA / "handbook_questions.jsonl").read_text(encoding="utf-8").splitlines()
    items = []
    for row in map(json.loads, lines):
        split = SPLIT.get(row["type"])
        answers = tuple(re.split(split, row["answer"])) if split else (row["answer"],)
        passages, left = [], TOKENS
        for passage, _ in index.search(row["question"], 60):
            if (size := compressor.count_tokens(passage.text)) <= left:
                passages.append(passage)
                left -= size
        texts = tuple(passage.text for passage in passages)
        item = EvalItem(
            row["document"], "handbook", TOKENS, row["question"], texts, answers, "all", (), None
        )
        items.append((item, tuple(passages)))
    return items


def reference_items(compressor: Compressor, limit: int) -> Items:
    """Questions with the passage that answers them among the best others by BM25."""
    reference = read_reference(DATA / "python_reference.jsonl")
    known = [question for question in reference.questions if question.places]
    asked = replace(reference, questions=tuple(known[:: max(1, len(known) // limit)][:limit]))
    around = Around("bm25", TOKENS, by_words())
    items = real_items(asked, around, compressor.count_tokens, seed=SEED)
    names = {passage.text: passage for passage in reference.passages}
    return [(item, tuple(names[text] for text in item.passages)) for item in items]


# ---------------------------------------------------------------- answers


def ask(engine: Engine, items: Items) -> list[Asked]:
    """Answer every question twice, and show both; of the first one what was kept, too."""
    asked = []
    for item, passages in items:
        whole = engine.answer(item.question, passages, generation=GENERATION)
        kept = engine.answer(item.question, passages, METHOD, generation=GENERATION)
        row = Asked(item, passages, whole, kept)
        out.print(f"\n{item.question}", style="bold")
        out.print(f"  expected   {' / '.join(item.answers)}")
        for name, answer in (("whole", whole), ("kept", kept)):
            out.print(f"  {name:<6} {costs(answer)}  {mark(row, answer)}")
        if not asked:
            show_kept(row)
        asked.append(row)
    return asked


def costs(answer: Answer) -> str:
    """Tokens that the target read, and seconds: the draft's and all the others."""
    draft = answer.timings.get("draft", 0.0)
    others = sum(answer.timings.values()) - draft
    read = f"{draft:4.1f} + {others:4.1f} s" if draft else f"{others:11.1f} s"
    return f"{answer.usage.prompt_tokens:5d} tokens {read}"


def mark(row: Asked, answer: Answer) -> str:
    """The answer on one line, ticked if it contains what was asked for."""
    return f"{'✓' if row.right(answer) else '✗'} {' '.join(printable(answer.text).split())}"


def show_kept(row: Asked, count: int = 3) -> None:
    """Print the passages with the best scores, kept text highlighted."""
    context = row.kept.context
    assert context is not None  # a method was given
    best = sorted(range(len(row.passages)), key=lambda i: -context.sizes[i].score)[:count]
    for place in sorted(best):
        own = context.sizes[place]
        out.print(
            f"  [{place + 1}] {row.passages[place].id}  {own.tokens} → {own.compressed_tokens} "
            "tokens",
            style="dim",
        )
        out.print(highlighted(row.passages[place], place, context, styled=out.is_terminal))


def show_eviction(engine: Engine, row: Asked) -> None:
    """The first question again, with the target's cache evicted, and with both."""
    both = SpecKVPC(specpc=METHOD, speckv=SpecKV(ratio=0.5))
    for name, method in (("SpecKV", SpecKV(ratio=RATIO)), ("SpecKV-PC", both)):
        answer = engine.answer(row.item.question, row.passages, method, generation=GENERATION)
        out.print(f"\n{name}, the same question", style="bold")
        out.print(f"  {mark(row, answer)}")
        show_costs(out, answer, method)


def write_page(row: Asked, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    page = render_html(row.item.question, row.kept, row.kept.context, row.passages)
    path.write_text(page, encoding="utf-8")


# ---------------------------------------------------------------- survival


def survival(compressor: Compressor, asked: Items, *, quiet: bool) -> list[Outcome]:
    """Run SpecPC and the baselines over the same items, at the size that SpecPC used."""
    items, count = [item for item, _ in asked], compressor.count_tokens
    outcomes: list[Outcome] = []
    for name, method in methods(compressor).items():
        budgets = outcomes[0].kept_tokens if outcomes else (0,) * len(items)
        outcomes.append(measure(name, method, _track(items, name, quiet), budgets, count))
    return outcomes


def methods(compressor: Compressor) -> dict[str, Method]:
    """SpecPC, whose size is the budget of the others, its paper settings, and the baselines."""
    count, score = compressor.count_tokens, by_words()

    def sentences(item: EvalItem, budget: int) -> Kept:
        return ranked_sentences(item.question, item.passages, budget, count, score)

    def passages(item: EvalItem, budget: int) -> Kept:
        return ranked_passages(item.question, item.passages, budget, count, score)

    def chance(item: EvalItem, budget: int) -> Kept:
        return random_sentences(item.passages, budget, count, f"{SEED}:{item.id}")

    return {
        f"SpecPC {NEWEST_PRESET}": compression(compressor, METHOD),
        "SpecPC, paper": compression(compressor, SpecPC(ratio=RATIO)),
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
    table = Table("method", title=f"{total} questions, about {RATIO:.0%} kept, 95 % intervals")
    for head in ("tokens kept", "at the marked place", "text readable", "ms a question"):
        table.add_column(head, justify="right")
    for outcome in outcomes:
        rates = [_rate(sum(hits), total) for hits in (outcome.at_offset, outcome.as_text)]
        speed = f"{1000 * outcome.seconds / total:.0f}"
        table.add_row(outcome.name, f"{outcome.share:.1%}", *rates, speed)
    out.print(table)
    for second in outcomes[1:]:
        out.print(verdict(outcomes[0], second))


def verdict(first: Outcome, second: Outcome) -> str:
    """One sentence on the paired difference at the marked place."""
    gap, low, high = paired_difference(first.at_offset, second.at_offset, seed=SEED)
    word = "wins against" if low > 0 else "LOSES to" if high < 0 else "is level with"
    interval = f"[{100 * low:+.1f}, {100 * high:+.1f}]"
    return f"{first.name} {word} {second.name}: {100 * gap:+.1f} points {interval}"


# ---------------------------------------------------------------- the closing table


def show_summary(parts: dict[str, list[Asked]]) -> None:
    """Print what both kinds of answers came to."""
    out.print()
    table = Table("answers", "from", title="Summary")
    for head in ("contain the answer", "prompt tokens, mean", "seconds a question"):
        table.add_column(head, justify="right")
    for part, asked in parts.items():
        for name in ("whole", "kept"):
            answers = [getattr(row, name) for row in asked]
            hits = sum(row.right(answer) for row, answer in zip(asked, answers, strict=True))
            tokens = sum(answer.usage.prompt_tokens for answer in answers) / len(asked)
            seconds = sum(sum(answer.timings.values()) for answer in answers) / len(asked)
            table.add_row(part, name, f"{hits} of {len(asked)}", f"{tokens:.0f}", f"{seconds:.1f}")
    out.print(table)


def _rate(hits: int, total: int) -> str:
    low, high = wilson(hits, total)
    return f"{hits / total:.1%} [{100 * low:.1f}, {100 * high:.1f}]"


def _track(items: Sequence[T], label: str, quiet: bool) -> Iterable[T]:
    return track(items, description=f"{label:<18}", console=errors, disable=quiet)


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", help=f"default: {DEFAULT_MODEL}, fetched if it is missing")
    parser.add_argument("--draft", help="default: the target; beside a bundled one its partner")
    parser.add_argument("--questions", type=int, default=4, help="answered ones, of each text")
    parser.add_argument("--reference-questions", type=int, default=10, help="for survival")
    parser.add_argument("--html", type=Path, default=Path("demo_output/kept.html"))
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    return parser.parse_args(argv)


if __name__ == "__main__":
    raise SystemExit(main())

"""Does acceptance rise while requests about one document set go by, as the paper says?

Requests about the handbook are answered with their reference answers: which guesses are accepted
follows from the answer alone, so the target does not run. Three tri-gram stores: a fresh one for
each request, one that is empty at first and learns, and one built from the documents that learns
too. Prints a Markdown table, and writes a picture (needs matplotlib: `pip install
"draftsieve[eval]"`).
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from drafting_cases import Case, handbook_store, make_cases
from drafting_ways import simulate

from draftsieve import Engine
from draftsieve.core.generation.speculative.drafters.aded import AdedDrafter, Search
from draftsieve.core.generation.speculative.drafters.store import TrigramStore

WINDOW = 25  # requests that a point of the picture is the mean of


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, plot."""
    options = _options(argv)
    engine = Engine.load("builtin:target", device="cpu", progress=False)
    cases = make_cases(engine, options.requests, seed=1)
    learnt = TrigramStore()
    curves = {
        "fresh store each": curve(cases, None, options.search),
        "empty at first": curve(cases, learnt, options.search),
        "built from documents": curve(cases, handbook_store(engine), options.search),
    }
    show(curves)
    print(f"\nThe store that was empty at first holds {len(learnt):,} pairs.")
    if options.plot is not None:
        _plot(curves, options.plot)
    return 0


def curve(cases: Sequence[Case], store: TrigramStore | None, search: Search) -> list[float]:
    """Tokens a forward of each request; None for a fresh store each time."""
    found = []
    for case in cases:
        own = TrigramStore() if store is None else store
        tally = simulate(AdedDrafter(own, case.ids.tolist(), search=search), case)
        found.append(tally.tokens / tally.forwards)
    return found


def show(curves: dict[str, list[float]]) -> None:
    """Ten stretches, and the last tenth against the first with a 95 % interval."""
    count = len(next(iter(curves.values())))
    step = max(1, count // 10)
    print("| requests | " + " | ".join(f"{name}: tokens a forward" for name in curves) + " |")
    print("|---|" + "---:|" * len(curves))
    for first in range(0, count, step):
        own = (f"{mean(each[first : first + step]):.2f}" for each in curves.values())
        print(f"| {first + 1} to {min(first + step, count)} | " + " | ".join(own) + " |")
    rises = (_rise(each[:step], each[-step:]) for each in curves.values())
    print("| last against first stretch | " + " | ".join(rises) + " |")


def _rise(first: Sequence[float], last: Sequence[float]) -> str:
    """Difference of means with its bootstrap interval."""
    chance = random.Random(0)
    drawn = sorted(
        mean(chance.choices(last, k=len(last))) - mean(chance.choices(first, k=len(first)))
        for _ in range(2000)
    )
    return f"{mean(last) - mean(first):+.2f} ({drawn[49]:+.2f} to {drawn[1949]:+.2f})"


def _plot(curves: dict[str, list[float]], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    for name, each in curves.items():
        ends = range(min(WINDOW, len(each)), len(each) + 1)
        window = [mean(each[max(0, end - WINDOW) : end]) for end in ends]
        axes.plot(ends, window, label=name)
    axes.set(
        xlabel="requests about one document set",
        ylabel=f"tokens a forward pass (mean of {WINDOW})",
    )
    axes.legend()
    figure.tight_layout()
    figure.savefig(file, dpi=150)
    pyplot.close(figure)
    print(f"\n{file}")


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--search", choices=("puct", "best_first"), default="puct")
    parser.add_argument("--plot", type=Path, default=Path("drafting_learning.png"))
    parser.add_argument("--no-plot", dest="plot", action="store_const", const=None)
    return parser.parse_args(argv)


if __name__ == "__main__":
    raise SystemExit(main())

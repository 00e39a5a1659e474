"""What drafting saves: tokens a forward pass, wall clock, and what the drafts themselves cost.

Parts, each a Markdown table:

- `replay`: the bundled target is made to say 100 reference answers (quotations, lists of values,
  JSON of facts about the handbook), so that acceptance does not hang on what a small model can say;
- `generate`: the bundled pair answers the same requests itself, 50 to 200 tokens; answers with
  less than 0.8 of their 4-grams distinct are loops, which accept anything: left out and counted;
- `bound`: how much `auto` slows down answers that copy nothing, as an upper 95 % bound;
- `cost`: a pass of a random 0.3B-shaped model by nodes, drafting beside it, memory of stores.

One round decodes every request in every way, interleaved, each way with a fresh store. Rounds are
repeated while they fit into `--minutes` for a part; a request's time is the median over rounds.
With `--out FILE` each round is kept, and a later call adds its own. How acceptance grows over
requests is measured by `drafting_learning.py`.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import get_args

import numpy as np
import torch
from drafting_cases import Case, distinct_share, make_cases, unrelated_cases
from drafting_cost import cost
from drafting_ways import THEIRS, Run, Way, run

from draftsieve import Engine
from draftsieve.core.config import DraftKind
from draftsieve.core.generation.speculative.select import Drafters

PARTS = ("replay", "generate", "bound", "cost")
LEAST_DISTINCT = 0.8  # share of different 4-grams below which an answer counts as a loop
COPYING: tuple[DraftKind, ...] = ("lookup", "aded", "auto")
Round = dict[str, list[Run]]  # way -> a run for each case


def main(argv: Sequence[str] | None = None) -> int:
    """Print the tables of the chosen parts."""
    options = _options(argv)
    if options.quick:
        options.items, options.rounds, options.layers, options.learnt = 3, 1, 2, 20_000
    torch.set_num_threads(options.threads)
    engine = Engine.load("builtin:target", "builtin:draft", device=options.device, progress=False)
    print(f"{options.device}, {options.threads} threads, {options.items} requests\n", flush=True)
    parts: dict[str, Callable[[Engine, argparse.Namespace], None]] = {
        "replay": replay,
        "generate": generate,
        "bound": bound,
        "cost": cost,
    }
    for part in options.parts:
        parts[part](engine, options)
    return 0


# -- parts --------------------------------------------------------------------------------------


def replay(engine: Engine, options: argparse.Namespace) -> None:
    """Fixed reference answers, for whoever copies: the draft model did not write them."""
    cases = make_cases(engine, options.items)
    ways: dict[str, Way] = {"plain": None, **{kind: kind for kind in COPYING}}
    ways["HF prompt lookup"] = THEIRS["HF prompt lookup"]
    rounds = _rounds(engine, cases, ways, options, "replay")
    for name, own in rounds[0].items():
        wrong = sum(r.tokens != c.reference for r, c in zip(own, cases, strict=True))
        assert not wrong, f"{name} changed {wrong} answers"
    show(f"{len(cases)} reference answers", rounds)


def generate(engine: Engine, options: argparse.Namespace) -> None:
    """What the bundled pair says itself."""
    cases = make_cases(engine, options.items)
    drafters = _drafters(engine)
    shares = [distinct_share(run(engine, drafters, c, None, False).tokens) for c in cases]
    cases = [c for c, share in zip(cases, shares, strict=True) if share >= LEAST_DISTINCT]
    print(f"{len(shares) - len(cases)} of {len(shares)} generated answers are loops and left out\n")
    if not cases:
        return
    ways: dict[str, Way] = {"plain": None, **{kind: kind for kind in get_args(DraftKind)}, **THEIRS}
    rounds = _rounds(engine, cases, ways, options, "generate")
    for name, own in rounds[0].items():
        pairs = zip(own, rounds[0]["plain"], strict=True)
        if different := sum(a.tokens != b.tokens for a, b in pairs):
            print(f"{name}: {different} of {len(own)} answers differ from plain (near-ties)")
    show(f"{len(cases)} generated answers", rounds)


def bound(engine: Engine, options: argparse.Namespace) -> None:
    """Answers that copy nothing: what `auto` costs where it cannot gain."""
    print("| answers that copy nothing | tokens | auto takes | upper 95 % bound |")
    print("|---|---:|---:|---:|")
    for name, shuffled in (("another text's words, shuffled", True), ("another text", False)):
        cases = unrelated_cases(engine, max(4, options.items * 2 // 5), shuffled=shuffled)
        rounds = _rounds(engine, cases, {"plain": None, "auto": "auto"}, options, f"bound {name}")
        seconds = {way: _seconds(rounds, way) for way in ("plain", "auto")}
        slower = seconds["auto"].sum() / seconds["plain"].sum()
        worst = np.quantile(_resampled(seconds["auto"], seconds["plain"]), 0.95)
        length = sum(len(case.reference) for case in cases)
        print(f"| {name} | {length:,} | {slower:.3f} of plain | {worst:.3f} |", flush=True)
    print()


# -- rounds -------------------------------------------------------------------------------------


def _rounds(
    engine: Engine,
    cases: Sequence[Case],
    ways: dict[str, Way],
    options: argparse.Namespace,
    part: str,
) -> list[Round]:
    """Those kept by earlier calls and at least one new one, as many as fit into the time."""
    done = _kept(options.out, part, len(cases), list(ways))
    began, fresh = time.perf_counter(), 0
    while fresh < options.rounds:
        start = time.perf_counter()
        done.append(_round(engine, cases, ways, forced=part != "generate"))
        _keep(options.out, part, done[-1])
        fresh, last = fresh + 1, time.perf_counter() - start
        if time.perf_counter() - began + last > 60 * options.minutes:
            break
    return done


def _round(engine: Engine, cases: Sequence[Case], ways: dict[str, Way], forced: bool) -> Round:
    """Every case in every way, in an order that turns from case to case."""
    names, runs = list(ways), {name: list[Run]() for name in ways}
    drafters = {name: _drafters(engine) for name in ways}
    for place, case in enumerate(cases):
        turn = place % len(names)
        for name in names[turn:] + names[:turn]:
            runs[name].append(run(engine, drafters[name], case, ways[name], forced))
    return runs


def _drafters(engine: Engine) -> Drafters:
    tokenizer = engine.tokenizer
    assert tokenizer is not None
    return Drafters(tokenizer, engine.draft, True)


def _keep(file: Path | None, part: str, runs: Round) -> None:
    """Append one round as a line of JSON."""
    if file is None:
        return
    rows = {
        name: [(r.tokens, r.forwards, r.seconds, r.drafting) for r in own]
        for name, own in runs.items()
    }
    with file.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps({"part": part, "runs": rows}) + "\n")


def _kept(file: Path | None, part: str, cases: int, ways: list[str]) -> list[Round]:
    """The rounds of earlier calls with the same cases and ways."""
    if file is None or not file.exists():
        return []
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    rounds = [
        {name: [Run(tuple(t), *rest) for t, *rest in own] for name, own in line["runs"].items()}
        for line in lines
        if line["part"] == part
    ]
    return [r for r in rounds if list(r) == ways and all(len(own) == cases for own in r.values())]


# -- tables -------------------------------------------------------------------------------------


def show(title: str, rounds: Sequence[Round]) -> None:
    """Totals over cases; ratios with what 95 % of bootstraps over cases give."""
    print(
        f"| {title}, {len(rounds)} rounds | tokens a forward | ms an answer | against plain "
        "| drafting us a token |\n|---|---:|---:|---:|---:|"
    )
    plain = _seconds(rounds, "plain")
    for name, own in rounds[0].items():
        tokens = sum(len(r.tokens) for r in own)
        per_forward = (tokens - len(own)) / max(1, sum(r.forwards for r in own))
        seconds = _seconds(rounds, name)
        low, high = np.quantile(_resampled(plain, seconds), [0.025, 0.975])
        drafting = median(sum(r.drafting for r in each[name]) for each in rounds)
        print(
            f"| {name} | {per_forward:.2f} | {1000 * np.median(seconds):.0f} "
            f"| {plain.sum() / seconds.sum():.2f} ({low:.2f} to {high:.2f}) "
            f"| {1e6 * drafting / tokens:.0f} |"
        )
    print(flush=True)


def _seconds(rounds: Sequence[Round], way: str) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """(cases,) medians over rounds."""
    times = [[r.seconds for r in each[way]] for each in rounds]  # (rounds, cases)
    return np.asarray(np.median(np.array(times), axis=0))


def _resampled(
    above: np.ndarray[tuple[int], np.dtype[np.float64]],
    below: np.ndarray[tuple[int], np.dtype[np.float64]],
) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """(2000,) ratios of sums over cases drawn with replacement."""
    drawn = np.random.default_rng(0).integers(0, len(above), (2000, len(above)))
    return np.asarray(above[drawn].sum(1) / below[drawn].sum(1))


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--items", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3, help="most rounds of this call")
    parser.add_argument("--minutes", type=float, default=5.0, help="for the rounds of a part")
    parser.add_argument("--out", type=Path, metavar="FILE", help="keeps rounds, as JSON lines")
    parser.add_argument("--layers", type=int, default=20, help="of the 0.3B-shaped model")
    parser.add_argument("--learnt", type=int, default=1_000_000, help="tokens of the large store")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quick", action="store_true", help="few items: a test of this script")
    return parser.parse_args(argv)


if __name__ == "__main__":
    raise SystemExit(main())

"""Peers on the items of a finished `draftsieve eval` run, each in its own environment.

    draftsieve eval --target builtin:target --methods none speckv --budget 0.125 --out results/
    python examples/benchmarks/peers/run.py --results results/ --budget 0.125

A peer is a script beside this one that knows nothing of draftsieve: it reads prompts from a file
and writes answers (kvpress) or shortened passages (LLMLingua) to another. Its environment is made
in `--environments`; a peer that cannot be installed or started is skipped with a message. Records
go to `peers.jsonl` in the results folder, a report of all of them to `peers.md`. Started again, a
peer goes on where it stopped. README.md has the commands of the full comparison.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from common import read_rows
from environments import PEERS, Peer, PeerUnavailableError, run_peer
from report import asked_and_got, report, same_answers
from tqdm import tqdm

from draftsieve import SpecKV
from draftsieve.core.errors import ConfigError
from draftsieve.core.evaluation.baselines import Kept
from draftsieve.core.evaluation.methods import Run, prompt_method
from draftsieve.core.evaluation.records import (
    DESCRIPTION,
    ITEMS,
    RESULTS,
    Record,
    read_records,
    write_lines,
)
from draftsieve.core.evaluation.runner import score_run
from draftsieve.core.evaluation.shared import NO_TARGET, Bench, Case
from draftsieve.core.evaluation.surprise import token_surprise
from draftsieve.core.evaluation.tasks import EvalItem
from draftsieve.core.models.loading import LoadedModel, load_model
from draftsieve.core.models.names import resolve
from draftsieve.core.speckv.evict import token_capacity

RECORDS, REPORT = "peers.jsonl", "peers.md"
logger = logging.getLogger("peers")
Row = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the peers, and print the report."""
    options = _options(argv)
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    results, folder = options.results, options.results / "peers"
    described = json.loads((results / DESCRIPTION).read_text(encoding="utf-8"))
    bench = _bench(described)
    rows = first_of_each(read_rows(results / ITEMS), options.items)
    items = {row["id"]: EvalItem.from_json(row) for row in rows}
    ours = [record for record in read_records(results / RESULTS) if record.item in items]

    folder.mkdir(exist_ok=True)
    prompts = folder / "prompts.jsonl"
    write_lines(prompts, (prompt_row(bench, item, options.budget) for item in items.values()))
    for peer in PEERS:
        if peer.name in options.only and described[peer.model] == NO_TARGET:
            logger.warning("%s is skipped: the results are of a run without a target", peer.name)
        elif peer.name in options.only:
            run_or_skip(peer, options.environments, prompts, resolve(described[peer.model]), folder)

    answers = [row for peer in PEERS for row in read_rows(folder / f"{peer.name}.jsonl")]
    answers = [r for r in answers if r["id"] in items and r["budget"] in (1.0, *options.budget)]
    draft_right = {record.item: record.draft_correct for record in ours}
    found = [
        record(bench.open(items[row["id"]]), row, draft_right.get(row["id"]))
        for row in tqdm(answers, "scoring")
    ]
    write_lines(results / RECORDS, (asdict(one) for one in found))
    checks = [
        *same_answers(ours, found),
        *same_draft(bench, items, answers),
        *asked_and_got(answers),
    ]
    kept_only = bool(described.get("kept_only"))
    text = report(ours, found, checks, options.reference, options.survival_reference, kept_only)
    (results / REPORT).write_text(text, encoding="utf-8")
    print(text, end="")
    return 0


def first_of_each(rows: Sequence[Row], count: int | None) -> list[Row]:
    """The first items of each task and length; all of them if no number is given."""
    seen: Counter[tuple[str, int]] = Counter()
    found = []
    for row in rows:
        seen[row["task"], row["length"]] += 1
        if count is None or seen[row["task"], row["length"]] <= count:
            found.append(row)
    return found


def run_or_skip(peer: Peer, environments: Path, prompts: Path, model: str, folder: Path) -> None:
    """Let a peer write what it has not written yet; a message where it is not available."""
    began = time.perf_counter()
    try:
        run_peer(peer, environments, prompts, model, folder / f"{peer.name}.jsonl")
    except PeerUnavailableError as error:
        logger.warning("%s is skipped: %s", peer.name, error)
        return
    logger.info("%s: %.0f s", peer.name, time.perf_counter() - began)


def prompt_row(bench: Bench, item: EvalItem, budgets: Sequence[float]) -> Row:
    """What a peer is told of an item.

    `entries` is what SpecKV keeps of the tokens before the last one, `passage_tokens` what methods
    on prompts may keep of the passages; `question_start` is the first token behind the passages;
    `reference` is the reference answer where the target reads it, else empty.
    """
    case = bench.open(item)
    tokens = bench.encoder.encode(case.prompt)
    fixed = int(tokens.protected.sum())
    behind = int((~tokens.protected).nonzero().max()) + 1
    return {
        "id": item.id,
        "ids": tokens.ids.tolist(),
        "question_start": behind,
        "question": item.question,
        "passages": list(item.passages),
        "max_new_tokens": bench.generation.max_new_tokens,
        "reference": bench.encoder.encode_text(item.reference) if case.spoken else [],
        "budgets": [
            {
                "budget": budget,
                "entries": token_capacity(SpecKV(ratio=budget), len(tokens), fixed),
                "passage_tokens": case.budget(budget),
            }
            for budget in budgets
        ],
    }


def record(case: Case, row: Row, draft_right: bool | None) -> Record:
    """Score what a peer did; shortened passages are first answered by our target, if there is one.

    A peer that refused has kept nothing of the passages, where it works on them.
    """
    error, name, budget = row.get("error"), row["method"], row["budget"]
    if "texts" in row:
        done = _answered_by_target(case, row)
    else:
        kept = None if "kept" not in row else _spans(row)
        whole = len(case.bench.encoder.encode(case.prompt)) if error is None else 0
        entries = round(row.get("entries", 0))
        done = Run(row.get("text", ""), whole, entries, kept, 0.0, row.get("seconds", 0.0))
    made = score_run(case, name, budget, done, draft_right, error)
    known = {key: row[key] for key in ("log_likelihood", "divergence") if key in row}
    return replace(made, **known)


def _answered_by_target(case: Case, row: Row) -> Run:
    method = prompt_method(row["method"], lambda *_: (_spans(row), row["texts"]))
    act = method.keep if case.bench.names["target"] == NO_TARGET else method.run
    assert act is not None  # methods on prompts keep text
    return replace(act(case, row["budget"]), draft_seconds=row["seconds"])


def _spans(row: Row) -> Kept:
    return tuple(tuple((start, end) for start, end in spans) for spans in row["kept"])


def same_draft(bench: Bench, items: Mapping[str, EvalItem], answers: Sequence[Row]) -> list[str]:
    """Whether the draft finds a passage as surprising in LLMLingua's environment as in ours."""
    probes = [row for row in answers if "surprise" in row]
    if not probes:
        return []
    text = items[probes[0]["id"]].passages[0]
    ids = bench.draft.tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids[0]
    own, theirs = float(token_surprise(bench.draft.model, ids)[1:].mean()), probes[0]["surprise"]
    return [f"Mean surprise of the first passage: {theirs:.4f} in LLMLingua, {own:.4f} in ours."]


def _loaded(name: str) -> LoadedModel:
    return load_model(name, progress=False)


def _bench(described: Row) -> Bench:
    """The pair of a run.

    Raises:
        ConfigError: Its weights have changed since.
    """
    bench = Bench(
        None if described["target"] == NO_TARGET else _loaded(described["target"]),
        _loaded(described["draft"]),
        max_new_tokens=described["max_new_tokens"],
    )
    if bench.weights != described["weights"]:
        raise ConfigError(
            "The models have changed since the results were made: run `draftsieve eval` again "
            "into a new folder."
        )
    return bench


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, required=True, help="folder of draftsieve eval")
    parser.add_argument("--budget", type=float, nargs="+", default=[0.125])
    parser.add_argument("--items", type=int, help="only the first of each task and length")
    parser.add_argument("--reference", default="none", help="differences are against this method")
    parser.add_argument("--survival-reference", default="specpc", help="and those of survival")
    parser.add_argument(
        "--only",
        nargs="*",
        default=[peer.name for peer in PEERS],
        help="peers to run; what others wrote before is reported, too",
    )
    parser.add_argument("--environments", type=Path, default=Path(".bench/peers"))
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())

"""What evicting a real model's cache costs: how far it strays from the full one, method by method.

No answers are generated: after each eviction the target is fed its own answer to the whole prompt,
and the reference answer, and its expectations are compared with those behind the full cache. Runs
that were interrupted go on. Prints a Markdown table (docs/results.md); needs the data sets of
docs/evaluation.md, `draftsieve models get smollm2-135m` and `pip install "draftsieve[torchao]"`.

    OMP_NUM_THREADS=1 python examples/benchmarks/cache_divergence.py --data FOLDER \\
        --suite xquad.en --items 20 --out xquad.en/
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from draftsieve.core.config import Quantization, SpecKV
from draftsieve.core.evaluation.cache_table import cache_table
from draftsieve.core.evaluation.likelihood import divergence
from draftsieve.core.evaluation.methods import SEED
from draftsieve.core.evaluation.realtext.suites import make_suite
from draftsieve.core.evaluation.records import Record, append, open_folder
from draftsieve.core.evaluation.shared import Bench, Case, SharedDraft
from draftsieve.core.evaluation.spoken import score_spoken
from draftsieve.core.evaluation.tables import described
from draftsieve.core.evaluation.tasks import INSTRUCTIONS, EvalItem
from draftsieve.core.generation.pipeline import Pipeline
from draftsieve.core.models.loading import load_model

BUNDLED = "speckv, bundled draft"
SCORERS = ("snapkv", "laq", "kvzip", "tova", "streaming", "random", "oracle")


@dataclass(frozen=True, slots=True)
class Pair:
    """The target with one of the drafts, and what runs with them."""

    pipeline: Pipeline
    methods: Mapping[str, SpecKV]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure what is missing, and print the table."""
    options = _options(argv)
    bench = Bench(
        load_model(options.target, dtype="float32", progress=False),
        load_model(
            options.draft,
            dtype="float32",
            quantization=None
            if options.draft_as_it_is
            else Quantization(bits=8, backend="torchao"),
            progress=False,
        ),
        max_new_tokens=options.max_new_tokens,
    )
    suite = make_suite(options.suite, options.data, contexts=("bm25",), questions=options.items)
    count = bench.draft.count_tokens
    items = list(suite.items(options.length, count, seed=options.seed, system=INSTRUCTIONS))
    pairs = _pairs(bench, options.methods)
    described_as = {**bench.names, "weights": bench.weights, "length": options.length}
    described_as |= {"seed": options.seed, "new tokens": options.max_new_tokens}
    done = {record.key: record for record in open_folder(options.out, described_as)}
    for item in tqdm(items, "Items"):
        for record in measure(bench, pairs, item, options.budget, done):
            append(options.out, record)
            done[record.key] = record
    ours = {item.id for item in items}
    report(record for record in done.values() if record.item in ours)
    return 0


def _pairs(bench: Bench, wanted: Sequence[str]) -> list[Pair]:
    """The methods that are wanted, or all of the table, by the draft that they need."""
    own: dict[str, SpecKV] = {"speckv": SpecKV(), "speckv-2026-12": SpecKV.preset("2026-12")}
    own |= {name: SpecKV.model_validate({"scorer": name, "seed": SEED}) for name in SCORERS}
    bundled = load_model("builtin:draft", progress=False)
    reader = SharedDraft(bundled.model, bundled.tokenizer, progress=False)
    reader.once = bench.once
    other = Pipeline(bench.target, bench.tokenizer, bench.encoder, reader)
    found = (bench.pipeline, own), (other, {BUNDLED: SpecKV()})
    return [
        Pair(pipeline, {name: how for name, how in methods.items() if name in (wanted or methods)})
        for pipeline, methods in found
    ]


def measure(
    bench: Bench,
    pairs: Sequence[Pair],
    item: EvalItem,
    budgets: Sequence[float],
    done: Mapping[tuple[str, str, float], Record],
) -> Iterator[Record]:
    """The records of an item that are not there yet."""
    todo = [
        (pair.pipeline, name, method, budget)
        for pair in pairs
        for name, method in pair.methods.items()
        for budget in budgets
        if (item.id, name, budget) not in done
    ]
    if not todo:
        return
    case = bench.open(item)
    right = score_spoken(item, case.draft_answer()).recall == 1
    if (item.id, "none", 1.0) not in done:
        yield _record(case, bench.pipeline, "none", None, 1.0, right)
    for pipeline, name, method, budget in todo:
        yield _record(case, pipeline, name, method, budget, right)


def _record(
    case: Case, pipeline: Pipeline, name: str, method: SpecKV | None, budget: float, right: bool
) -> Record:
    """One eviction, and how far the target strays behind it; `answer` is what guessed ahead."""
    if method is not None:
        method = method.model_copy(update={"capacity": None, "ratio": budget})
    memories, options = case.memories(), [case.bench.generation]
    (request,) = pipeline.prepare([case.prompt], method, options, "raise", memories)
    with request.clock("prefill"):
        start = pipeline.begin([request])
    full, plan = case.full_reading(), request.eviction
    assert start is not None  # the target's full prefill is shared
    reading = case.read_reference(start)
    assert reading is not None
    assert full is not None
    return Record(
        item=case.item.id,
        task=case.item.task,
        length=case.item.length,
        question_first=False,
        depth=case.item.depth,
        method=name,
        budget=budget,
        answer="" if plan is None else plan.text,
        correct=False,
        recall=0.0,
        f1=0.0,
        survived=None,
        sentences_survived=None,
        full_tokens=len(case.tokens),
        prompt_tokens=len(request.tokens),
        cache_tokens=len(request.tokens) if plan is None else plan.capacity,
        draft_seconds=round(request.clock.seconds.get("draft", 0.0), 3),
        target_seconds=round(request.clock.seconds.get("prefill", 0.0), 3),
        draft_correct=right,
        log_likelihood=reading.log_likelihood,
        divergence=divergence(full, reading),
        own_divergence=case.own_divergence(start),
    )


def report(records: Iterator[Record]) -> None:
    """Print a table for all items, and for those that the draft gets right and wrong."""
    found = list(records)
    print(f"{described(found)}\n\n{cache_table(found, 'snapkv')}")
    for right, word in ((True, "right"), (False, "wrong")):
        if side := [record for record in found if record.draft_correct is right]:
            count = len({record.item for record in side})
            print(f"\nItems that the draft alone gets {word} ({count}):\n")
            print(cache_table(side, "snapkv"))


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", default="smollm2-135m")
    parser.add_argument("--draft", default="smollm2-135m")
    parser.add_argument("--draft-as-it-is", action="store_true", help="do not quantise it to int8")
    parser.add_argument("--suite", nargs="+", default=["nq"])
    parser.add_argument("--data", type=Path, help="the folder with the sets' files")
    parser.add_argument("--methods", nargs="+", default=[], help="only these of the table")
    parser.add_argument("--items", type=int, default=20)
    parser.add_argument("--length", type=int, default=1000)
    parser.add_argument("--budget", type=float, nargs="+", default=[0.25, 0.125, 0.0625])
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args(argv)


if __name__ == "__main__":
    raise SystemExit(main())

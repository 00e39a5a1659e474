"""Peers on the items of a finished `draftsieve eval` run, each in its own environment.

    draftsieve eval --methods none speckv snapkv perplexity --budget 0.125 --out results/
    python examples/benchmarks/peers/run.py --results results/ --budget 0.125

A peer is a script beside this one that knows nothing of draftsieve: it reads prompts from a file
and writes answers (kvpress) or shortened passages (LLMLingua) to another. Its environment is made
in `--environments`; a peer that cannot be installed or started is skipped with a message. The
records go to `peers.jsonl` in the results folder, and a table of all of them is printed.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
import time
import venv
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from draftsieve.core.evaluation.metrics import score_answer
from draftsieve.core.evaluation.records import ITEMS, RESULTS, Record, read_records, write_lines
from draftsieve.core.evaluation.shared import Bench
from draftsieve.core.evaluation.summary import markdown
from draftsieve.core.evaluation.tasks import EvalItem
from draftsieve.core.models import load_model, resolve

HERE = Path(__file__).resolve().parent
PEERS_FILE = "peers.jsonl"
logger = logging.getLogger("peers")


@dataclass(frozen=True, slots=True)
class Peer:
    """A script, what its environment needs, and which of our models it loads."""

    name: str
    requirements: tuple[str, ...]
    model: str  # "target" or "draft"


PEERS = (
    Peer("kvpress", ("kvpress==0.5.*", "transformers==5.2.*", "accelerate"), "target"),
    Peer("llmlingua", ("llmlingua==0.2.2", "transformers==4.46.*", "accelerate"), "draft"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the peers and print the table."""
    options = _options(argv)
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    described = json.loads((options.results / "run.json").read_text(encoding="utf-8"))
    lines = (options.results / ITEMS).read_text(encoding="utf-8").splitlines()
    items = [EvalItem.from_json(json.loads(line)) for line in lines][: options.items]
    bench = Bench(
        load_model(described["target"]),
        load_model(described["draft"]),
        max_new_tokens=described["max_new_tokens"],
    )
    ours = read_records(options.results / RESULTS)
    folder = options.results / "peers"
    folder.mkdir(exist_ok=True)
    prompts = folder / "prompts.jsonl"
    write_lines(prompts, tqdm(prompt_rows(bench, items, options.budget), total=len(items)))
    found: list[Record] = []
    for peer in PEERS:
        if peer.name not in options.only:
            continue
        answers = folder / f"{peer.name}.jsonl"
        if run_peer(peer, options.environments, prompts, answers, described):
            draft_right = {record.item: record.draft_correct for record in ours}
            found += records(bench, items, answers, draft_right)
    write_lines(options.results / PEERS_FILE, (asdict(record) for record in found))
    known = {item.id for item in items}
    shown = [record for record in ours if record.item in known] + found
    print(markdown(shown, reference=options.reference, title="With peers"))
    return 0


def prompt_rows(
    bench: Bench, items: Sequence[EvalItem], budgets: Sequence[float]
) -> Iterator[dict[str, Any]]:
    """What a peer is told of an item; budgets in entries of the cache and in passage tokens."""
    for item in items:
        case = bench.open(item)
        ids = bench.encoder.encode(case.prompt).ids.tolist()
        fixed = len(case.tokens) - case.passage_tokens
        yield {
            "id": item.id,
            "ids": ids,
            "system": item.system,
            "question": item.question,
            "passages": list(item.passages),
            "max_new_tokens": bench.generation.max_new_tokens,
            "budgets": [
                {
                    "budget": budget,
                    "entries": fixed + case.budget(budget),
                    "passage_tokens": case.budget(budget),
                }
                for budget in budgets
            ],
        }


def run_peer(
    peer: Peer, environments: Path, prompts: Path, answers: Path, described: dict[str, Any]
) -> bool:
    """Install a peer where it is not yet, and run its script; False where that fails."""
    python = environments / peer.name / ("Scripts" if os.name == "nt" else "bin") / "python"
    began = time.perf_counter()
    try:
        if not python.exists():
            venv.create(environments / peer.name, with_pip=True)
        install = [str(python), "-m", "pip", "install", "--quiet", "torch", *peer.requirements]
        subprocess.run(install, check=True)
        script = HERE / f"{peer.name}_peer.py"
        model = resolve(described[peer.model])
        command = [str(python), str(script), str(prompts), model, str(answers)]
        subprocess.run(command, check=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    except (subprocess.CalledProcessError, OSError) as error:
        logger.warning("%s is skipped: %s", peer.name, error)
        return False
    logger.info("%s: %.0f s", peer.name, time.perf_counter() - began)
    return True


def records(
    bench: Bench,
    items: Sequence[EvalItem],
    answers: Path,
    draft_right: dict[str, bool | None],
) -> Iterator[Record]:
    """Score a peer's answers; shortened passages are first answered by our target."""
    by_id = {item.id: item for item in items}
    rows = [json.loads(line) for line in answers.read_text(encoding="utf-8").splitlines()]
    for row in tqdm(rows, answers.stem):
        item = by_id[row["id"]]
        case = bench.open(item)
        text, tokens, seconds = row.get("text"), len(case.tokens), row["seconds"]
        entries, draft_seconds, readable = row.get("entries", 0), 0.0, None
        if text is None:
            answer = case.answer(case.prompt.with_texts(row["texts"]), None, shared=False)
            text, tokens = answer.text, answer.usage.prompt_tokens
            entries, draft_seconds = tokens, seconds
            seconds = answer.timings["prefill"] + answer.timings.get("decode", 0.0)
            readable = _readable(item, row["texts"])
        score = score_answer(item, text)
        yield Record(
            item=item.id,
            task=item.task,
            length=item.length,
            question_first=item.question_first,
            depth=item.depth,
            method=row["method"],
            budget=row["budget"],
            answer=text,
            correct=score.correct,
            recall=score.recall,
            f1=score.f1,
            survived=readable,
            sentences_survived=None,
            full_tokens=len(case.tokens),
            prompt_tokens=tokens,
            cache_tokens=entries,
            draft_seconds=draft_seconds,
            target_seconds=seconds,
            draft_correct=draft_right.get(item.id),
        )


def _readable(item: EvalItem, texts: Sequence[str]) -> bool | None:
    """Whether the values can be read in their passages: a peer tells no character spans."""
    if not item.evidence:
        return None
    found = [
        item.passages[e.value.passage][e.value.start : e.value.end] in texts[e.value.passage]
        for e in item.evidence
    ]
    return any(found) if item.need == "any" else all(found)


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, required=True, help="folder of draftsieve eval")
    parser.add_argument("--budget", type=float, nargs="+", default=[0.125])
    parser.add_argument("--items", type=int, help="only the first items")
    parser.add_argument("--reference", default="none")
    parser.add_argument("--only", nargs="+", default=[peer.name for peer in PEERS])
    parser.add_argument("--environments", type=Path, default=Path(".peers"))
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())

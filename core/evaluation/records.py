"""Results as JSON lines: one record an item, method and budget, appended as soon as it is known."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ..errors import ConfigError

RESULTS, ITEMS, DESCRIPTION = "results.jsonl", "items.jsonl", "run.json"
Key = tuple[str, str, float]  # item, method, budget


@dataclass(frozen=True, slots=True)
class Record:
    """What one method answered on one item at one budget.

    `survived` and `sentences_survived` are None where the text stayed whole or nothing had to
    survive; `draft_correct` says whether the draft's own answer to the whole prompt was right, None
    where the prompt exceeds its window. `error` replaces the answer where a method refused.
    `log_likelihood` and `divergence` are those of `likelihood.py`, in nats a token; None where the
    reference answer was not read. `own_divergence` is the divergence at the tokens of the target's
    own greedy answer to the whole prompt, known for methods on the cache. `words_kept` is that of
    `answer_words.py`, known where a reference answer in free text marks nothing that must survive.
    """

    item: str
    task: str
    length: int
    question_first: bool
    depth: float | None
    method: str
    budget: float  # share of the passages' tokens; 1.0 for methods without a budget
    answer: str
    correct: bool
    recall: float
    f1: float
    survived: bool | None
    sentences_survived: bool | None
    full_tokens: int  # of the whole prompt, in the draft's tokens
    prompt_tokens: int  # what the target read
    cache_tokens: int  # what its cache held per KV head when decoding began
    draft_seconds: float
    target_seconds: float
    draft_correct: bool | None
    error: str | None = None
    kind: str = ""
    log_likelihood: float | None = None
    divergence: float | None = None
    own_divergence: float | None = None
    words_kept: float | None = None

    @property
    def key(self) -> Key:
        """What makes the record unique in a run."""
        return self.item, self.method, self.budget


def open_folder(folder: Path, description: Mapping[str, Any]) -> list[Record]:
    """Create a results folder, or read what is there of the same run.

    Args:
        folder: Where the results go.
        description: What two runs must have in common to be one, such as models and seed.

    Returns:
        The records so far. A last line that was cut off by an interruption is removed.

    Raises:
        ConfigError: The folder holds results of another run.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / DESCRIPTION
    if path.exists():
        there = json.loads(path.read_text(encoding="utf-8"))
        differs = sorted(k for k in {*there, *description} if there.get(k) != description.get(k))
        if differs:
            raise ConfigError(
                f"{str(folder)!r} holds the results of another run, which differs in "
                f"{', '.join(differs)}: choose another folder, or remove this one."
            )
    path.write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")
    return _recover(folder / RESULTS)


def append(folder: Path, record: Record) -> None:
    """Add one record, on disk when the call returns."""
    with (folder / RESULTS).open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(record), ensure_ascii=False) + "\n")


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows as JSON lines."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")


def read_records(path: Path) -> list[Record]:
    """Read records; lines of peers may lack what only this package measures.

    Raises:
        ConfigError: A line has a field that no record has.
    """
    known = {field.name for field in fields(Record)}
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if unknown := sorted(set(row) - known):
            raise ConfigError(f"{str(path)!r} has fields {unknown} that no record has.")
        found.append(Record(**row))
    return found


def _recover(path: Path) -> list[Record]:
    if not path.exists():
        return []
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if whole != data:
        path.write_bytes(whole)
    return read_records(path)

"""MTRAG-UN, of IBM's MTRAG (arXiv 2501.03468): turns of conversations over retrieved passages.

Some turns cannot be answered from the passages, or do not say enough to be answered. The reference
answers are free text, so no characters are marked that must be kept.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..tasks import Turn
from .collection import Collection, Pool, RealQuestion, read_lines

NAME = "mtrag"
_ALONE = {"n/a": "alone"}
_ROLES = {"user": "user", "agent": "assistant"}


def read_mtrag(path: str | Path) -> Collection:
    """Read conversations whose last turn is to be answered.

    Args:
        path: One JSON object a line: task_id, contexts, input (turns), targets, answerability.

    Returns:
        Each question with the conversation before it; `gold` are the passages that were retrieved
        for it, `kind` its answerability and what it is to the conversation, in lower case, as in
        "answerable, follow-up" ("alone": it leans on nothing that was said).

    Raises:
        PromptError: A line has another form.
    """
    pool = Pool()

    def parse(row: dict[str, Any]) -> RealQuestion:
        gold = [pool.add(c["text"].strip(), c["document_id"]) for c in row["contexts"]]
        *before, last = (Turn(_ROLES[turn["speaker"]], turn["text"]) for turn in row["input"])
        kind = "+".join(row["answerability"]).casefold()
        leans = "+".join(row.get("Multi-Turn", ())).casefold()
        answers = tuple(target["text"].strip() for target in row["targets"])
        return RealQuestion(
            id=row["task_id"],
            text=last.text,
            answers=() if kind == "unanswerable" else answers,
            need="any",
            places=(),
            gold=tuple(dict.fromkeys(gold)),
            kind=f"{kind}, {_ALONE.get(leans, leans)}" if leans else kind,
            turns=tuple(before),
        )

    rows = read_lines(path, "a turn (task_id, contexts, input, targets, answerability)", parse)
    return Collection(NAME, pool.passages(), tuple(rows))

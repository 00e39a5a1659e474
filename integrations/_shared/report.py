"""What an answer's metadata says, in plain values: how it came about, and why it ended."""

from __future__ import annotations

from typing import Any

from ...core.config import Method
from ...core.types import Answer


def report(answer: Answer, method: Method | None) -> dict[str, Any]:
    """Describe how an answer came about.

    Args:
        answer: The core's answer.
        method: The method that was asked for.

    Returns:
        "finish_reason", "timings" (seconds per stage), "method" (None, or its name and options),
        "spans" (kept characters of the documents' original texts) and "fallback" (why documents
        were left whole although a method was given, else None). Only JSON types.
    """
    return {
        "finish_reason": answer.finish_reason,
        "timings": dict(answer.timings),
        "method": named(method),
        "spans": [
            {
                "passage": span.passage_id,
                "index": span.passage_index,
                "start": span.start,
                "end": span.end,
                "score": span.score,
            }
            for span in answer.spans
        ],
        "fallback": answer.fallback,
    }


def named(method: Method | None) -> dict[str, Any] | None:
    """A method as its name and options."""
    if method is None:
        return None
    return {"name": type(method).__name__, **method.model_dump(mode="json")}


def cut_off(finish_reason: object, tokens: object, what: str) -> str:
    """Why an answer holds nothing that can be used, as a sentence.

    Args:
        finish_reason: The answer's.
        tokens: How many tokens it has.
        what: What it lacks, such as "whole tool call".
    """
    if finish_reason == "length":
        return (
            f"The answer was cut off by max_tokens after {tokens} tokens and so holds no {what}: "
            "allow more max_tokens."
        )
    return f"The answer ended ({finish_reason}) and holds no {what}."

"""What a compression did to one passage, as plain values for a document's metadata."""

from __future__ import annotations

from typing import Any

from ..core.types import CompressedContext

KEY = "draftsieve"  # the metadata key under which every adapter stores it


def provenance(context: CompressedContext, index: int) -> dict[str, Any]:
    """Describe what became of one passage of a request.

    Args:
        context: The result of the compression.
        index: Place of the passage in the request, from 0.

    Returns:
        "spans" (dicts of "start", "end", "score": kept characters of the original text), "tokens"
        and "compressed_tokens" (sizes in draft tokens), "score" (the best among its tokens) and
        "fallback" (why the text is unchanged although compression was asked for, else None).
        Only JSON types.
    """
    size = context.sizes[index]
    return {
        "spans": [
            {"start": span.start, "end": span.end, "score": span.score}
            for span in context.spans
            if span.passage_index == index
        ],
        "tokens": size.tokens,
        "compressed_tokens": size.compressed_tokens,
        "score": size.score,
        "fallback": context.stats.fallback,
    }

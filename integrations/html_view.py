"""One self-contained HTML page that shows what compression kept of each passage.

No script, no external resource; every text is escaped. Works in light and dark and right-to-left.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from importlib.resources import files
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..core.types import Answer, CompressedContext, Passage, Span

LEVELS = 5  # steps of the highlight, 1 is the weakest


def render_html(
    question: str,
    answer: Answer | None,
    context: CompressedContext | None,
    originals: Sequence[Passage],
) -> str:
    """The whole page as text.

    Args:
        question: The question that was asked.
        answer: The target's answer, or None where only the context was compressed.
        context: What compression kept; None where nothing was compressed, and then every passage
            is shown without marks.
        originals: The passages of the request, in its order.
    """
    from jinja2 import Environment, StrictUndefined

    page = files(__package__).joinpath("html_view.jinja").read_text(encoding="utf-8")
    environment = Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined
    )
    strength = levels(context.spans) if context else {}
    return environment.from_string(page).render(
        question=question,
        answer=answer,
        notice=(answer and answer.fallback) or (context and context.stats.fallback),
        figures=list(_figures(answer, context)),
        marked=context is not None,
        levels=range(1, LEVELS + 1),
        passages=[_shown(*each, context, strength) for each in enumerate(originals)],
    )


def segments(text: str, spans: Iterable[Span]) -> Iterator[tuple[str, Span | None]]:
    """Cut a passage into kept pieces, with their span, and dropped ones, with None."""
    place = 0
    for span in sorted(spans, key=lambda s: (s.start, s.end)):
        start, end = max(place, span.start), min(len(text), span.end)
        if start >= end:
            continue
        if start > place:
            yield text[place:start], None
        yield text[start:end], span
        place = end
    if place < len(text):
        yield text[place:], None


def levels(spans: Sequence[Span]) -> dict[Span, int]:
    """Strength of each span's highlight, 1 to `LEVELS`, by the rank of its score in the request.

    Ranks, because attention scores differ by orders of magnitude; equal scores share a level, and
    text that the draft was not asked about (score 0) has the lowest.
    """
    scores = sorted({span.score for span in spans if span.score > 0})
    rank = {score: place for place, score in enumerate(scores, start=1)}
    return {
        span: -(-rank[span.score] * LEVELS // len(scores)) if span.score > 0 else 1
        for span in spans
    }


def size(count: int | None) -> str:
    """Bytes in a unit that suits them."""
    value, unit = float(count or 0), "bytes"
    for larger in ("kB", "MB", "GB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{value:.3g} {unit}"


def _figures(answer: Answer | None, context: CompressedContext | None) -> Iterator[tuple[str, str]]:
    """Names and values of the page's head."""
    if context:
        stats = context.stats
        change = _change(stats.passage_tokens, stats.compressed_passage_tokens)
        yield "passages, draft tokens", change
    if answer:
        usage = answer.usage
        yield "prompt, target tokens", _change(usage.original_prompt_tokens, usage.prompt_tokens)
        if usage.cache_entries is not None:
            yield "cache, entries a head", _change(usage.prompt_tokens, usage.cache_entries)
        if answer.cache_bytes is not None:
            yield "cache, bytes", size(answer.cache_bytes)
        yield "answer tokens", f"{usage.completion_tokens:,}"
    seconds = answer.timings if answer else context.stats.seconds if context else {}
    for stage, value in seconds.items():
        yield stage, f"{value:.3f} s"


def _change(before: int, after: int) -> str:
    if before == after:
        return f"{before:,}"
    return f"{before:,} → {after:,} ({1 - after / before:.0%} saved)"


def _shown(
    place: int, passage: Passage, context: CompressedContext | None, strength: dict[Span, int]
) -> dict[str, Any]:
    """One passage with its title, its size, and its kept and dropped pieces."""
    title = str(passage.id if passage.id is not None else place + 1)
    if context is None:
        return {"title": title, "tokens": "", "pieces": [(passage.text, None, "")]}
    sizes = context.sizes[place]
    own = [span for span in context.spans if span.passage_index == place]
    pieces = [
        (piece, strength[span], f"{span.score:.3g}") if span else (piece, None, "")
        for piece, span in segments(passage.text, own)
    ]
    tokens = f" · {sizes.tokens:,} → {sizes.compressed_tokens:,} tokens"
    return {"title": title, "tokens": tokens, "pieces": pieces}

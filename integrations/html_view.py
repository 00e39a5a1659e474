"""One self-contained HTML page that shows what compression kept of each passage.

No script, no external resource; every text is escaped. Works in light and dark and right-to-left.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..core.types import Answer, CompressedContext, Passage, Span

LEVELS = 5  # steps of the highlight, 1 is the weakest

_STYLE = """
:root { color-scheme: light dark; --fg: #1c2024; --bg: #fff; --card: #f6f7f9; --line: #d9dde3;
  --soft: #616b77; --gone: #7d8590; --mark: 34 139 84; }
@media (prefers-color-scheme: dark) {
  :root { --fg: #e6e9ed; --bg: #14171a; --card: #1c2024; --line: #353c45; --soft: #a3adb8;
    --gone: #838c97; --mark: 70 190 120; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 54rem; padding: 1.5rem 1rem 4rem; color: var(--fg);
  background: var(--bg); font: 16px/1.6 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.35rem; line-height: 1.3; }
h2 { margin: 0; font-size: .9rem; color: var(--soft); }
.answer { padding: .8rem 1rem; border-inline-start: 4px solid rgb(var(--mark));
  background: var(--card); white-space: pre-wrap; }
dl { display: flex; flex-wrap: wrap; gap: .5rem 1.8rem; margin: 1.2rem 0; }
dt { font-size: .78rem; color: var(--soft); }
dd { margin: 0; font-variant-numeric: tabular-nums; }
article { margin: 1rem 0; padding: .8rem 1rem; border: 1px solid var(--line);
  border-radius: .5rem; background: var(--card); }
article p { margin: .4rem 0 0; white-space: pre-wrap; }
del { color: var(--gone); text-decoration: none; }
mark { color: inherit; border-radius: .2rem; padding: .05rem 0; }
.notice { padding: .6rem 1rem; border: 1px solid var(--line); border-radius: .5rem; }
.s1 { background: rgb(var(--mark) / .14); } .s2 { background: rgb(var(--mark) / .24); }
.s3 { background: rgb(var(--mark) / .34); } .s4 { background: rgb(var(--mark) / .46); }
.s5 { background: rgb(var(--mark) / .60); }
"""


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
    notice = context.stats.fallback if context else None
    parts = [
        "<!DOCTYPE html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(question)} · draftsieve</title>",
        f"<style>{_STYLE}</style></head><body>",
        f'<h1 dir="auto">{escape(question)}</h1>',
        f'<div class="answer" dir="auto">{escape(answer.text)}</div>' if answer else "",
        f'<p class="notice">Not compressed: {escape(notice)}</p>' if notice else "",
        _statistics(answer, context),
        _legend() if context else "",
        *(_article(place, passage, context) for place, passage in enumerate(originals)),
        "</body></html>",
    ]
    return "\n".join(part for part in parts if part) + "\n"


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


def _statistics(answer: Answer | None, context: CompressedContext | None) -> str:
    rows: list[tuple[str, str]] = []
    if context:
        stats = context.stats
        change = _change(stats.passage_tokens, stats.compressed_passage_tokens)
        rows.append(("passages, draft tokens", change))
    if answer:
        usage = answer.usage
        change = _change(usage.original_prompt_tokens, usage.prompt_tokens)
        rows.append(("prompt, target tokens", change))
        rows.append(("answer tokens", f"{usage.completion_tokens:,}"))
    seconds = answer.timings if answer else context.stats.seconds if context else {}
    rows.extend((stage, f"{value:.3f} s") for stage, value in seconds.items())
    return f"<dl>{''.join(f'<div><dt>{escape(k)}</dt><dd>{v}</dd></div>' for k, v in rows)}</dl>"


def _change(before: int, after: int) -> str:
    saved = f" ({1 - after / before:.0%} saved)" if before and after != before else ""
    return f"{before:,} → {after:,}{saved}"


def _legend() -> str:
    steps = "".join(f'<mark class="s{level}">&nbsp;{level}&nbsp;</mark>' for level in _steps())
    return f"<p>Kept, by rank of the score: {steps} · <del>dropped</del></p>"


def _steps() -> range:
    return range(1, LEVELS + 1)


def _article(place: int, passage: Passage, context: CompressedContext | None) -> str:
    """One passage with its title, its size, and its kept and dropped pieces."""
    title = escape(str(passage.id if passage.id is not None else place + 1))
    if context is None:
        body = escape(passage.text)
    else:
        sizes = context.sizes[place]
        title += f" · {sizes.tokens:,} → {sizes.compressed_tokens:,} tokens"
        strength = levels(context.spans)
        own = [span for span in context.spans if span.passage_index == place]
        body = "".join(
            f'<mark class="s{strength[span]}" title="score {span.score:.3g}">{escape(piece)}</mark>'
            if span
            else f"<del>{escape(piece)}</del>"
            for piece, span in segments(passage.text, own)
        )
    return f'<article><h2>[{place + 1}] <bdi>{title}</bdi></h2><p dir="auto">{body}</p></article>'

"""How the command line shows results: on a terminal with highlights, or as JSON."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from ...core.config import Method, SpecPC
from ...core.config import stages as parts
from ..html_view import levels, segments, size

if TYPE_CHECKING:
    from ...core.types import Answer, CompressedContext, Drafting, Passage

_KEPT = {1: "green", 2: "green", 3: "bold green", 4: "bold green", 5: "bold reverse green"}
_DROPPED = "dim"
_BRIEF = 96  # characters
# Retrieved text is untrusted: no escape sequence, direction override or cursor control of it may
# reach a terminal.
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    """The text with control characters (tab and newline aside) replaced, for a terminal."""
    return _CONTROLS.sub("\ufffd", text)


def show_sources(
    console: Console,
    passages: Sequence[Passage],
    context: CompressedContext | None,
    *,
    verbose: bool = False,
) -> None:
    """Print every passage under its number and id, kept text highlighted.

    Without styles (a pipe, a file) only the kept text is printed: dropped text would look the same.
    Where nothing was left out, the beginning of each passage is enough, unless `verbose`.
    """
    brief = not (verbose or (context is not None and context.stats.compressed))
    for place, passage in enumerate(passages):
        head = Text(f"[{place + 1}] {printable(passage.id or str(place + 1))}", style="bold")
        if context is not None:
            own = context.sizes[place]
            head.append(f"  {own.tokens} → {own.compressed_tokens} tokens", "not bold dim")
        console.print(head, soft_wrap=True)
        if brief:
            beginning = textwrap.shorten(printable(passage.text), _BRIEF, placeholder=" …")
            console.print(beginning, soft_wrap=True)
            continue
        body = highlighted(passage, place, context, styled=console.is_terminal)
        console.print(body, soft_wrap=not console.is_terminal)
        console.print()
    if brief:
        console.print()


def highlighted(
    passage: Passage, place: int, context: CompressedContext | None, *, styled: bool = True
) -> Text:
    """One passage as rich text; `place` is its index in the request."""
    if context is None:
        return Text(printable(passage.text))
    strength = levels(context.spans)
    own = [span for span in context.spans if span.passage_index == place]
    if not own and not styled:
        return Text("(nothing kept)")
    text = Text()
    for piece, span in segments(passage.text, own):
        if span is not None:
            text.append(printable(piece), style=_KEPT[strength[span]])
        elif styled:
            text.append(printable(piece), style=_DROPPED)
        else:
            text.append(" … " if piece.strip() else " ")
    return text


def show_costs(console: Console, answer: Answer, method: Method | None) -> None:
    """Print tokens before and after, the seconds of each stage, and why nothing was saved."""
    for line in _costs(answer, method):
        console.print(printable(line), style="dim", soft_wrap=True)


def _costs(answer: Answer, method: Method | None) -> Iterator[str]:
    usage = answer.usage
    tokens = change(usage.original_prompt_tokens, usage.prompt_tokens)
    cut = " (cut off by --max-new-tokens)" if answer.finish_reason == "length" else ""
    yield f"prompt tokens: {tokens}, answer tokens: {usage.completion_tokens}{cut}"
    if answer.fallback is not None:
        yield f"the method was not applied: {answer.fallback}"
    specpc, speckv = parts(method)
    if specpc is not None and answer.context is not None:
        reason = why_whole(specpc, answer.context)
        if reason is not None:
            yield reason
        if answer.context.stats.note is not None:
            yield answer.context.stats.note
    if usage.cache_entries is not None:
        entries = change(usage.prompt_tokens, usage.cache_entries)
        yield f"cache entries a head: {entries}, in all {size(answer.cache_bytes)}"
    elif speckv is not None and answer.fallback is None:
        room = "ratio" if speckv.capacity is None else f"capacity of {speckv.capacity} entries"
        yield f"nothing was evicted: the {room} holds the prompt of {usage.prompt_tokens} tokens"
    if answer.lookahead:
        yield f"the draft guessed: {' '.join(answer.lookahead.split())}"
    if (drafting := answer.drafting) is not None:
        said = f"{drafting.tokens_per_forward:.1f} tokens a forward pass"
        yield f"drafting: {drafting.note or said}"
    yield f"seconds: {stages(answer.timings)}"


def why_whole(method: SpecPC, context: CompressedContext) -> str | None:
    """Why nothing was left out of the passages; None where something was, or something failed."""
    stats = context.stats
    if stats.compressed or stats.fallback is not None:
        return None
    if method.capacity is not None and method.capacity >= stats.prompt_tokens:
        reason = f"the capacity of {method.capacity} holds the prompt of {stats.prompt_tokens}"
    elif stats.passage_tokens < method.min_tokens:
        reason = f"min_tokens is {method.min_tokens}, the passages have {stats.passage_tokens}"
    else:
        reason = "what may be left out is not shorter than the mark of the gap"
    return f"nothing was left out: {reason} draft tokens"


def change(before: int, after: int) -> str:
    """Two sizes and the share saved, or one size where they are equal."""
    return (
        f"{before}" if before == after else f"{before} → {after} ({1 - after / before:.0%} saved)"
    )


def stages(seconds: Mapping[str, float]) -> str:
    """Seconds of each stage and of all together, on one line."""
    each = (f"{name} {value:.2f}" for name, value in seconds.items())
    return ", ".join([*each, f"in all {sum(seconds.values()):.2f}"])


def context_json(context: CompressedContext) -> dict[str, Any]:
    """Statistics of a compression as plain values."""
    stats = context.stats
    return {
        "prompt_tokens": stats.prompt_tokens,
        "compressed_prompt_tokens": stats.compressed_prompt_tokens,
        "passage_tokens": stats.passage_tokens,
        "compressed_passage_tokens": stats.compressed_passage_tokens,
        "compressed": stats.compressed,
        "fallback": stats.fallback,
        "note": stats.note,
        "seconds": dict(stats.seconds),
    }


def sources_json(
    passages: Sequence[Passage], context: CompressedContext | None
) -> list[dict[str, Any]]:
    """Every passage with its id, metadata, and, if compressed, kept text and spans."""
    from ...retrievers.provenance import provenance

    sources = []
    for place, passage in enumerate(passages):
        source: dict[str, Any] = {"id": passage.id, "text": passage.text}
        source["metadata"] = dict(passage.metadata)
        if context is not None:
            shortened = dict(zip(context.indices, context.passages, strict=True)).get(place)
            source["compressed_text"] = shortened.text if shortened else ""
            source |= provenance(context, place)
        sources.append(source)
    return sources


def drafting_json(drafting: Drafting) -> dict[str, Any]:
    """What drafting did as plain values."""
    return asdict(drafting) | {"tokens_per_forward": drafting.tokens_per_forward}


def answer_json(question: str, passages: Sequence[Passage], answer: Answer) -> dict[str, Any]:
    """An answer with its sources, usage and timings as plain values."""
    usage = answer.usage
    return {
        "question": question,
        "answer": answer.text,
        "finish_reason": answer.finish_reason,
        "usage": {
            "original_prompt_tokens": usage.original_prompt_tokens,
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
            "cache_entries": usage.cache_entries,
            "cache_bytes": answer.cache_bytes,
        },
        "lookahead": answer.lookahead,
        "drafting": None if answer.drafting is None else drafting_json(answer.drafting),
        "seconds": dict(answer.timings),
        "compression": context_json(answer.context) if answer.context else None,
        "sources": sources_json(passages, answer.context),
    }

"""How the command line shows results: on a terminal with highlights, or as JSON."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from ..html_view import levels, segments

if TYPE_CHECKING:
    from ...core.types import Answer, CompressedContext, Drafting, Passage

_KEPT = {1: "green", 2: "green", 3: "bold green", 4: "bold green", 5: "bold reverse green"}
_DROPPED = "dim"
# Retrieved text is untrusted: no escape sequence, direction override or cursor control of it may
# reach a terminal.
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    """The text with control characters (tab and newline aside) replaced, for a terminal."""
    return _CONTROLS.sub("\ufffd", text)


def show_sources(
    console: Console, passages: Sequence[Passage], context: CompressedContext | None
) -> None:
    """Print every passage under its number and id, kept text highlighted.

    Without styles (a pipe, a file) only the kept text is printed: dropped text would look the same.
    """
    for place, passage in enumerate(passages):
        head = Text(f"[{place + 1}] {printable(passage.id or str(place + 1))}", style="bold")
        if context is not None:
            size = context.sizes[place]
            head.append(f"  {size.tokens} → {size.compressed_tokens} tokens", style="not bold dim")
        console.print(head, soft_wrap=True)
        body = highlighted(passage, place, context, styled=console.is_terminal)
        console.print(body, soft_wrap=not console.is_terminal)
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


def show_costs(console: Console, answer: Answer) -> None:
    """Print tokens before and after and the seconds of each stage."""
    usage = answer.usage
    saved = saving(usage.original_prompt_tokens, usage.prompt_tokens)
    console.print(
        f"prompt tokens: {usage.original_prompt_tokens} → {usage.prompt_tokens} ({saved} saved), "
        f"answer tokens: {usage.completion_tokens}",
        style="dim",
        soft_wrap=True,
    )
    if usage.cache_entries is not None:
        kept = f"cache entries a head: {usage.prompt_tokens} → {usage.cache_entries}"
        console.print(
            f"{kept}, the draft guessed: {printable(answer.lookahead or '')}", style="dim"
        )
    if (drafting := answer.drafting) is not None:
        said = f"{drafting.tokens_per_forward:.1f} tokens a forward pass"
        console.print(f"drafting: {drafting.note or said}", style="dim", soft_wrap=True)
    console.print(f"seconds: {stages(answer.timings)}", style="dim", soft_wrap=True)


def saving(before: int, after: int) -> str:
    """Share of tokens saved, as a percentage."""
    return f"{1 - after / before:.0%}" if before else "0%"


def stages(seconds: Mapping[str, float]) -> str:
    """Seconds per stage on one line."""
    return ", ".join(f"{name} {value:.2f}" for name, value in seconds.items())


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
        "seconds": dict(stats.seconds),
    }


def sources_json(
    passages: Sequence[Passage], context: CompressedContext | None
) -> list[dict[str, Any]]:
    """Every passage with its id, metadata, and, if compressed, kept text and spans."""
    from ...retrievers.provenance import provenance  # brings torch, which `--help` can do without

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
        },
        "lookahead": answer.lookahead,
        "drafting": None if answer.drafting is None else drafting_json(answer.drafting),
        "seconds": dict(answer.timings),
        "compression": context_json(answer.context) if answer.context else None,
        "sources": sources_json(passages, answer.context),
    }

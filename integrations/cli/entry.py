"""The command `draftsieve`: ask documents a question, or compress what a retriever found.

What needs torch is imported where it is used, so that `--help` and usage errors come at once.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from ...core.config import Generation, Method, Quantization, SpecKV, SpecKVPC, SpecPC
from ...core.errors import DraftSieveError, PromptError
from ..html_view import render_html
from .parser import build_parser
from .render import (
    answer_json,
    context_json,
    printable,
    saving,
    show_costs,
    show_sources,
    sources_json,
    stages,
)

if TYPE_CHECKING:
    from ...core.engine import Engine
    from ...core.generation.speculative.drafters.store import TrigramStore
    from ...core.types import Answer, CompressedContext, Passage

_DRAFT_MODEL = ("lookahead", "model", "graph")  # drafting that needs the draft without a method
INTERRUPTED, BROKEN_PIPE = 130, 141  # 128 + SIGINT, 128 + SIGPIPE, as a shell reports them


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    arguments = build_parser(ask, compress).parse_args(argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # an ASCII terminal shows \u2026, not a traceback
            stream.reconfigure(errors="backslashreplace")
    try:
        arguments.run(arguments)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of our output has left: nobody to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except KeyboardInterrupt:
        print("draftsieve: interrupted", file=sys.stderr)
        return INTERRUPTED
    except (DraftSieveError, OSError) as error:
        if arguments.debug:
            raise
        print(f"draftsieve: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


def ask(arguments: argparse.Namespace) -> None:
    """`draftsieve ask`: retrieve, answer, show the sources and what was kept of them."""
    from ...core.engine import Engine

    passages = _retrieve(arguments.docs, arguments.question, arguments.top_k)
    method = _method(arguments)
    engine = Engine.load(
        arguments.target,
        arguments.draft if method or arguments.drafting in _DRAFT_MODEL else None,
        quantization=_quantization(arguments),
        device=arguments.device,
        progress=not arguments.no_progress,
        draft_store=_draft_store(arguments),
    )
    console = _Console()
    if console.is_terminal and not arguments.json:
        answer = _stream(engine, arguments, passages, method)
    else:
        answer = engine.answer(
            arguments.question, passages, method=method, generation=_generation(arguments)
        )
    _write_html(arguments, answer, answer.context, passages)
    if arguments.json:
        _print_json(answer_json(arguments.question, passages, answer))
        return
    if not console.is_terminal:
        console.print(answer.text, soft_wrap=True)
    console.print()
    show_sources(console, passages, answer.context)
    show_costs(console, answer)


def compress(arguments: argparse.Namespace) -> None:
    """`draftsieve compress`: the shortened text on stdout, statistics on stderr."""
    from ...core.compressor import Compressor

    whole = ""
    if arguments.docs is not None:
        passages = _retrieve(arguments.docs, arguments.question, arguments.top_k)
    else:
        whole, passages = _read_file(arguments.file)
    compressor = Compressor.load(
        arguments.draft,
        quantization=_quantization(arguments),
        device=arguments.device,
        progress=not arguments.no_progress,
    )
    context = compressor.compress(arguments.question, passages, _specpc(arguments))
    _write_html(arguments, None, context, passages)
    if arguments.json:
        sources = sources_json(passages, context)
        result = {"question": arguments.question, "text": context.text}
        _print_json(result | {"compression": context_json(context), "sources": sources})
        return
    is_file = arguments.docs is None  # a file comes back as a file, without passage numbers
    text = _reassemble(whole, passages, context) if is_file else context.text
    print(printable(text) if sys.stdout.isatty() else text)
    stats = context.stats
    saved = saving(stats.passage_tokens, stats.compressed_passage_tokens)
    print(
        f"passage tokens: {stats.passage_tokens} → {stats.compressed_passage_tokens} "
        f"({saved} saved); seconds: {stages(stats.seconds)}",
        file=sys.stderr,
    )


class _Console(Console):
    """Results on stdout: no markup is read from texts, and a closed pipe is `main`'s affair."""

    def __init__(self) -> None:
        super().__init__(markup=False, highlight=False, emoji=False)

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def _stream(
    engine: Engine,
    arguments: argparse.Namespace,
    passages: Sequence[Passage],
    method: Method | None,
) -> Answer:
    """Print the answer as it comes; the last chunk carries the whole of it."""
    answer: Answer | None = None
    for chunk in engine.stream(
        arguments.question, passages, method=method, generation=_generation(arguments)
    ):
        print(printable(chunk.text), end="", flush=True)
        answer = chunk.answer
    print()
    assert answer is not None
    return answer


def _retrieve(folder: Path, question: str, top_k: int) -> list[Passage]:
    """The best passages of a folder by BM25, best first; those without a common word are out."""
    from ...retrievers.bm25 import Bm25Index
    from ...retrievers.folder import read_folder

    found = Bm25Index.from_passages(read_folder(folder)).search(question, top_k)
    passages = [passage for passage, score in found if score > 0]
    if not passages:
        raise PromptError(f"No passage below {str(folder)!r} shares a word with the question.")
    return passages


def _read_file(name: str) -> tuple[str, list[Passage]]:
    """A file, or standard input for "-", and its paragraphs as passages."""
    from ...core.types import Passage
    from ...retrievers.chunks import paragraphs

    label = "stdin" if name == "-" else name
    data = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
    try:
        text = data.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise PromptError(f"{label!r} is not UTF-8 text: convert it first.") from error
    passages = [
        Passage(text[start:end], f"{label}#{place}", {"start": start, "end": end})
        for place, (start, end) in enumerate(paragraphs(text), start=1)
    ]
    if not passages:
        raise PromptError(f"{label!r} holds no text.")
    return text, passages


def _reassemble(text: str, passages: Sequence[Passage], context: CompressedContext) -> str:
    """A file's shortened passages with the white space that stood between them."""
    result, previous = "", -1
    for place, passage in zip(context.indices, context.passages, strict=True):
        if not passage.text:
            continue
        if previous >= 0:
            first, last = passages[previous].metadata["end"], passages[place].metadata["start"]
            result += text[first:last] if place == previous + 1 else "\n\n"
        result, previous = result + passage.text, place
    return result


def _method(arguments: argparse.Namespace) -> Method | None:
    """What `--method` and the budget ask for; a cascade's first stage gets twice the budget."""
    capacity, ratio = arguments.capacity, arguments.ratio
    if arguments.method == "speckv":
        return SpecKV(capacity=capacity, ratio=ratio)
    if arguments.method == "speckv-pc":
        if ratio is not None:
            first = SpecPC(ratio=min(1.0, 2 * ratio), unit=arguments.unit, lookahead_tokens=8)
            return SpecKVPC(specpc=first, speckv=SpecKV(ratio=max(ratio, 0.5)))
        first = SpecPC(capacity=2 * (capacity or 512), unit=arguments.unit, lookahead_tokens=8)
        return SpecKVPC(specpc=first, speckv=SpecKV(capacity=capacity))
    return _specpc(arguments) if arguments.method == "specpc" else None


def _specpc(arguments: argparse.Namespace) -> SpecPC:
    return SpecPC(capacity=arguments.capacity, ratio=arguments.ratio, unit=arguments.unit)


def _generation(arguments: argparse.Namespace) -> Generation:
    return Generation(max_new_tokens=arguments.max_new_tokens, drafting=arguments.drafting)


def _draft_store(arguments: argparse.Namespace) -> TrigramStore | None:
    from ...core.generation.speculative.drafters.store import TrigramStore

    return TrigramStore.load(arguments.draft_store) if arguments.draft_store else None


def _quantization(arguments: argparse.Namespace) -> Quantization | None:
    return Quantization(bits=arguments.bits) if arguments.bits else None


def _write_html(
    arguments: argparse.Namespace,
    answer: Answer | None,
    context: CompressedContext | None,
    passages: Sequence[Passage],
) -> None:
    if arguments.html is not None:
        page = render_html(arguments.question, answer, context, passages)
        arguments.html.write_text(page, encoding="utf-8")


def _print_json(value: dict[str, Any]) -> None:
    print(json.dumps(value, ensure_ascii=False, indent=2, default=str))

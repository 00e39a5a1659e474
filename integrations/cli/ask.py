"""`draftsieve ask`: retrieve, answer, show the sources and what was kept of them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...core.config import Generation, Method
from ...core.prompt.messages import DEFAULT_SYSTEM
from .arguments import (
    add_models,
    add_running,
    count,
    known_file,
    loading,
    progress,
    quantization,
    question,
)
from .choice import choose_models
from .method import add_method, read_method
from .output import Output, add_output, print_json, write_html
from .render import answer_json, printable, show_costs, show_sources
from .sources import retrieve
from .stored import add_store, stored, tell

if TYPE_CHECKING:
    from ...core.engine import Engine
    from ...core.types import Answer, Passage

_DRAFT_MODEL = ("lookahead", "model", "graph")  # drafting that needs the draft without a method
_EPILOG = """\
examples:
  draftsieve ask "Who leads the archive?" --docs examples/data/handbook
  draftsieve ask "Who leads the archive?" --docs notes/ --ratio 0.2 --html kept.html
  draftsieve ask "Who leads the archive?" --docs notes/ --method speckv-pc --ratio 0.2
  draftsieve ask "Who leads the archive?" --docs notes/ --store readings/ --store-new
  draftsieve ask "Who leads the archive?" --docs notes/ --set lexical_weight=0.5 --set unit=passage
  draftsieve ask "Who leads the archive?" --docs notes/ \\
      --target Qwen/Qwen3-4B --draft Qwen/Qwen3-0.6B
  draftsieve ask "Who leads the archive?" --docs notes/ --target builtin:target
"""


def add_ask(commands: Any) -> None:
    """Add the command to the parser's commands."""
    line = commands.add_parser(
        "ask",
        help="answer a question from a folder of documents",
        usage="%(prog)s QUESTION --docs FOLDER [options]",
        description="Retrieve passages with BM25, answer, and show what was kept of each source.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    line.add_argument("question", type=question, metavar="QUESTION", help="what to ask")
    line.add_argument("--docs", type=Path, required=True, metavar="FOLDER", help="documents")
    line.add_argument(
        "--top-k", type=count, default=5, metavar="K", help="passages (default: %(default)s)"
    )
    line.add_argument(
        "--system",
        default=DEFAULT_SYSTEM,
        metavar="TEXT",
        help='system text, "" for none (default: "%(default)s")',
    )
    add_method(line)
    add_store(line)
    add_models(line, target=True, draft=True, bits="the target")
    answer = line.add_argument_group("answer")
    answer.add_argument(
        "--max-new-tokens", type=count, default=64, metavar="N", help="(default: %(default)s)"
    )
    answer.add_argument(
        "--drafting",
        choices=("auto", "lookup", "aded", "lookahead", "model", "graph"),
        help="who guesses ahead, so that decoding takes fewer passes; the answer stays the same",
    )
    answer.add_argument(
        "--draft-store", type=known_file, metavar="FILE", help="for aded and auto: see drafts build"
    )
    add_output(line)
    add_running(line)
    line.set_defaults(run=ask)


def ask(arguments: argparse.Namespace) -> None:
    """Retrieve, answer, show."""
    method = read_method(arguments)
    readings = stored(arguments, method)
    passages = retrieve(arguments)
    engine = _load(arguments, method, readings)
    tell(engine.compressor, passages)
    options: dict[str, Any] = {
        "method": method,
        "generation": Generation(
            max_new_tokens=arguments.max_new_tokens, drafting=arguments.drafting
        ),
        "system": arguments.system or None,
    }
    output = Output()
    if output.is_terminal and not arguments.json:
        answer = _stream(engine, arguments.question, passages, options)
    else:
        answer = engine.answer(arguments.question, passages, **options)
    write_html(arguments, answer, answer.context, passages)
    if arguments.json:
        print_json(answer_json(arguments.question, passages, answer))
        return
    if not output.is_terminal:
        output.print(answer.text, soft_wrap=True)
    output.print()
    show_sources(output, passages, answer.context, verbose=arguments.verbose)
    show_costs(output, answer, method)


def _load(arguments: argparse.Namespace, method: Method | None, readings: dict[str, Any]) -> Engine:
    from ...core.engine import Engine
    from ...core.generation.speculative.drafters.store import TrigramStore
    from ...core.speckv.scorers import needs_draft

    store = arguments.draft_store
    drafted = needs_draft(method) or arguments.drafting in _DRAFT_MODEL
    choose_models(arguments, "target", *(["draft"] if drafted else []))
    draft = {f"draft_{name}": value for name, value in loading(arguments, "draft_").items()}
    return Engine.load(
        arguments.target,
        arguments.draft if drafted else None,
        quantization=quantization(arguments),
        **loading(arguments),
        **draft,
        device=arguments.device,
        progress=progress(arguments),
        draft_store=TrigramStore.load(store) if store else None,
        **readings,
    )


def _stream(
    engine: Engine, question: str, passages: Sequence[Passage], options: dict[str, Any]
) -> Answer:
    """Print the answer as it comes; the last chunk carries the whole of it."""
    answer: Answer | None = None
    for chunk in engine.stream(question, passages, **options):
        print(printable(chunk.text), end="", flush=True)
        answer = chunk.answer
    print()
    assert answer is not None
    return answer

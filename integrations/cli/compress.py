"""`draftsieve compress`: the shortened text on stdout, statistics on stderr."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from ...core.config import SpecPC
from ...core.prompt.messages import DEFAULT_SYSTEM
from .arguments import (
    add_models,
    add_running,
    count,
    file_or_stdin,
    loading,
    progress,
    quantization,
    question,
)
from .choice import choose_models
from .method import add_method, read_method
from .output import add_output, print_json, write_html
from .render import change, context_json, printable, sources_json, stages, why_whole
from .sources import read_file, reassemble, retrieve
from .stored import add_store, stored, tell

_EPILOG = """\
examples:
  draftsieve compress "What changed in May?" --file notes.md --capacity 512 > shorter.txt
  draftsieve compress "What changed in May?" --docs notes/ --ratio 0.2 --json
  draftsieve compress "What changed in May?" --docs notes/ --embedder ./all-MiniLM-L6-v2
  cat notes.md | draftsieve compress "What changed in May?" --file - --set unit=word
"""


def add_compress(commands: Any) -> None:
    """Add the command to the parser's commands."""
    line = commands.add_parser(
        "compress",
        help="shorten retrieved passages or a file, without a target",
        usage="%(prog)s QUESTION (--docs FOLDER | --file FILE) [options]",
        description="Print the passages that a question needs, shortened by the draft model.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    line.add_argument("question", type=question, metavar="QUESTION", help="what it is read for")
    source = line.add_mutually_exclusive_group(required=True)
    source.add_argument("--docs", type=Path, metavar="FOLDER", help="retrieve from these with BM25")
    source.add_argument(
        "--file", type=file_or_stdin, metavar="FILE", help='one text, read whole; "-" for stdin'
    )
    line.add_argument(
        "--top-k",
        type=count,
        default=5,
        metavar="K",
        help="passages of --docs (default: %(default)s)",
    )
    line.add_argument(
        "--system",
        default=DEFAULT_SYSTEM,
        metavar="TEXT",
        help='system text of the prompt that the draft reads, "" for none (default: "%(default)s")',
    )
    add_method(line, prompt_only=True)
    add_store(line)
    add_models(line, target=False, draft=True, bits="the draft")
    add_output(line)
    add_running(line)
    line.set_defaults(run=compress)


def compress(arguments: argparse.Namespace) -> None:
    """Read, shorten, print."""
    method = read_method(arguments)
    assert isinstance(method, SpecPC)  # this command offers no other
    readings, whole = stored(arguments, method), ""
    if arguments.docs is not None:
        passages = retrieve(arguments)
    else:
        whole, passages = read_file(arguments.file)
    from ...core.compressor import Compressor

    choose_models(arguments, "draft")
    compressor = Compressor.load(
        arguments.draft,
        **loading(arguments),
        quantization=quantization(arguments),
        device=arguments.device,
        progress=progress(arguments),
        **readings,
    )
    tell(compressor, passages)
    context = compressor.compress(
        arguments.question, passages, method, system=arguments.system or None
    )
    write_html(arguments, None, context, passages)
    if arguments.json:
        sources = sources_json(passages, context)
        result = {"question": arguments.question, "text": context.text}
        print_json(result | {"compression": context_json(context), "sources": sources})
        return
    is_file = arguments.docs is None  # a file comes back as a file, without passage numbers
    text = reassemble(whole, passages, context) if is_file else context.text
    print(printable(text) if sys.stdout.isatty() else text)
    stats = context.stats
    tokens = change(stats.passage_tokens, stats.compressed_passage_tokens)
    print(f"passage tokens: {tokens}; seconds: {stages(stats.seconds)}", file=sys.stderr)
    for reason in (why_whole(method, context), stats.note):
        if reason is not None:
            print(reason, file=sys.stderr)

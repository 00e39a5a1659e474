"""The options of the command `draftsieve`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from ... import __version__
from .calibrate import add_calibrate
from .drafts import add_drafts
from .eval import add_eval
from .models import add_models

Command = Callable[[argparse.Namespace], None]

_EPILOG = """\
examples:
  draftsieve ask "Who leads the archive?" --docs examples/data/handbook
  draftsieve ask "Who leads the archive?" --docs notes/ --ratio 0.3 --unit sentence --html kept.html
  draftsieve compress "What changed in May?" --file notes.md --capacity 512 > shorter.txt
  cat notes.md | draftsieve compress "What changed in May?" --file - --json
  draftsieve models get smollm2-135m
  draftsieve drafts build --docs notes/ --out notes.safetensors
  draftsieve eval --length 1000 --budget 0.125 --items 200 --out results/
  draftsieve calibrate --draft models/my-draft

exit status: 0 success, 1 error, 2 wrong usage, 130 interrupted
"""


def build_parser(ask: Command, compress: Command) -> argparse.ArgumentParser:
    """The parser; `arguments.run` is the command that was chosen."""
    parser = argparse.ArgumentParser(
        prog="draftsieve",
        description="Ask documents a question: a small draft model reads everything, "
        "the target model reads what matters.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"draftsieve {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    line = commands.add_parser(
        "ask",
        help="answer a question from a folder of documents",
        description="Retrieve passages with BM25, answer, and show what was kept of each source.",
    )
    line.add_argument("question", metavar="QUESTION", help="what to ask")
    line.add_argument("--docs", type=Path, required=True, metavar="FOLDER", help="documents")
    line.add_argument(
        "--method",
        choices=("specpc", "speckv", "speckv-pc", "none"),
        default="specpc",
        help="compress the prompt (specpc, the default), evict from the target's cache (speckv), "
        "both, or nothing",
    )
    line.add_argument(
        "--target",
        default="builtin:target",
        help="hub id, folder or builtin (default: %(default)s)",
    )
    line.add_argument(
        "--max-new-tokens", type=_positive, default=64, metavar="N", help="(default: %(default)s)"
    )
    line.add_argument(
        "--drafting",
        choices=("auto", "lookup", "aded", "lookahead", "model", "graph"),
        help="who guesses ahead, so that decoding takes fewer passes; the answer stays the same",
    )
    line.add_argument(
        "--draft-store", type=Path, metavar="FILE", help="for aded and auto: see drafts build"
    )
    _add_common(line, quantised="target")
    line.set_defaults(run=ask)

    line = commands.add_parser(
        "compress",
        help="shorten retrieved passages or a file, without a target",
        description="Print the passages that a question needs, shortened by the draft model.",
    )
    line.add_argument("question", metavar="QUESTION", help="what the text is read for")
    source = line.add_mutually_exclusive_group(required=True)
    source.add_argument("--docs", type=Path, metavar="FOLDER", help="retrieve from these with BM25")
    source.add_argument("--file", metavar="FILE", help='one text, read whole; "-" for stdin')
    _add_common(line, quantised="draft")
    line.set_defaults(run=compress)
    add_models(commands)
    add_drafts(commands)
    add_eval(commands)
    add_calibrate(commands)
    return parser


def _add_common(line: argparse.ArgumentParser, *, quantised: str) -> None:
    """Options of both commands."""
    line.add_argument(
        "--draft", default="builtin:draft", help="hub id, folder or builtin (default: %(default)s)"
    )
    budget = line.add_mutually_exclusive_group()
    budget.add_argument(
        "--capacity",
        type=_positive,
        metavar="N",
        help="whole prompt in draft tokens (default: 1024), or cache entries (default: 512)",
    )
    budget.add_argument(
        "--ratio", type=_share, metavar="R", help="share of the passage tokens to keep, in (0, 1]"
    )
    line.add_argument(
        "--unit",
        choices=("token", "word", "sentence", "passage"),
        default="sentence",
        help="what is kept or dropped as a whole (default: sentence; the paper keeps tokens)",
    )
    line.add_argument(
        "--top-k", type=_positive, default=5, metavar="K", help="passages (default: %(default)s)"
    )
    line.add_argument("--bits", type=int, choices=(4, 8), help=f"quantise the {quantised} model")
    line.add_argument("--device", default="auto", help="auto, cpu, cuda, ... (default: auto)")
    line.add_argument("--json", action="store_true", help="print one JSON object")
    line.add_argument("--html", type=Path, metavar="FILE", help="write the kept text as a web page")
    line.add_argument("--no-progress", action="store_true", help="no progress bars on stderr")
    line.add_argument("--debug", action="store_true", help="show the traceback of an error")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _share(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"must lie in (0, 1], got {text}")
    return value

"""The parser of the command `draftsieve`."""

from __future__ import annotations

import argparse

from ... import __version__
from .ask import add_ask
from .calibrate import add_calibrate
from .compress import add_compress
from .data import add_data
from .drafts import add_drafts
from .eval import add_eval
from .index import add_index
from .models import add_models
from .serve import add_serve

_EPILOG = """\
`draftsieve COMMAND --help` has the options and examples.
exit status: 0 success, 1 error, 2 wrong usage, 130 interrupted
"""


def build_parser() -> argparse.ArgumentParser:
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
    first, rest = (add_ask, add_compress, add_index, add_serve), (add_models, add_drafts, add_data)
    for add in (*first, *rest, add_eval, add_calibrate):
        add(commands)
    return parser

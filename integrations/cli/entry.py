"""Running a command: errors in one line, and quiet ends.

What needs torch is imported where it is used, so that `--help` and wrong usage answer at once.
"""

from __future__ import annotations

import io
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from ...core.errors import ConfigError, DraftSieveError
from .parser import build_parser

BROKEN_PIPE = 141  # 128 + SIGPIPE, as a shell reports it


def run(argv: Sequence[str] | None) -> int:
    """Run a command; returns the exit status."""
    arguments = build_parser().parse_args(argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # an ASCII terminal shows \u2026, not a traceback
            stream.reconfigure(errors="backslashreplace")
    try:
        with _told(logging.INFO if arguments.verbose else logging.WARNING):
            arguments.run(arguments)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of our output has left: nobody to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except (DraftSieveError, OSError) as error:
        if arguments.debug:
            raise
        print(f"draftsieve: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    return 0


class _Stderr(logging.Handler):
    """One line a record."""

    def emit(self, record: logging.LogRecord) -> None:
        print(f"draftsieve: {record.getMessage()}", file=sys.stderr)


@contextmanager
def _told(level: int) -> Iterator[None]:
    """Show this package's log from a level on; what others warn of stays unseen."""
    ours, pypdf = logging.getLogger("draftsieve"), logging.getLogger("pypdf")
    handler, nowhere, before = _Stderr(), logging.NullHandler(), ours.level
    ours.addHandler(handler)
    ours.setLevel(level)
    pypdf.addHandler(nowhere)
    try:
        yield
    finally:
        ours.removeHandler(handler)
        ours.setLevel(before)
        pypdf.removeHandler(nowhere)

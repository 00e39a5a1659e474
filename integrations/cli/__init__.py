"""The command `draftsieve`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

INTERRUPTED = 130  # 128 + SIGINT, as a shell reports it


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: The arguments; None for those of the process.

    Returns:
        The exit status: 0 success, 1 error, 2 wrong usage, 130 interrupted.
    """
    try:
        from .entry import run  # in here, so that an interrupt while it loads ends quietly too

        return run(argv)
    except KeyboardInterrupt:
        print("draftsieve: interrupted", file=sys.stderr)
        return INTERRUPTED

"""`draftsieve data`: published sets of questions, for `draftsieve eval --suite`."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from .arguments import add_running


def add_data(commands: Any) -> None:
    """Add the command to the parser's subcommands."""
    group = commands.add_parser(
        "data",
        help="fetch published questions to measure with",
        description="Data sets of others, downloaded from their publishers and checked.",
    ).add_subparsers(title="commands", metavar="COMMAND", required=True)
    line = group.add_parser("list", help="what can be fetched, and under which licence")
    add_running(line)
    line.set_defaults(run=show)
    line = group.add_parser("get", help="download sets", description="What is there is kept.")
    line.add_argument("names", nargs="+", metavar="NAME", help="as `draftsieve data list` shows it")
    line.add_argument(
        "--data",
        type=Path,
        default=Path(os.environ.get("DRAFTSIEVE_DATA") or "data"),
        metavar="FOLDER",
        help="where they are put (default: DRAFTSIEVE_DATA, or data)",
    )
    add_running(line)
    line.set_defaults(run=get)


def show(arguments: argparse.Namespace) -> None:
    """One line a set: name, file, licence, publisher."""
    from ...core.evaluation.realtext.sets import SETS

    for name, found in SETS.items():
        print(f"{name}  {found.file}  {found.licence}  {found.source}")


def get(arguments: argparse.Namespace) -> None:
    """Fetch them, and say where they are."""
    from ...core.evaluation.realtext.sets import fetch_set, find_set

    wanted = {name: find_set(name) for name in arguments.names}
    for name, found in wanted.items():
        print(f"{name} ({found.licence}, {found.source}) is in {fetch_set(name, arguments.data)}")

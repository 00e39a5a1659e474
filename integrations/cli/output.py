"""Where results go: stdout, one JSON object, or a web page."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console

from .arguments import new_file

if TYPE_CHECKING:
    from ...core.types import Answer, CompressedContext, Passage


class Output(Console):
    """Results on stdout: no markup is read from texts, and a closed pipe is `run`'s affair."""

    def __init__(self) -> None:
        super().__init__(markup=False, highlight=False, emoji=False)

    def on_broken_pipe(self) -> None:
        """Let `run` end the command."""
        raise BrokenPipeError


def add_output(line: argparse.ArgumentParser) -> None:
    """Add the forms of results."""
    group = line.add_argument_group("output")
    group.add_argument("--json", action="store_true", help="print one JSON object")
    group.add_argument(
        "--html", type=new_file(), metavar="FILE", help="write the kept text as a web page"
    )


def write_html(
    arguments: argparse.Namespace,
    answer: Answer | None,
    context: CompressedContext | None,
    passages: Sequence[Passage],
) -> None:
    """Write the page of `--html`, if there is to be one."""
    if arguments.html is None:
        return
    from ..html_view import render_html

    page = render_html(arguments.question, answer, context, passages)
    arguments.html.write_text(page, encoding="utf-8")


def print_json(value: dict[str, Any]) -> None:
    """Print one object."""
    print(json.dumps(value, ensure_ascii=False, indent=2, default=str))

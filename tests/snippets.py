"""Runs printed examples in this process and compares what they print with the comments behind.

`print(answer.text)  # -> AK-731` promises that the line prints exactly that; `...` is anything, and
white space is like white space. A command in a `console` block, behind "$ ", is run, too, and what
stands below it is promised in the same way.
"""

from __future__ import annotations

import ast
import io
import re
import shlex
import sys
from collections import defaultdict
from contextlib import chdir, redirect_stdout
from pathlib import Path

from draftsieve.integrations.cli import main

ROOT = Path(__file__).resolve().parents[1]
_NAME = "<example>"
_PROMISE = re.compile(r"#\s*->\s?(.*)$")


class _Prints(io.TextIOBase):
    """What each line of the example printed."""

    def __init__(self) -> None:
        self.lines: dict[int, str] = defaultdict(str)

    def write(self, text: str) -> int:
        caller = sys._getframe(1)
        if caller.f_code.co_filename == _NAME:
            self.lines[caller.f_lineno] += text
        return len(text)


def blocks(page: Path) -> list[str]:
    """The Python blocks of a page."""
    return _blocks(page, "python")


def promises(code: str) -> dict[int, str | None]:
    """First line of each print -> what the comment behind it promises, if there is one."""
    lines, found = code.splitlines(), {}
    for node in ast.walk(ast.parse(code)):
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id == "print"
        ):
            said = _PROMISE.search(lines[(node.end_lineno or node.lineno) - 1])
            found[node.lineno] = said[1] if said else None
    return found


def run(code: str, folder: Path) -> None:
    """Run an example in `folder`, with a namespace of its own.

    Raises:
        AssertionError: a line printed something else than its comment promises.
    """
    prints = _Prints()
    with chdir(folder), redirect_stdout(prints):
        exec(compile(code, _NAME, "exec", dont_inherit=True), {"__name__": "__main__"})  # noqa: S102
    for line, promise in promises(code).items():
        if promise is not None:
            _compare(f"line {line}", prints.lines[line], promise)


def commands(page: Path) -> list[tuple[str, str]]:
    """The commands of a page's console blocks, and what they print."""
    found = []
    for block in _blocks(page, "console"):
        for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            command, _, printed = part.partition("\n")
            found.append((command, printed))
    return found


def run_command(command: str, promise: str) -> None:
    """Run a command of draftsieve in this process, in the repository's root.

    Raises:
        AssertionError: It failed, or printed something else.
    """
    name, *arguments = shlex.split(command)
    assert name == "draftsieve", command
    printed = io.StringIO()
    with chdir(ROOT), redirect_stdout(printed):
        assert main(arguments) == 0, command
    _compare(command, printed.getvalue(), promise)


def _compare(what: str, printed: str, promise: str) -> None:
    """Both as words, with "..." for any text."""
    words, expected = " ".join(printed.split()), " ".join(promise.split())
    pattern = ".*".join(map(re.escape, expected.split("...")))
    assert re.fullmatch(pattern, words), f"{what} printed {words!r}, but promises {expected!r}"


def _blocks(page: Path, language: str) -> list[str]:
    text = page.read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)

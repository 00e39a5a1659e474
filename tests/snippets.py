"""Runs printed examples in this process and compares what they print with the comments behind.

`print(answer.text)  # -> AK-731` promises that the line prints exactly that; `...` is anything.
"""

from __future__ import annotations

import ast
import io
import re
import sys
from collections import defaultdict
from contextlib import chdir, redirect_stdout
from pathlib import Path

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
    return re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)


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
        exec(compile(code, _NAME, "exec"), {"__name__": "__main__"})  # noqa: S102
    for line, promise in promises(code).items():
        printed = prints.lines[line].strip()
        if promise is not None:
            pattern = ".*".join(map(re.escape, promise.strip().split("...")))
            assert re.fullmatch(pattern, printed, flags=re.DOTALL), (
                f"line {line} printed {printed!r}, but its comment promises {promise!r}"
            )

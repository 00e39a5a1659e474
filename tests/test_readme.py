"""Every Python block of the README and the guides runs as written and prints what it promises."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from .snippets import ROOT, blocks, commands, promises, run, run_command

README = ROOT / "README.md"
BLOCKS = blocks(README)
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
GUIDES = [page for page in PAGES[1:] if blocks(page)]
COMMANDS = [found for page in PAGES for found in commands(page)]
REAL = "smollm2-135m"


def real(text: str) -> list[pytest.MarkDecorator]:
    """The mark of what needs the real model, as a command does that names no other."""
    unnamed = text.startswith("draftsieve ask") and "--target" not in text
    return [pytest.mark.real] if REAL in text or unnamed else []


@pytest.fixture(autouse=True)
def _fetched(request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("real"):
        request.getfixturevalue("smollm2")


def test_there_is_something_to_run() -> None:
    assert len(BLOCKS) == 4  # core, LangChain, LlamaIndex, a store
    assert "quickstart.md" in [page.name for page in GUIDES]
    assert len(COMMANDS) >= 2


@pytest.mark.parametrize("code", [pytest.param(code, marks=real(code)) for code in BLOCKS])
def test_readme_block(code: str, tmp_path: Path) -> None:
    run(code, tmp_path)


@pytest.mark.real
def test_the_first_block_runs_in_a_process_of_its_own(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", BLOCKS[0]],
        capture_output=True, text=True, cwd=tmp_path, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("The lighthouse at Kestrel Point was built in 1884")


@pytest.mark.parametrize(
    "page",
    [pytest.param(page, marks=real("\n".join(blocks(page))), id=page.name) for page in GUIDES],
)
def test_guide(page: Path, tmp_path: Path) -> None:
    """The blocks of a page go on from one another."""
    run("\n".join(blocks(page)), tmp_path)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_print_says_what_it_prints(page: Path) -> None:
    for code in blocks(page):
        assert None not in promises(code).values(), code


@pytest.mark.parametrize(
    ("command", "promise"), [pytest.param(*found, marks=real(found[0])) for found in COMMANDS]
)
def test_command(command: str, promise: str) -> None:
    run_command(command, promise)


@pytest.mark.parametrize(
    ("code", "promise"),
    [
        ("print(1 + 1)  # -> 3", "3"),
        ("for n in range(2):\n    print(n)  # -> 0", "0"),
        ("if False:\n    print('never')  # -> never", "never"),
        ("print(\n    'a',\n    'b',\n)  # -> a c...", "a c..."),
    ],
)
def test_a_broken_promise_is_an_error(code: str, promise: str, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=re.escape(f"promises {promise!r}")):
        run(code, tmp_path)
    kept = code.replace("3", "2").replace("range(2)", "range(1)").replace("False", "True")
    run(kept.replace("a c", "a b"), tmp_path)


def test_the_tests_named_by_the_comparison_exist() -> None:
    table = (ROOT / "docs" / "comparison.md").read_text(encoding="utf-8")
    named = re.findall(r"`(test_\w+\.py)(?:::(test_\w+))?`", table)
    assert len(named) >= 15
    for file, test in named:
        source = (ROOT / "tests" / file).read_text(encoding="utf-8")
        assert not test or f"def {test}(" in source, f"{file} has no {test}"

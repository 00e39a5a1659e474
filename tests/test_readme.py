"""Every Python block of the README and the guides, and every example, runs as it is written."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def _blocks(path: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", path.read_text(), flags=re.DOTALL)


BLOCKS = _blocks(ROOT / "README.md")
GUIDES = sorted(path.name for path in (ROOT / "docs").glob("*.md") if _blocks(path))
EXAMPLES = sorted(path.name for path in (ROOT / "examples").glob("*_rag.py"))


def _run(arguments: list[str], folder: Path) -> str:
    run = subprocess.run(
        [sys.executable, "-W", "error", *arguments],
        capture_output=True, text=True, cwd=folder, timeout=300, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_there_is_something_to_run() -> None:
    assert len(BLOCKS) >= 3
    assert len(EXAMPLES) >= 2
    assert "quickstart.md" in GUIDES


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_readme_block(number: int, tmp_path: Path) -> None:
    _run(["-c", BLOCKS[number]], tmp_path)


@pytest.mark.parametrize("name", GUIDES)
def test_guide(name: str, tmp_path: Path) -> None:
    assert _run(["-c", "\n".join(_blocks(ROOT / "docs" / name))], tmp_path).strip()


def test_the_tests_named_by_the_comparison_exist() -> None:
    table = (ROOT / "docs" / "comparison.md").read_text()
    named = re.findall(r"`(test_\w+\.py)(?:::(test_\w+))?`", table)
    assert len(named) >= 15
    for file, test in named:
        source = (ROOT / "tests" / file).read_text()
        assert f"def {test}(" in source or not test, f"{file} has no {test}"


@pytest.mark.parametrize("name", EXAMPLES)
def test_example(name: str) -> None:
    assert _run([f"examples/{name}"], ROOT).strip()

"""AGENTS.md and the architecture name files and code that exist."""

from __future__ import annotations

import ast
import builtins
import re
from functools import cache
from pathlib import Path
from pkgutil import resolve_name
from runpy import run_path
from types import ModuleType

import pytest

import draftsieve

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("AGENTS.md", "docs/architecture.md")
FOLDERS = ("draftsieve", "core", "retrievers", "integrations", "tests", "examples", "docs")


@cache
def files() -> frozenset[str]:
    """Files and folders of the repository, each with all endings of its path."""
    known = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*")]
    known += ROOT.glob("*.*")
    found = set()
    for path in known:
        parts = path.relative_to(ROOT).parts
        found |= {"/".join(parts[start:]) for start in range(len(parts))}
    return frozenset(found | set(FOLDERS))


@cache
def names() -> frozenset[str]:
    """What the sources define or import: modules, classes, functions, arguments, values."""
    found = set(dir(builtins))
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*.py"):
            found |= {path.stem, path.parent.name}
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                match node:
                    case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                        found.add(node.name)
                    case ast.arg():
                        found.add(node.arg)
                    case ast.alias():
                        found |= set((node.asname or node.name).split("."))
                    case ast.Name(ctx=ast.Store()) | ast.AnnAssign(target=ast.Name()):
                        target = node if isinstance(node, ast.Name) else node.target
                        found.add(target.id)  # type: ignore[union-attr]
                    case ast.Attribute(ctx=ast.Store()):
                        found.add(node.attr)
    return frozenset(found)


def missing(text: str) -> list[str]:
    """What a page names in backticks or draws in a block, and the repository does not have."""
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    drawn = "".join(re.findall(r"```.*?```", text, flags=re.DOTALL))
    lost = [name for name in re.findall(r"[\w/.]+\.py\b", drawn) if name not in files()]
    for code in re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL)):
        if code.startswith("make "):
            lost += [word for word in code.split()[1:] if word not in targets]
        elif code.startswith("python "):
            lost += [word for word in code.split()[1:2] if word not in files()]
        elif re.fullmatch(r"[\w.*-]*(/[\w.*-]*)+|[\w.-]+\.(py|md|txt|toml|json)", code):
            if code.strip("/") not in files():
                lost.append(code)
        else:
            words = re.findall(r"[A-Za-z_]\w*", re.sub(r"\"[^\"]*\"|'[^']*'", "", code))
            lost += [word for word in words if word not in names()]
    return lost


@pytest.mark.parametrize("page", PAGES)
def test_a_page_names_what_exists(page: str) -> None:
    assert missing((ROOT / page).read_text(encoding="utf-8")) == []


def test_names_that_do_not_exist_are_found() -> None:
    said = (
        "`core/nowhere.py`, `Compressor.squeeze`, `make tests`, `engine.py`, `Engine.answer`, "
        '`core/`, `make lint test`, `drafting="auto"`'
    )
    assert missing(said) == ["core/nowhere.py", "squeeze", "tests"]


def test_every_room_is_on_the_map() -> None:
    drawn = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").split("## Rooms")[1]
    rooms = {path.name for path in (ROOT / "core").iterdir() if path.name[0] not in "_."}
    assert {room for room in rooms if not re.search(rf"\b{re.escape(room)}", drawn)} == set()


def test_the_reference_describes_what_exists_and_what_is_exported() -> None:
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    described = re.findall(r"^::: ([\w.]+)$", page, flags=re.MULTILINE)
    assert len(described) >= 20
    found = {path: resolve_name(path) for path in described}
    listed = set(re.findall(r"\w+", " ".join(re.findall(r"members: \[(.*?)\]", page))))
    modules = [vars(thing) for thing in found.values() if isinstance(thing, ModuleType)]
    shown = {path.rpartition(".")[2] for path in described} | listed
    shown |= {name for module in modules for name in module}
    assert set(draftsieve.__all__) - shown == {"__version__"}


def test_a_request_goes_through_no_more_files_than_the_architecture_says() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    measured = run_path(str(ROOT / "examples" / "benchmarks" / "request_path.py"))["measured"]()
    for request, counts in measured.items():
        (said,) = re.findall(rf"^\| {request} \| (\d+) \|", page, flags=re.MULTILINE)
        assert len(counts) <= int(said), request
    assert len(measured) == 2

"""Examples are told apart by what they show, run offline, and say how to use other models."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from pathlib import Path
from runpy import run_path

import pytest

from .adapters_fixtures import EXAMPLES

ROOT = EXAMPLES.parent
Benchmark = Callable[..., str]
NAMES = sorted(path.name for path in EXAMPLES.glob("*.py") if path.name != "demo.py")


@pytest.mark.parametrize("name", NAMES)
def test_an_example_says_which_lines_to_change(name: str) -> None:
    source = (EXAMPLES / name).read_text(encoding="utf-8")
    said = ast.get_docstring(ast.parse(source))
    assert said is not None
    assert re.search(r"models?\s+of\s+the\s+hub\s+change", said)
    for constant in re.findall(r"\b(TARGET|DRAFT)\b", said):
        assert re.search(rf"^{constant} = .*  # .*hub", source, flags=re.MULTILINE)


@pytest.mark.parametrize("name", NAMES)
def test_an_example_is_run_by_a_test(name: str) -> None:
    tests = "".join(path.read_text(encoding="utf-8") for path in ROOT.glob("tests/test_*.py"))
    assert f'"{name}"' in tests


def test_the_retriever_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    found = run_path(str(EXAMPLES / "langchain_retriever.py"))
    said = capsys.readouterr().out
    for question in found["QUESTIONS"]:
        assert question in said
    sizes = re.findall(r"(\d+) of (\d+) tokens kept", said)
    assert len(sizes) >= 4
    assert all(int(kept) <= int(whole) for kept, whole in sizes)
    assert "Haizek Pimemont" in said


def test_the_indexing_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    run_path(str(EXAMPLES / "langchain_index.py"))
    first, second, *asked = capsys.readouterr().out.splitlines()
    assert first.startswith("16 added, 0 deleted, 0 readings forgotten")
    assert second.startswith("1 added, 1 deleted, 1 readings forgotten")
    assert [line.split(":")[0] for line in asked] == ["read now"] * 2 + ["from the store"] * 2


def test_the_embeddings_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    run_path(str(EXAMPLES / "langchain_embeddings.py"))
    first, second = capsys.readouterr().out.split("When did")
    assert "Badge AK-731 was issued to Mira Tolen." in first
    assert "Project Halvora began on 3 May 2041." in second
    sizes = re.findall(r"(\d+) of (\d+) tokens kept", first + second)
    assert len(sizes) == 4
    assert sum(int(kept) for kept, _ in sizes) < 0.6 * sum(int(whole) for _, whole in sizes)


def test_the_chat_session_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    found = run_path(str(EXAMPLES / "chat_session.py"))
    found["chat"](found["QUESTIONS"])
    head, *rest = capsys.readouterr().out.strip().split("\n\n> ")
    assert "tokens read once" in head
    assert [part.splitlines()[0] for part in rest] == found["QUESTIONS"]
    for part in rest:
        kept, whole = map(int, re.findall(r"(\d+) of (\d+) cache entries", part)[0])
        assert kept < whole / 2


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Benchmark:
    """Runs a benchmark that has little to do, and returns what it prints."""

    def run(name: str, *options: str) -> str:
        folder = EXAMPLES / "benchmarks"
        monkeypatch.syspath_prepend(folder)
        assert not run_path(str(folder / f"{name}.py"))["main"](list(options))
        return capsys.readouterr().out

    return run


def test_figures_of_safety_are_printed(small: Benchmark) -> None:
    said = small("safety", "--requests", "4", "--passages", "8", "--word", "3000")
    assert "4 of 4 requests at once" in said
    assert "as before after 21; 0 KV caches" in said
    assert "a word of 3,000 characters" in said
    assert "0 passages with wrong spans" in said
    assert "8 hostile passages: 0 control tokens, 0 crashes, 0 passages" in said


def test_divergences_of_evicted_caches_are_printed(small: Benchmark, tmp_path: Path) -> None:
    pair = ["--target", "builtin:target", "--draft", "builtin:draft", "--draft-as-it-is"]
    size = ["--suite", "python", "--items", "1", "--length", "150", "--max-new-tokens", "3"]
    said = small("cache_divergence", *pair, *size, "--budget", "0.5", "--out", str(tmp_path))
    assert "times snapkv" in said
    for name in ("speckv", "speckv, bundled draft", "speckv-2026-12", "kvzip", "oracle"):
        assert f"| {name} | 0.5 |" in said
    again = small("cache_divergence", *pair, *size, "--budget", "0.5", "--out", str(tmp_path))
    assert again == said


def test_figures_of_the_event_loop_are_printed(small: Benchmark) -> None:
    said = small("event_loop", "--repeats", "1", "--tokens", "300", "--new-tokens", "2")
    rows = [line.split("|")[1:3] for line in said.splitlines() if line.startswith(("| L", "| n"))]
    assert len(rows) >= 18
    assert all(float(seconds) > 0 for _, seconds in rows)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_what_agents_do_is_counted(small: Benchmark) -> None:
    said = small("agents", "--target", "builtin:target", "--questions", "1")
    rows = [line.split("|")[2:7] for line in said.splitlines() if line.startswith("| `")]
    assert len(rows) == 6
    for way, called, right, whole, _ in rows:
        assert int(whole) <= int(right) <= int(called) <= 1
        if "listed" in way:  # the grammar leaves no other calls
            assert int(called) == 1


@pytest.mark.parametrize("pair", ["bundled", "random"])
def test_figures_of_concurrent_streams_are_printed(small: Benchmark, pair: str) -> None:
    few = ("--requests", "2", "--tokens", "120", "--new-tokens", "4", "--repeats", "1")
    said = small("concurrent_streams", *few, *(["--random"] if pair == "random" else []))
    cells = [line.split("|")[2:7] for line in said.splitlines() if line.startswith("| `a")]
    assert len(cells) == 3
    assert all(float(seconds) > 0 for seconds, *_ in cells)


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("kv_memory", ["| 256 | 64 | 1 ", "| 256 | 64 | 2 "]),
        ("serving", ["| bundled ", "| random "]),
        ("session", ["session, int8, SpecKV |", "session, file, SpecKV |"]),
        ("sparse_prefill", ["| random | 512 ", "| builtin | 512 "]),
        ("kv_budgets", ["| 512 | N/8 | both ", "both: decoding takes "]),
    ],
)
def test_a_benchmark_of_the_kv_cache_prints_its_rows(
    small: Benchmark, name: str, rows: list[str]
) -> None:
    said = small(name, "--quick")
    for row in rows:
        assert row in said


@pytest.mark.parametrize("name", ["langchain_rag.py", "llama_index_rag.py"])
def test_a_rag_example_answers(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    run_path(str(EXAMPLES / name), run_name="__main__")
    answer, *kept = capsys.readouterr().out.splitlines()
    assert answer == "AK-731"
    assert "'Badge AK-731 was issued to Mira Tolen. " in kept[0]
    assert len(kept) == 3

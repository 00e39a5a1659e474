"""The public face: names, light imports, what an installed package carries."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

import draftsieve
from draftsieve.core import errors

ROOT = Path(__file__).resolve().parents[1]


def test_public_names_are_pinned() -> None:
    assert draftsieve.__all__ == [
        "Answer",
        "BudgetError",
        "Chunk",
        "CompressedContext",
        "Compressor",
        "ConfigError",
        "DraftSieveError",
        "Engine",
        "Generation",
        "Grammar",
        "GrammarError",
        "MissingExtraError",
        "ModelError",
        "ModelNotFoundError",
        "OutOfMemoryError",
        "Passage",
        "PassageStore",
        "Prompt",
        "PromptError",
        "Quantization",
        "RequestTimeoutError",
        "Session",
        "Span",
        "SpecKV",
        "SpecKVPC",
        "SpecPC",
        "StoreError",
        "ToolCall",
        "Trace",
        "TrigramStore",
        "__version__",
    ]
    for name in draftsieve.__all__:
        assert getattr(draftsieve, name) is not None
    every_error = {name for name, kind in vars(errors).items() if isinstance(kind, type)}
    assert every_error <= {*draftsieve.__all__}
    with pytest.raises(AttributeError, match="nothing_like_it"):
        _ = draftsieve.nothing_like_it
    assert version("draftsieve") == draftsieve.__version__


def _imported_by(code: str) -> set[str]:
    show = f"{code}\nimport sys; print('\\n'.join(sys.modules))"
    run = subprocess.run(
        [sys.executable, "-c", show], capture_output=True, text=True, check=True, timeout=300
    )
    return set(run.stdout.split())


def test_importing_the_package_is_light() -> None:
    assert not {"torch", "transformers"} & _imported_by("import draftsieve")


def test_retrieving_needs_no_torch() -> None:
    assert "torch" not in _imported_by("import draftsieve.retrievers, draftsieve.integrations.cli")


def test_the_core_imports_no_framework() -> None:
    loaded = _imported_by("import draftsieve.core.engine")
    assert "torch" in loaded
    assert not {"langchain_core", "llama_index", "bm25s", "fastapi", "ray"} & loaded


def test_the_draft_alone_needs_nothing_of_the_target() -> None:
    loaded = _imported_by("from draftsieve import Compressor")
    rooms = ("draftsieve.core.generation", "draftsieve.core.speckv", "draftsieve.core.engine")
    assert "draftsieve.core.specpc.pipeline" in loaded
    assert not [name for name in loaded if name.startswith(rooms)]


def test_a_wheel_carries_code_types_and_the_bundled_pair(tmp_path: Path) -> None:
    """Built from a copy without what earlier builds left behind, and without a network."""
    copy, parts = tmp_path / "copy", ("draftsieve", "core", "integrations", "retrievers")
    for part in parts:
        shutil.copytree(ROOT / part, copy / part, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    shutil.copytree(ROOT / "examples/data", copy / "examples/data")
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path]
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", *options, copy],
        check=True, timeout=600, capture_output=True,
    )  # fmt: skip
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(tmp_path / "installed")
    for part in parts:
        for path in (ROOT / part).rglob("*.py"):
            place = path.relative_to(ROOT).as_posix()
            assert (place if part == "draftsieve" else f"draftsieve/{place}") in names, path
    for name in (
        "draftsieve/py.typed",
        "draftsieve/core/engine.py",
        "draftsieve/core/evaluation/survival.py",
        "draftsieve/core/evaluation/data/python_reference.jsonl",
        "draftsieve/integrations/langchain/__init__.py",
        "draftsieve/integrations/cli/entry.py",
        "draftsieve/integrations/html_view.jinja",
        "draftsieve/__main__.py",
        "draftsieve/retrievers/bm25.py",
        "draftsieve/core/builtin/MODEL_CARD.md",
        "draftsieve/core/builtin/target/model.safetensors",
        "draftsieve/core/builtin/draft/tokenizer.json",
    ):
        assert name in names, name
    assert wheel.stat().st_size < 40_000_000
    assert not [name for name in names if name.startswith(("tests/", "examples/"))]
    assert not [name for name in names if "handbook" in name]
    code = (
        "from draftsieve.core.evaluation.realtext import suites;"
        "print(suites.__file__); print(len(suites.python_suite().collections[0].questions))"
    )
    settings = {"PYTHONPATH": str(tmp_path / "installed"), "PATH": ""}
    done = subprocess.run(
        [sys.executable, "-P", "-c", code],
        env=settings, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=True,
    )  # fmt: skip
    place, asked = done.stdout.split()
    assert place.startswith(str(tmp_path / "installed"))
    assert int(asked) > 100

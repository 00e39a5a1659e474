"""The command line, with a tiny random pair and real files."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from draftsieve import __version__
from draftsieve.core.errors import ModelNotFoundError
from draftsieve.integrations.cli import entry as cli
from examples import demo

ROOT = Path(__file__).parents[1]
FERRY = (
    "The ferry to Holm leaves at seven in the morning. It takes forty minutes and carries cars.\n\n"
    "Tickets are sold at the harbour office. Children under six travel free of charge.\n"
)
BAKERY = "# Bakery\n\nThe bakery opens at six. Its owner is Tilda Brekk, who came from Holm.\n"
QUESTION = "When does the ferry to Holm leave?"


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders `target` and `draft` with random Llamas and a tokenizer trained here."""
    home = tmp_path_factory.mktemp("pair")
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<pad>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator([FERRY, BAKERY], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>")
    for seed, name in enumerate(("target", "draft")):
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=400,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=1,
            pad_token_id=0,
        )
        LlamaForCausalLM(config).save_pretrained(home / name)
        tokenizer.save_pretrained(home / name)
    return home


@pytest.fixture(scope="module")
def docs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("docs")
    (folder / "ferry.md").write_text(FERRY, encoding="utf-8")
    (folder / "bakery.md").write_text(BAKERY, encoding="utf-8")
    return folder


@pytest.fixture
def ask(pair: Path, docs: Path) -> list[str]:
    """Arguments of a small `ask`."""
    return [
        *("ask", QUESTION, "--docs", str(docs), "--ratio", "0.4", "--max-new-tokens", "4"),
        *("--target", str(pair / "target"), "--draft", str(pair / "draft"), "--no-progress"),
    ]


@pytest.fixture
def compress(pair: Path) -> list[str]:
    """Arguments of a `compress` without its source."""
    return ["compress", QUESTION, "--draft", str(pair / "draft"), "--no-progress"]


@pytest.fixture
def as_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)


def run_json(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert cli.main([*arguments, "--json"]) == 0
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    return result


# ---------------------------------------------------------------- ask


def test_ask_prints_answer_sources_tokens_and_seconds(
    ask: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(ask) == 0
    out = capsys.readouterr().out
    assert "[1] ferry.md#1" in out
    assert "[2] bakery.md#1" in out
    assert re.search(r"prompt tokens: \d+ → \d+ \(\d+% saved\)", out)
    assert re.search(r"seconds: .*draft \d.*decode \d", out)
    assert "\x1b" not in out


def test_ask_json_names_what_was_kept_of_each_source(
    ask: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    result = run_json(ask, capsys)
    assert result["question"] == QUESTION
    assert result["usage"]["prompt_tokens"] < result["usage"]["original_prompt_tokens"]
    compression = result["compression"]
    assert compression["compressed_passage_tokens"] <= 0.4 * compression["passage_tokens"] + 1
    assert [source["id"] for source in result["sources"]] == ["ferry.md#1", "bakery.md#1"]
    for source in result["sources"]:
        pieces = [source["text"][kept["start"] : kept["end"]] for kept in source["spans"]]
        assert source["compressed_text"] == " … ".join(pieces)
        assert source["metadata"]["source"] == source["id"].split("#")[0]


def test_ask_without_compression_needs_no_draft(
    ask: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    result = run_json([*ask, "--method", "none", "--draft", "no/such/model"], capsys)
    assert result["compression"] is None
    assert result["usage"]["prompt_tokens"] == result["usage"]["original_prompt_tokens"]
    assert "spans" not in result["sources"][0]


@pytest.mark.parametrize("method", ["speckv", "speckv-pc"])
def test_the_cache_can_be_evicted(
    method: str, ask: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    result = run_json([*ask, "--method", method], capsys)
    usage = result["usage"]
    assert usage["cache_entries"] < usage["prompt_tokens"]
    assert result["lookahead"]
    assert (result["compression"] is not None) == (method == "speckv-pc")
    assert cli.main([*ask, "--method", method]) == 0
    assert "cache entries a head" in capsys.readouterr().out


def test_a_terminal_gets_the_same_answer_streamed_and_highlights(
    ask: list[str], capsys: pytest.CaptureFixture[str], as_terminal: None
) -> None:
    expected = run_json(ask, capsys)
    assert cli.main(ask) == 0
    out = capsys.readouterr().out
    assert out.startswith(cli.printable(expected["answer"]))
    assert "\x1b[2m" in out  # dropped text is dim
    assert "\x1b[" in out.split("ferry.md#1")[1]
    plain = " ".join(re.sub(r"\x1b\[[0-9;]*m", "", out).split())
    assert " ".join(FERRY.split()) in plain


def test_no_color_is_respected(
    ask: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    as_terminal: None,
) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    assert cli.main(ask) == 0
    codes = set(re.findall(r"\x1b\[([0-9;]*)m", capsys.readouterr().out))
    assert codes  # bold and dim remain
    assert not [code for code in codes if re.search(r"(^|;)[34]\d", code)]


def test_escape_sequences_of_a_document_never_reach_a_terminal(
    ask: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], as_terminal: None
) -> None:
    (tmp_path / "evil.md").write_text("The ferry \x1b[2J\x1b]0;owned\x07 sinks.", encoding="utf-8")
    assert cli.main([*ask, "--docs", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "\x1b[2J" not in out
    assert "\x1b]0" not in out
    assert "\x07" not in out


def test_ask_writes_the_page(ask: list[str], tmp_path: Path) -> None:
    page = tmp_path / "kept.html"
    assert cli.main([*ask, "--html", str(page)]) == 0
    text = page.read_text(encoding="utf-8")
    assert text.startswith("<!DOCTYPE html>")
    assert "<mark" in text
    assert "bakery.md#1" in text


# ---------------------------------------------------------------- compress


def test_compress_puts_text_on_stdout_and_statistics_on_stderr(
    compress: list[str], docs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*compress, "--docs", str(docs), "--ratio", "0.5"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("[")
    assert "passage tokens" not in out
    assert re.search(r"passage tokens: \d+ → \d+ \(\d+% saved\); seconds: ", err)


def test_compress_keeps_a_file_that_fits_as_it_is(
    compress: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "notes.txt"
    path.write_text(f"{BAKERY}\n{FERRY}", encoding="utf-8")
    assert cli.main([*compress, "--file", str(path), "--ratio", "1.0"]) == 0
    assert capsys.readouterr().out == f"{BAKERY}\n{FERRY}"


def test_compress_units_stay_whole(
    compress: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "ferry.md"
    path.write_text(FERRY, encoding="utf-8")
    options = ["--file", str(path), "--ratio", "0.5", "--unit", "sentence"]
    result = run_json([*compress, *options], capsys)
    pieces = [s["text"][k["start"] : k["end"]] for s in result["sources"] for k in s["spans"]]
    assert pieces
    assert all(piece.endswith(".") for piece in pieces)
    assert result["compression"]["compressed"]


def test_compress_reads_stdin_in_a_real_process(compress: list[str], tmp_path: Path) -> None:
    done = run_process([*compress, "--file", "-", "--ratio", "0.5"], FERRY.encode())
    assert done.returncode == 0, done.stderr
    assert 0 < len(done.stdout) < len(FERRY.encode())
    assert b"passage tokens" in done.stderr
    assert b"Traceback" not in done.stderr


def test_a_closed_pipe_ends_quietly(compress: list[str], docs: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = run_process([*compress, "--docs", str(docs), "--json"], b"", stdout=writer)
    finally:
        os.close(writer)
    assert done.returncode == cli.BROKEN_PIPE
    assert done.stderr == b""


def run_process(
    arguments: list[str], data: bytes, stdout: int = subprocess.PIPE
) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-m", "draftsieve", *arguments],
        input=data,
        stdout=stdout,
        stderr=subprocess.PIPE,
        timeout=120,
        check=False,
    )


# ---------------------------------------------------------------- errors and usage


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (["--docs", "no/such/folder"], "no/such/folder"),
        (["--file", "no/such/file"], "no/such/file"),
        (["--file", os.devnull], "holds no text"),
        (["--capacity", "1", "--file", __file__], "capacity"),
    ],
)
def test_errors_are_one_line_and_status_1(
    compress: list[str], capsys: pytest.CaptureFixture[str], source: list[str], words: str
) -> None:
    assert cli.main([*compress, *source]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("draftsieve: error: ")
    assert err.count("\n") == 1
    assert words in err


def test_a_missing_model_is_named_and_debug_shows_where(
    docs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["compress", QUESTION, "--docs", str(docs), "--draft", "./no-model"]
    assert cli.main(arguments) == 1
    assert "./no-model" in capsys.readouterr().err
    with pytest.raises(ModelNotFoundError):
        cli.main([*arguments, "--debug"])


def test_a_question_without_a_match_is_an_error(
    ask: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["ask", "xylophone", *ask[2:]]) == 1
    assert "shares a word" in capsys.readouterr().err


def test_a_file_that_is_not_text_is_an_error(
    compress: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "data.bin").write_bytes(b"\xff\xfe\x00")
    assert cli.main([*compress, "--file", str(tmp_path / "data.bin")]) == 1
    assert "UTF-8" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["ask", "q"],
        ["compress", "q"],
        ["compress", "q", "--file", "a", "--docs", "b"],
        ["compress", "q", "--file", "a", "--capacity", "5", "--ratio", "0.5"],
        ["compress", "q", "--file", "a", "--capacity", "0"],
        ["compress", "q", "--file", "a", "--ratio", "1.5"],
        ["compress", "q", "--file", "a", "--ratio", "nan"],
        ["compress", "q", "--file", "a", "--bits", "5"],
    ],
)
def test_wrong_usage_is_status_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == 2
    assert "usage: draftsieve" in capsys.readouterr().err


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"draftsieve {__version__}\n"
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    assert "exit status" in capsys.readouterr().out


def test_an_interrupt_is_status_130(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "ask", interrupted)
    assert cli.main(["ask", "q", "--docs", "."]) == 130
    assert "Traceback" not in capsys.readouterr().err


# ---------------------------------------------------------------- the bundled pair


def test_the_bundled_pair_answers_from_a_folder(
    docs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["ask", QUESTION, "--docs", str(docs), "--ratio", "0.6", "--no-progress"]
    result = run_json(arguments, capsys)
    assert result["answer"].strip()
    assert result["compression"]["compressed"]


def test_the_demo_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "out" / "kept.html"
    options = ["--questions", "1", "--article-questions", "2", "--html", str(page), "--quiet"]
    assert demo.main(options) == 0
    out = capsys.readouterr().out
    assert "BM25 sentences" in out
    for part in ("--method speckv ", "--method speckv-pc "):
        shown = out.split(f"draftsieve ask ... {part}")[1].split("draftsieve ask ...")[0]
        whole, kept = map(int, re.findall(r"cache entries a head: (\d+) → (\d+)", shown)[0])
        assert kept < whole
    assert re.search(r"Wall time \d+ s, peak memory \d+ MiB", out)
    assert page.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")


@pytest.mark.parametrize(
    ("left", "right", "same"),
    [
        ("The Blue Lamp.", "blue lamp", True),
        ("Ann Bo, Cy Do", "Cy Do, Ann Bo", True),
        ("6,522 volts", "6522 volts", False),
        ("E-1515", "E-1516", False),
    ],
)
def test_the_demo_compares_answers_fairly(left: str, right: str, same: bool) -> None:
    assert (demo.normalised(left) == demo.normalised(right)) is same

"""The command line, with a tiny random pair and real files."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from draftsieve import Compressor, Passage, __version__
from draftsieve.core.config import DEFAULT_METHOD, NEWEST_PRESET, Method, SpecKV, SpecKVPC, SpecPC
from draftsieve.core.errors import ConfigError, ModelNotFoundError
from draftsieve.integrations import cli
from draftsieve.integrations.cli.entry import BROKEN_PIPE
from draftsieve.integrations.cli.method import read_method
from draftsieve.integrations.cli.parser import build_parser
from draftsieve.integrations.cli.render import printable
from examples import demo

from .adapters_fixtures import tiny_compressor
from .embedders import write_encoder

ROOT = Path(__file__).parents[1]
WAYS = ("whole", "kept")  # what the demo answers from
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
    assert re.search(r"prompt tokens: \d+ → \d+ \(\d+% saved\), answer tokens: 4 \(cut off", out)
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
    for options in (["--method", "none"], ["--method", "speckv", "--set", "scorer=snapkv"]):
        result = run_json([*ask, *options, "--draft", "no-such/model"], capsys)
        assert result["answer"]
    result = run_json([*ask, "--method", "none", "--draft", "no-such/model"], capsys)
    assert result["compression"] is None
    assert result["usage"]["prompt_tokens"] == result["usage"]["original_prompt_tokens"]
    assert "spans" not in result["sources"][0]


@pytest.mark.parametrize("name", ["speckv", "speckv-pc"])
def test_the_cache_can_be_evicted(
    name: str, ask: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    result = run_json([*ask, "--method", name], capsys)
    usage = result["usage"]
    assert usage["cache_entries"] < usage["prompt_tokens"]
    assert result["lookahead"]
    assert (result["compression"] is not None) == (name == "speckv-pc")
    assert usage["cache_bytes"] > 0
    assert cli.main([*ask, "--method", name]) == 0
    out = capsys.readouterr().out
    assert re.search(r"cache entries a head: \d+ → \d+ \(\d+% saved\), in all [\d.]+ kB", out)
    assert f"the draft guessed: {result['lookahead']}"[:20] in out


def test_a_terminal_gets_the_same_answer_streamed_and_highlights(
    ask: list[str], capsys: pytest.CaptureFixture[str], as_terminal: None
) -> None:
    expected = run_json(ask, capsys)
    assert cli.main(ask) == 0
    out = capsys.readouterr().out
    assert out.startswith(printable(expected["answer"]))
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


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--capacity 2000", "nothing was left out: the capacity of 2000 holds the prompt of"),
        ("--ratio 0.4 --set min_tokens=900", "nothing was left out: min_tokens is 900"),
        ("--method speckv --capacity 2000", "nothing was evicted: the capacity of 2000 entries"),
    ],
)
def test_ask_says_why_nothing_was_saved(
    options: str, words: str, ask: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    without_ratio = [a for a in ask if a not in ("--ratio", "0.4")]
    assert cli.main([*without_ratio, *options.split()]) == 0
    out = capsys.readouterr().out
    assert words in out
    assert "Tickets are sold" not in out  # whole passages only on request
    assert cli.main([*without_ratio, *options.split(), "--verbose"]) == 0
    assert "Tickets are sold" in capsys.readouterr().out


def test_the_system_text_reaches_the_prompt(
    ask: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = [
        run_json([*ask, "--system", text], capsys)["usage"]["original_prompt_tokens"]
        for text in ("", "Answer.", "Answer with as many words as you can think of.")
    ]
    assert sizes == sorted(set(sizes))


def test_files_that_are_not_read_are_named(
    ask: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "ferry.md").write_text(FERRY, encoding="utf-8")
    for number in range(4):
        (tmp_path / f"{number}.docx").write_bytes(b"PK")
    expected = "draftsieve: 4 .docx files not read: there is no reader for this kind: 0.docx, 1"
    assert cli.main([*ask, "--docs", str(tmp_path)]) == 0
    err = capsys.readouterr().err
    assert err.startswith(expected)
    assert err.count("\n") == 1
    assert cli.main([*ask, "--docs", str(tmp_path), "-v"]) == 0
    assert "draftsieve: Not read: 3.docx (" in capsys.readouterr().err


# ---------------------------------------------------------------- compress


def test_compress_leaves_a_file_that_fits_its_line_breaks(
    compress: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "The ferry to Holm leaves at seven in the morning and\ncarries cars. It is cheap.\n"
    path = tmp_path / "notes.txt"
    path.write_text(text, encoding="utf-8")
    assert cli.main([*compress, "--file", str(path), "--capacity", "900"]) == 0
    out, err = capsys.readouterr()
    assert out == text
    assert "nothing was left out: the capacity of 900" in err
    assert cli.main([*compress, "--file", str(path), "--ratio", "0.7"]) == 0
    assert "in the morning and carries cars." in capsys.readouterr().out


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


def test_compress_reads_tables_and_names_broken_files(
    compress: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / "staff.csv"
    table.write_text("name,role\nTilda,baker\nOla,captain\n", encoding="utf-8")
    assert cli.main([*compress, "--file", str(table), "--ratio", "1.0"]) == 0
    assert capsys.readouterr().out == "name: Tilda; role: baker\n\nname: Ola; role: captain\n"
    broken = tmp_path / "staff.json"
    broken.write_text("{", encoding="utf-8")
    assert cli.main([*compress, "--file", str(broken)]) == 1
    assert "staff.json' cannot be read: the JSON is broken" in capsys.readouterr().err


def test_compress_units_stay_whole(
    compress: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "ferry.md"
    path.write_text(FERRY, encoding="utf-8")
    options = ["--file", str(path), "--ratio", "0.5", "--set", "unit=sentence"]
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
    assert done.returncode == BROKEN_PIPE
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
    arguments = ["compress", QUESTION, "--docs", str(docs), "--draft", "no-such/model"]
    assert cli.main(arguments) == 1
    assert "no-such/model" in capsys.readouterr().err
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
    ("arguments", "words"),
    [
        ("", "COMMAND"),
        ("ask q", "--docs"),
        ("compress q", "--file"),
        ("compress q --file {file} --docs b", "not allowed with"),
        ("ask ' ' --docs .", "QUESTION: it is empty"),
        ("compress q --file no/such/file", "there is no file 'no/such/file'"),
        ("compress q --file {file} --capacity 5 --ratio 0.5", "not allowed with"),
        ("compress q --file {file} --capacity 0", "--capacity: '0' is no whole number from 1"),
        ("compress q --file {file} --ratio abc", "--ratio: 'abc' is no number in (0, 1]"),
        ("compress q --file {file} --ratio 1.5", "--ratio: '1.5'"),
        ("compress q --file {file} --ratio nan", "--ratio: 'nan'"),
        ("compress q --file {file} --bits 5", "--bits"),
        ("ask q --docs . --html no/such/page.html", "there is no folder 'no/such'"),
        ("ask q --docs . --html {folder}", "is a folder: give a file"),
        ("ask q --docs . --target ./no-model", "There is no model './no-model'"),
        ("ask q --docs . --draft builtin:large", "There is no bundled model 'builtin:large'"),
        ("ask q --docs . --draft-store no.safetensors", "there is no file"),
        ("ask q --docs . --embedder ./no-model", "--embedder: There is no model './no-model'"),
        ("ask q --docs . --semantic-weight 2", "--semantic-weight: '2' is no number in (0, 1]"),
        ("ask q --docs . --set lexical_wieght=1", "Did you mean lexical_weight"),
        ("drafts build --docs . --out store.txt", "'store.txt' must end with .safetensors"),
        ("eval --data no.json", "there is no file 'no.json'"),
        ("calibrate --out no/such/heads.json", "there is no folder"),
        ("eval --out {file}", "is a file: give a folder"),
    ],
)
def test_wrong_usage_is_status_2_and_says_what_is_wrong(
    arguments: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    named = arguments.format(file=__file__, folder=tmp_path)
    try:
        status: object = cli.main(shlex.split(named))
    except SystemExit as ended:
        status = ended.code
    out, err = capsys.readouterr()
    assert status == 2
    assert out == ""
    assert words in err


def test_mistakes_are_told_without_torch(docs: Path) -> None:
    mistakes = [
        ["ask", " ", "--docs", str(docs)],
        ["ask", "q", "--docs", "no/such/folder"],
        ["ask", "xylophone", "--docs", str(docs)],
        ["ask", "q", "--docs", str(docs), "--html", "no/such/page.html"],
        ["ask", "q", "--docs", str(docs), "--target", "./no-model"],
        ["ask", "q", "--docs", str(docs), "--set", "unit=line"],
        ["compress", "q", "--file", os.devnull],
        ["compress", "q", "--file", str(docs / "ferry.md"), "--set", "capacity=x"],
        ["drafts", "build", "--docs", "no/such/folder", "--out", "x.safetensors"],
        ["ask", "q", "--docs", str(docs), "--store-new"],
        ["ask", "q", "--docs", str(docs), "--store", "x", "--method", "none"],
        ["index", "build", "--docs", "no/such/folder", "--store", "x"],
        ["index", "build", "--help"],
        ["ask", "--help"],
        ["ask", "--help-options"],
    ]
    code = (
        "import contextlib, json, sys\n"
        "from draftsieve.integrations.cli import main\n"
        "for arguments in json.load(sys.stdin):\n"
        "    with contextlib.suppress(SystemExit):\n"
        "        assert main(arguments) in (1, 2), arguments\n"
        "    assert 'torch' not in sys.modules, arguments\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=json.dumps(mistakes).encode(),
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()


@pytest.mark.parametrize(
    ("option", "name"),
    [
        ("--methods", "foo"),
        ("--tasks", "foo"),
        ("--reference", "foo"),
        ("--suite", "foo"),
        ("--suite=python", "--contexts=foo"),
    ],
)
def test_eval_knows_its_names_before_models_are_loaded(
    option: str, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    models = ["--target", "no-such/model", "--draft", "no-such/model"]
    assert cli.main(["eval", *models, option, name]) == 2
    assert "'foo'" in capsys.readouterr().err


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"draftsieve {__version__}\n"
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    assert "exit status" in capsys.readouterr().out


def test_an_interrupt_ends_quietly(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    command = [sys.executable, "-m", "draftsieve", "compress", "q", "--file", str(pipe)]
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        # where the tests run in the background, interrupts are ignored, by children too
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    with process, pipe.open("wb"):  # waits until the command reads
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert err == b"draftsieve: interrupted\n"
    assert process.returncode == cli.INTERRUPTED


def test_an_embedder_gives_a_second_opinion(
    compress: list[str],
    ask: list[str],
    docs: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = str(write_encoder(tmp_path / "encoder"))
    given = ["--docs", str(docs), "--ratio", "0.4", "--embedder", folder]
    alone = ["--semantic-weight", "1", "--set", "lexical_weight=0"]
    found = run_json([*compress, *given, *alone], capsys)
    assert found["compression"]["note"] is None
    draft = Compressor.load(compress[3], progress=False)
    passages = [Passage(source["text"], source["id"]) for source in found["sources"]]
    method = SpecPC.preset(
        NEWEST_PRESET, ratio=0.4, lexical_weight=0, semantic_weight=1.0, embedder=folder
    )
    assert found["text"] == draft.compress(QUESTION, passages, method).text
    assert cli.main([*ask, "--semantic-weight", "0.5"]) == 0
    assert "semantic_weight=0.5 has no effect without an embedder" in capsys.readouterr().out
    assert cli.main([*compress, *given[:4], "--semantic-weight", "0.5"]) == 0
    assert "has no effect without an embedder" in capsys.readouterr().err


# ---------------------------------------------------------------- options of methods


def method(arguments: str) -> Method | None:
    return read_method(
        build_parser().parse_args(["ask", "q", "--docs", ".", *shlex.split(arguments)])
    )


def test_the_default_is_the_librarys_own() -> None:
    assert method("") == DEFAULT_METHOD
    assert method("--method none --ratio 0.2") is None


def test_a_ratio_is_what_is_left_in_the_end() -> None:
    assert method("--ratio 0.2") == SpecPC.preset(NEWEST_PRESET, ratio=0.2)
    assert method("--method speckv --ratio 0.2") == SpecKV(ratio=0.2)
    for share in (0.125, 0.3, 0.5, 0.8, 1.0):
        both = method(f"--method speckv-pc --ratio {share}")
        assert isinstance(both, SpecKVPC)
        assert both.specpc.ratio == min(1.0, 2 * share)
        assert both.specpc.ratio * (both.speckv.ratio or 0) == pytest.approx(share)
        assert both.specpc.unit == "sentence"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("--capacity 700", SpecPC.preset(NEWEST_PRESET, capacity=700)),
        ("--preset paper", SpecPC(ratio=DEFAULT_METHOD.ratio)),
        ("--preset paper --set capacity=9 --set pool=none", SpecPC(capacity=9, pool=None)),
        (
            "--set lexical_weight=0.5 --set weighted_query=false --set 'gap_marker= / '",
            SpecPC.preset(
                NEWEST_PRESET,
                ratio=0.35,
                lexical_weight=0.5,
                weighted_query=False,
                gap_marker=" / ",
            ),
        ),
        (
            "--set specpc.unit=word --ratio 0.5",
            SpecPC.preset(NEWEST_PRESET, ratio=0.5, unit="word"),
        ),
        (
            "--ratio 0.5 --embedder owner/name",
            SpecPC.preset(NEWEST_PRESET, ratio=0.5, semantic_weight=0.5, embedder="owner/name"),
        ),
        (
            "--ratio 0.5 --embedder owner/name --semantic-weight 0.25 --set lexical_weight=0",
            SpecPC.preset(
                NEWEST_PRESET,
                ratio=0.5,
                lexical_weight=0,
                semantic_weight=0.25,
                embedder="owner/name",
            ),
        ),
        (
            "--ratio 0.5 --semantic-weight 0.25 --set semantic_weight=0.1 --set embedder=a/b",
            SpecPC.preset(NEWEST_PRESET, ratio=0.5, semantic_weight=0.1, embedder="a/b"),
        ),
        ("--method speckv --capacity 64", SpecKV(capacity=64)),
        (
            "--method speckv --preset 2026-12 --ratio 0.2 --set pool=none",
            SpecKV.preset("2026-12", ratio=0.2, pool=None),
        ),
        ("--method speckv --preset paper", SpecKV(ratio=0.35)),
        (
            "--method speckv --set scorer=snapkv --set seed=3",
            SpecKV(ratio=0.35, scorer="snapkv", seed=3),
        ),
        (
            "--method speckv-pc --set specpc.capacity=2000 --set speckv.capacity=512"
            " --set head_budgets=adaptive --set lookahead_tokens=4 --preset paper",
            None,
        ),
        (
            "--method speckv-pc --set specpc.capacity=2000 --set speckv.capacity=512"
            " --set head_budgets=adaptive --set specpc.lookahead_tokens=4 --preset paper",
            SpecKVPC(
                specpc=SpecPC(capacity=2000, lookahead_tokens=4),
                speckv=SpecKV(capacity=512, head_budgets="adaptive"),
            ),
        ),
        (
            "--method speckv-pc --ratio 0.2 --set specpc.ratio=0.8",
            SpecKVPC(specpc=SpecPC.preset(NEWEST_PRESET, ratio=0.8), speckv=SpecKV(ratio=0.25)),
        ),
    ],
)
def test_every_option_can_be_set(arguments: str, expected: Method | None) -> None:
    if expected is None:
        with pytest.raises(ConfigError, match=r"say specpc\.lookahead_tokens or speckv\."):
            method(arguments)
    else:
        assert method(arguments) == expected


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--set lexical_wieght=1", "Did you mean lexical_weight.*There are: capacity, ratio"),
        ("--set speckv.pool=max", "there is no such option"),
        ("--method speckv --set unit=word", "there is no such option"),
        ("--set lexical_weight=2", "lexical_weight=2: input should be less than or equal to 1"),
        ("--set kernel_size=many", "kernel_size=many: input should be a valid integer"),
        ("--set unit=line", "'token', 'word', 'sentence' or 'passage'"),
        ("--set unit", "say NAME=VALUE"),
        ("--preset 2020-01", "no preset '2020-01'"),
        ("--method speckv --preset 2026-11", "no preset '2026-11' of SpecKV"),
        ("--set capacity=5 --set ratio=0.5", "exclude each other"),
        ("--method speckv --set kernel_size=4", "must be odd"),
        ("--method speckv-pc --capacity 512", "give both"),
        ("--method speckv-pc --set specpc.capacity=512", "give both"),
        ("--method speckv-pc --set positions=keep", "belongs to SpecPC alone"),
        ("--method speckv --semantic-weight 0.5", "only SpecPC asks an embedder"),
        ("--preset paper --embedder owner/name", 'unit is "token": set it to "sentence"'),
        ("--set lexical_weight=0.8 --embedder owner/name", "must not exceed 1"),
    ],
)
def test_wrong_options_name_what_is_wrong(arguments: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        method(arguments)


def test_the_listed_options_are_all_there_is_and_their_defaults_can_be_set(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["ask", "--help-options"])
    assert ended.value.code == 0
    specpc, speckv = capsys.readouterr().out.split("\n\nSpecKV")
    for kind, name, text in ((SpecPC, "specpc", specpc), (SpecKV, "speckv", speckv)):
        shown = re.findall(r"^  (\w+)=(\".*?\"|\S+)(?:  \(.*)?\n      \S", text, re.M)
        assert [option for option, _ in shown] == list(kind.model_fields)
        line = [f"--set={name}.{option}={shlex.split(value)[0]}" for option, value in shown]
        own = ["--preset=paper"] if name == "specpc" else []
        assert method(shlex.join(["--method", name, *own, *line])) == method(f"--method {name}")


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ("--attn-implementation none_such", "target"),
        ("--draft-attn-implementation none_such", "draft"),
        ("--gguf-file none_such.gguf", "target"),
        ("--draft-gguf-file none_such.gguf", "draft"),
    ],
)
def test_both_models_are_loaded_as_the_options_say(
    options: str, named: str, ask: list[str], pair: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*ask, *options.split()]) == 1
    said = capsys.readouterr().err
    assert "none_such" in said
    assert str(pair / named) in said


def test_the_only_model_is_loaded_as_the_options_say(
    compress: list[str], docs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = ["--file", str(docs / "ferry.md")]
    assert cli.main([*compress, *text, "--attn-implementation", "eager"]) == 0
    for option in ("--attn-implementation", "--gguf-file"):
        assert cli.main([*compress, *text, option, "none_such.gguf"]) == 1
        assert "none_such.gguf" in capsys.readouterr().err


# ---------------------------------------------------------------- the bundled pair


@pytest.mark.parametrize("options", ["", "--method speckv", "--method speckv-pc", "--method none"])
def test_the_bundled_pair_answers_from_a_folder(
    options: str, capsys: pytest.CaptureFixture[str]
) -> None:
    handbook = str(ROOT / "examples" / "data" / "handbook")
    question = "Who is the director of Deteth Motors?"
    bundled = ["--target", "builtin:target"]  # its partner is the draft
    assert cli.main(["ask", question, "--docs", handbook, *bundled, *options.split()]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[0] == "Nurtuwick Maley"
    assert ("saved" in out) == (options != "--method none")
    assert err == ""


@pytest.mark.real
def test_the_real_model_is_what_nobody_has_to_name(
    smollm2: str, docs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["ask", QUESTION, "--docs", str(docs), "--max-new-tokens", "24"]) == 0
    out, err = capsys.readouterr()
    assert "seven" in out.splitlines()[0]
    assert err == ""


def test_the_demo_runs_with_the_bundled_pair_where_there_is_no_network(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DRAFTSIEVE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", os.devnull)
    page = tmp_path / "out" / "kept.html"
    options = ["--questions", "1", "--reference-questions", "2", "--html", str(page), "--quiet"]
    assert demo.main(options) == 0
    out = capsys.readouterr().out
    reason = out.splitlines()[0]
    assert reason.startswith("The bundled pair, made for demonstration, stands in: smollm2-135m")
    assert "could not be fetched" in reason
    whole, kept = ([int(n) for n in re.findall(rf"  {w} +(\d+) tokens", out)] for w in WAYS)
    assert len(whole) == 2
    assert all(shorter < longer / 2 for shorter, longer in zip(kept, whole, strict=True))
    for part in ("SpecKV, ", "SpecKV-PC, "):
        shown = out.split(part)[1]
        before, after = map(int, re.findall(r"cache entries a head: (\d+) → (\d+)", shown)[0])
        assert after < before
    assert "BM25 sentences" in out
    assert "What this shows: SmolLM2" not in out
    ticked = len(re.findall(r"  (?:whole|kept) .* ✓ ", out))
    counted = [int(n) for n in re.findall(r"(?:whole|kept) +│ +(\d) of 1", out)]
    assert len(counted) == 4
    assert ticked == sum(counted)
    assert re.search(r"Wall time \d+ s, peak memory \d+ MiB", out)
    assert page.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")


def test_the_demo_ticks_what_contains_the_answer() -> None:
    """In a sentence or not; a listed answer needs all its parts."""
    items = demo.handbook_items(tiny_compressor())
    listed = next(item for item, _ in items if item.task == "handbook" and len(item.answers) == 3)
    found = demo.Asked(listed, (), None, None)  # type: ignore[arg-type]
    said = [f"They are {' and '.join(listed.answers[:count])}." for count in (2, 3)]
    answers = [SimpleNamespace(text=text) for text in said]
    assert [found.right(answer) for answer in answers] == [False, True]  # type: ignore[arg-type]

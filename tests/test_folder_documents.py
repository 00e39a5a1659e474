"""Files of every kind as text, and what is said of those that are not read."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path

import pytest
from pypdf import PdfWriter
from pypdf.generic import DecodedStreamObject, DictionaryObject, NameObject

from draftsieve.core.specpc.units import sentence_spans
from draftsieve.retrievers import FolderError, Skipped, read_folder

PROSE = (
    "The ferry to Holm leaves at seven in the morning and takes\n"
    "forty minutes. Tickets are sold at the harbour office, which\n"
    "opens at six."
)


def only(folder: Path) -> str:
    """The text of the folder's one passage."""
    (passage,) = read_folder(folder)
    return passage.text


def write_pdf(path: Path, *pages: list[str], password: str | None = None) -> None:
    """A PDF with a page for each list of lines."""
    writer = PdfWriter()
    name = NameObject
    font = {"/Type": "/Font", "/Subtype": "/Type1", "/BaseFont": "/Helvetica"}
    fonts = DictionaryObject(
        {name("/F1"): DictionaryObject({name(k): name(v) for k, v in font.items()})}
    )
    for lines in pages:
        page = writer.add_blank_page(width=600, height=800)
        drawn = "".join(f"({line}) Tj 0 -14 Td " for line in lines)
        stream = DecodedStreamObject()
        stream.set_data(f"BT /F1 12 Tf 50 700 Td {drawn}ET".encode("latin-1"))
        page[name("/Contents")] = writer._add_object(stream)
        page[name("/Resources")] = DictionaryObject({name("/Font"): fonts})
    if password:
        writer.encrypt(password, algorithm="RC4-128")
    writer.write(path)


# ---------------------------------------------------------------- kinds


def test_a_web_page_becomes_markdown_without_scripts_and_menus(tmp_path: Path) -> None:
    page = (
        '<html><head><meta charset="iso-8859-1"><title>Caf\xe9</title><script>x=1</script></head>'
        '<body><nav><a href="/">Home</a></nav><h2>Hours</h2><p>Opens at\n  <b>six</b>, see\n'
        '<a href="https://x.example">the_list *</a>.</p><ul><li>one</li></ul>'
        "<table><tr><th>Day</th></tr><tr><td>Monday</td></tr></table></body></html>"
    )
    (tmp_path / "a.html").write_bytes(page.encode("latin-1"))
    texts = [passage.text for passage in read_folder(tmp_path)]
    assert texts[0] == "Café"
    assert texts[1].startswith("## Hours\n\nOpens at **six**, see the_list *.\n\n* one\n\n| Day |")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", 'Name,Role\n"Brekk, Tilda",baker\n\nOla,\n'),
        ("a.csv", "Name;Role\nBrekk, Tilda;baker\nOla;\n"),
        ("a.tsv", "Name\tRole\nBrekk, Tilda\tbaker\nOla\t\n"),
        ("a.json", json.dumps([{"Name": "Brekk, Tilda", "Role": "baker"}, {"Name": "Ola"}])),
        ("a.jsonl", '{"Name": "Brekk, Tilda", "Role": "baker"}\n\n{"Name": "Ola", "Role": null}\n'),
    ],
)
def test_rows_and_records_name_their_columns(name: str, text: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert only(tmp_path) == "Name: Brekk, Tilda; Role: baker\n\nName: Ola"


def test_nested_json_has_dotted_names(tmp_path: Path) -> None:
    value = {"shop": {"open": [6, 7], "staff": [{"name": "Ola"}, {"name": "Tilda"}]}, "n": 1}
    (tmp_path / "a.json").write_text(json.dumps(value), encoding="utf-8")
    expected = "shop.open: 6, 7; shop.staff.name: Ola; shop.staff.name: Tilda\n\nn: 1"
    assert only(tmp_path) == expected


def test_a_pdf_becomes_its_text_with_pages(tmp_path: Path) -> None:
    second = ["Lost things are kept by the har-", "bour office for a year. Ask there."]
    write_pdf(tmp_path / "a.pdf", PROSE.split("\n"), second)
    first, *rest = read_folder(tmp_path, limit=150)
    assert first.text == PROSE.replace("\n", " ")
    assert first.metadata["page"] == 1
    assert [p.text for p in rest] == [
        "Lost things are kept by the harbour office for a year. Ask there."
    ]
    assert [p.metadata["page"] for p in rest] == [2]


# ---------------------------------------------------------------- wrapped lines


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.rst"])
def test_wrapped_sentences_stay_whole_at_their_offsets(name: str, tmp_path: Path) -> None:
    text = f"Title\n=====\n\n{PROSE}\n"
    (tmp_path / name).write_text(text, encoding="utf-8")
    (passage,) = read_folder(tmp_path)
    cut = text[passage.metadata["start"] : passage.metadata["end"]]
    assert cut.replace("\n", " ") == passage.text.replace("\n", " ")
    sentences = [passage.text[start:end] for start, end in sentence_spans(passage.text)]
    assert "The ferry to Holm leaves at seven in the morning and takes forty minutes." in sentences


@pytest.mark.parametrize(
    "text",
    [
        "- The first thing that must be done by someone\n- The second thing that must be done",
        "| The ferry to Holm | seven | daily |\n| The ferry to Vik | ten | daily |",
        "```\nfor ferry in all_ferries_of_the(harbour):\n    leave(ferry, at=seven, to=holm)\n```",
        "The ferry leaves.\nIt takes forty minutes and carries cars and bicycles.\nIt is cheap.",
        "Der Rat der Stadt Holm tagt in jedem Monat einmal\nAlle Bürger\nSind willkommen",
        "この港の船は毎朝七時に出発して四十分でホルムに着きます。大人も子供も乗ることができます。\n切符は事務所で。",
        "Rose lines are short\nand never fill\nthe width of a page",
        "2026-11-02 10:00 started the ferry service\n2026-11-02 10:01 stopped the ferry service",
        "The ferry to Holm leaves at seven in the morning,  \nwhich is early for those far away.",
    ],
)
def test_lines_that_stand_for_themselves_stay(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text(text, encoding="utf-8")
    assert only(tmp_path) == text


def test_a_ragged_paragraph_is_joined_inside_its_sentences(tmp_path: Path) -> None:
    text = (
        "The ferry to Holm leaves at seven in the morning and\ntakes forty minutes.\n"
        "Tickets are\nsold at the harbour office, which opens at\nsix."
    )
    (tmp_path / "a.md").write_text(text, encoding="utf-8")
    assert only(tmp_path).split("\n") == [
        "The ferry to Holm leaves at seven in the morning and takes forty minutes.",
        "Tickets are sold at the harbour office, which opens at six.",
    ]


def test_wrapped_items_of_a_list_are_joined_apart(tmp_path: Path) -> None:
    text = (
        "- The first thing that must be done by someone\n  who has time.\n"
        "- The second thing that must be done today\n  by all."
    )
    (tmp_path / "a.md").write_text(text, encoding="utf-8")
    assert only(tmp_path).split("\n") == [
        "- The first thing that must be done by someone   who has time.",
        "- The second thing that must be done today   by all.",
    ]


# ---------------------------------------------------------------- encodings


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252"])
def test_encodings(encoding: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a.txt").write_bytes("Café\r\nfür “Ola”".encode(encoding))
    assert only(tmp_path) == "Café\nfür “Ola”"
    warned = "Not UTF-8 and taken for Windows-1252: a.txt." in caplog.text
    assert warned == (encoding == "cp1252")


# ---------------------------------------------------------------- what is skipped


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """A folder with one text and many files that cannot be read."""
    (tmp_path / "good.txt").write_text("Text.", encoding="utf-8")
    for number in range(5):
        (tmp_path / f"{number}.docx").write_bytes(b"PK")
    (tmp_path / "LICENSE").write_text("none", encoding="utf-8")
    (tmp_path / "binary.txt").write_bytes(b"\x00\x01")
    (tmp_path / "broken.json").write_text("{", encoding="utf-8")
    (tmp_path / "broken.pdf").write_bytes(b"%PDF-1.4 nothing")
    write_pdf(tmp_path / "locked.pdf", ["secret"], password="x")
    write_pdf(tmp_path / "scan.pdf", [])
    return tmp_path


def test_what_is_not_read_is_logged_by_kind_and_reason(
    mixed: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "draftsieve")
    assert only(mixed) == "Text."
    warnings = [
        r.getMessage()
        for r in caplog.records
        if r.levelname == "WARNING" and r.name.startswith("draftsieve")
    ]
    named = "0.docx, 1.docx, 2.docx and 2 more"
    assert warnings[0] == f"5 .docx files not read: there is no reader for this kind: {named}."
    for words in ("LICENSE", "binary.txt", "broken.json", "broken.pdf", "locked.pdf", "scan.pdf"):
        assert any(words in warning for warning in warnings)
    assert any("password: locked.pdf" in warning for warning in warnings)
    assert any("(a scan?): scan.pdf" in warning for warning in warnings)
    assert "Not read: 4.docx (" in caplog.text


def test_a_caller_gets_what_is_not_read(mixed: Path, caplog: pytest.LogCaptureFixture) -> None:
    skipped: list[Skipped] = []
    read_folder(mixed, on_skip=skipped.append)
    assert len(skipped) == 11
    assert {each.source for each in skipped} >= {"0.docx", "LICENSE", "scan.pdf"}
    assert "docx" not in caplog.text


@pytest.mark.parametrize(
    ("name", "module", "extra"),
    [("a.pdf", "pypdf", "docs-pdf"), ("a.html", "markdownify", "retrieval")],
)
def test_a_missing_extra_skips_its_kind_and_names_the_command(
    name: str,
    module: str,
    extra: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    (tmp_path / name).write_bytes(b"content")
    with pytest.raises(FolderError, match=rf'pip install "draftsieve\[{extra}\]": {name}'):
        read_folder(tmp_path)
    (tmp_path / "good.txt").write_text("Text.", encoding="utf-8")
    assert only(tmp_path) == "Text."
    assert f'pip install "draftsieve[{extra}]": {name}' in caplog.text

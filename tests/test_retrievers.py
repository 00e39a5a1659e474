"""BM25 and folder reading."""

from __future__ import annotations

import logging
import math
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from draftsieve.core.errors import MissingExtraError, PromptError
from draftsieve.core.specpc.bm25 import words
from draftsieve.core.types import Passage
from draftsieve.retrievers import Bm25Index, FolderError, paragraphs, read_folder

TEXTS = [
    "The ferry to Holm leaves at seven.",
    "Tickets for the ferry are sold at the harbour office.",
    "Grüße aus Köln: die Fähre fährt nicht.",
    "渡し船は七時に出ます。",
    "नाव सुबह सात बजे चलती है।",
]


def naive_bm25(question: str, texts: list[str], k1: float = 1.5, b: float = 0.75) -> list[float]:
    """Lucene's BM25, term by term."""
    documents = [words(text) for text in texts]
    mean = sum(map(len, documents)) / len(documents)
    scores = []
    for document in documents:
        score = 0.0
        for word in words(question):
            holding = sum(word in other for other in documents)
            idf = math.log(1 + (len(documents) - holding + 0.5) / (holding + 0.5))
            count = document.count(word)
            score += idf * count / (count + k1 * (1 - b + b * len(document) / mean))
        scores.append(score)
    return scores


@pytest.mark.parametrize("question", ["When does the ferry leave Holm?", "ferry ferry office"])
def test_scores_equal_the_naive_formula(question: str) -> None:
    index = Bm25Index.from_texts(TEXTS)
    found = {p.text: score for p, score in index.search(question, len(TEXTS))}
    for text, expected in zip(TEXTS, naive_bm25(question, TEXTS), strict=True):
        assert found[text] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("question", "best"),
    [("ferry TO holm", 0), ("FÄHRE nach Köln", 2), ("渡し船", 3), ("नाव कब चलती है", 4)],
)
def test_words_of_any_script_are_found(question: str, best: int) -> None:
    passage, score = Bm25Index.from_texts(TEXTS).search(question, 1)[0]
    assert passage.text == TEXTS[best]
    assert score > 0


def test_passages_come_back_as_they_were_given() -> None:
    passages = [Passage(text, f"id{n}", {"n": n}) for n, text in enumerate(TEXTS)]
    found = Bm25Index.from_passages(passages).search("ferry office", 2)
    assert [p for p, _ in found] == [passages[1], passages[0]]


def test_equal_scores_stay_in_order() -> None:
    index = Bm25Index.from_texts(["same words", "other"] * 100)
    found = [p.id for p, _ in index.search("same words", 200)]
    assert found == [str(n) for n in (*range(1, 201, 2), *range(2, 201, 2))]


@pytest.mark.parametrize("question", ["", "zebra", "?!"])
def test_a_question_without_known_words_gives_zeros_in_order(question: str) -> None:
    found = Bm25Index.from_texts(TEXTS).search(question, 2)
    assert [(p.id, score) for p, score in found] == [("1", 0.0), ("2", 0.0)]


@pytest.mark.parametrize("texts", [[], ["", " ", "?"]])
def test_a_corpus_without_words(texts: list[str]) -> None:
    index = Bm25Index.from_texts(texts)
    assert len(index) == len(texts)
    assert [p.text for p, _ in index.search("anything", 9)] == texts


def test_stopwords_do_not_count() -> None:
    index = Bm25Index.from_texts(["what is the what", "a ferry"], stopwords=["What", "THE", "is"])
    assert index.search("What is the ferry", 1)[0][0].text == "a ferry"
    assert index.search("what", 2)[0][1] == 0.0


def test_k_below_one_is_refused() -> None:
    with pytest.raises(PromptError, match="k is 0"):
        Bm25Index.from_texts(TEXTS).search("ferry", 0)


def test_nothing_is_printed_or_logged(
    capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    Bm25Index.from_texts(TEXTS).search("ferry", 2)
    assert capfd.readouterr() == ("", "")
    assert not caplog.records
    assert logging.getLogger("bm25s").level == logging.NOTSET  # bm25s itself sets DEBUG


def test_missing_bm25s_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bm25s", None)
    with pytest.raises(MissingExtraError, match=r'pip install "draftsieve\[retrieval\]"'):
        Bm25Index.from_texts(TEXTS)


def test_a_folder_becomes_passages_with_sources(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / ".git").mkdir()
    (tmp_path / "b" / "two.MD").write_text("# Leave\n\nTen days.\n\n# Pay\n\nMonthly.\n")
    (tmp_path / "a.txt").write_bytes("\ufeffÉté.\r\n\r\nHiver.\r\n".encode())
    (tmp_path / ".git" / "no.txt").write_text("hidden")
    (tmp_path / "no.xyz").write_text("other kind")
    (tmp_path / "empty.txt").write_text(" \n")
    passages = read_folder(tmp_path)
    assert [(p.id, p.text) for p in passages] == [
        ("a.txt#1", "Été.\n\nHiver."),
        ("b/two.MD#1", "# Leave\n\nTen days."),
        ("b/two.MD#2", "# Pay\n\nMonthly."),
    ]
    for passage in passages:
        text = (tmp_path / passage.metadata["source"]).read_text(encoding="utf-8-sig")
        assert text[passage.metadata["start"] : passage.metadata["end"]] == passage.text


def test_folders_that_cannot_be_read_say_why(tmp_path: Path) -> None:
    with pytest.raises(FolderError, match="does not exist"):
        read_folder(tmp_path / "gone")
    with pytest.raises(FolderError, match="holds no text"):
        read_folder(tmp_path)
    (tmp_path / "x.txt").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "y.docx").write_bytes(b"PK")
    with pytest.raises(FolderError, match=r"1 \.docx file not read: .*: y\.docx"):
        read_folder(tmp_path)
    with pytest.raises(FolderError, match="is a file"):
        read_folder(tmp_path / "x.txt")


MARKDOWN = """\
Preface.

# One
First paragraph of one, which is
two lines long.

Second paragraph. It has two sentences.
```
# no heading

code
```
## Two
Antidisestablishmentarianism and more words after it to be cut at spaces only.
"""


def test_headings_start_chunks_and_stay_with_their_text() -> None:
    chunks = [MARKDOWN[start:end] for start, end in paragraphs(MARKDOWN)]
    assert [chunk.split("\n")[0] for chunk in chunks] == ["Preface.", "# One", "## Two"]
    assert "# no heading\n\ncode" in chunks[1]
    assert paragraphs("# One\n## Two\n\nText.\n") == [(0, 19)]


@pytest.mark.parametrize("limit", [1, 7, 20, 45, 60, 200, 10_000])
@pytest.mark.parametrize("text", [MARKDOWN, "", " \n ", "x" * 50, "一。二三。" * 9, "a\r\n\r\nb c"])
def test_chunks_fit_and_hold_everything(text: str, limit: int) -> None:
    chunks = paragraphs(text, limit=limit)
    assert all(0 < end - start <= limit for start, end in chunks)
    assert all(first[1] <= second[0] for first, second in pairwise(chunks))
    kept = "".join(text[start:end] for start, end in chunks)
    assert "".join(kept.split()) == "".join(text.split())
    assert all(text[start:end].strip() == text[start:end] for start, end in chunks)


def test_fenced_code_stays_whole() -> None:
    text = "aaaa bbbb\n\n```\nx\n\ny\n```"
    chunks = [text[start:end] for start, end in paragraphs(text, limit=16)]
    assert chunks == ["aaaa bbbb", "```\nx\n\ny\n```"]


def test_long_paragraphs_are_cut_at_sentences_first() -> None:
    text = "One two three. Four five six. Seven eight nine ten."
    chunks = [text[start:end] for start, end in paragraphs(text, limit=32)]
    assert chunks == ["One two three. Four five six.", "Seven eight nine ten."]


def test_a_limit_below_one_is_refused() -> None:
    with pytest.raises(FolderError, match="limit is 0"):
        paragraphs("text", limit=0)

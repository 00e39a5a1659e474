"""The page that shows kept text: complete, escaped, self-contained."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from draftsieve.core.types import (
    Answer,
    CompressedContext,
    CompressionStats,
    Passage,
    PassageStats,
    Span,
    Usage,
)
from draftsieve.integrations.html_view import LEVELS, levels, render_html, segments

VOID = {"meta", "br"}


class Reader(HTMLParser):
    """Checks that tags are balanced and collects the text of each passage and each mark."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.passages: list[str] = []
        self.marked: list[str] = []
        self.directions: list[str | None] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        if self.open[-2:] == ["article", "p"]:
            self.passages.append("")
            self.directions.append(dict(attrs).get("dir"))
        if self.open[-3:] == ["article", "p", "mark"]:
            self.marked.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "article" in self.open and "p" in self.open:
            self.passages[-1] += data
            if self.open[-1] == "mark":
                self.marked[-1] += data


def context(
    passages: list[Passage], spans: list[Span], fallback: str | None = None
) -> CompressedContext:
    sizes = tuple(PassageStats(10, 4, 1.0) for _ in passages)
    stats = CompressionStats(40, 20, 30, 12, True, {"draft": 0.5}, fallback)
    return CompressedContext(
        "text", tuple(passages), tuple(range(len(passages))), tuple(spans), sizes, stats
    )


PASSAGES = [
    Passage('Five <b>bold</b> & "quoted" words', id="a<script>.md#1"),
    Passage("שלום עולם, זה טקסט", id="b.md#2"),
]
SPANS = [Span("a", 5, 16, 0.9, 0), Span("a", 17, 26, 0.1, 0), Span("b", 5, 9, 0.5, 1)]
ANSWER = Answer("<i>five</i>", tuple(SPANS), Usage(40, 20, 3), {"decode": 1.25}, "stop")


def test_every_character_of_every_passage_is_shown_and_kept_text_marked() -> None:
    page = Reader(render_html("Why?", ANSWER, context(PASSAGES, SPANS), PASSAGES))
    assert page.passages == [passage.text for passage in PASSAGES]
    expected = [PASSAGES[s.passage_index].text[s.start : s.end] for s in SPANS]
    assert page.marked == expected
    assert page.directions == ["auto", "auto"]


def test_nothing_is_unescaped_or_loaded_from_elsewhere() -> None:
    page = render_html("<script>alert(1)</script>", ANSWER, context(PASSAGES, SPANS), PASSAGES)
    body = page.split("</style>")[1]
    assert "<script" not in page
    assert "<i>" not in body
    assert "<b>" not in body
    assert not re.search(r"\b(src|href)\s*=|url\(|@import", page)


def test_figures_stand_in_the_header() -> None:
    page = render_html("Why?", ANSWER, context(PASSAGES, SPANS), PASSAGES)
    assert "40 → 20 (50% saved)" in page
    assert "30 → 12 (60% saved)" in page
    assert "1.250 s" in page


def test_an_evicted_cache_is_shown_with_the_drafts_guess() -> None:
    usage = Usage(40, 40, 3, cache_entries=10)
    answer = Answer("five", (), usage, {}, "stop", lookahead="<four>", cache_bytes=1_234_567)
    page = render_html("Why?", answer, None, PASSAGES)
    assert "<dd>40</dd>" in page
    assert "40 → 10 (75% saved)" in page
    assert "1.23 MB" in page
    assert "The draft guessed:</b> &lt;four&gt;" in page


def test_a_fallback_is_told() -> None:
    page = render_html("Why?", None, context(PASSAGES, SPANS, "it <broke>"), PASSAGES)
    assert "Not compressed: it &lt;broke&gt;" in page
    answer = replace(ANSWER, fallback="no <room>")
    assert "Not compressed: no &lt;room&gt;" in render_html("Why?", answer, None, PASSAGES)


def test_without_compression_passages_are_plain() -> None:
    page = Reader(render_html("Why?", ANSWER, None, PASSAGES))
    assert page.passages == [passage.text for passage in PASSAGES]
    assert page.marked == []


def test_no_passages_and_no_answer_still_make_a_page() -> None:
    assert Reader(render_html("Why?", None, None, [])).passages == []


@pytest.mark.parametrize(
    ("bounds", "pieces"),
    [
        ([], [("abcdef", False)]),
        ([(0, 6)], [("abcdef", True)]),
        ([(1, 3)], [("a", False), ("bc", True), ("def", False)]),
        ([(4, 9), (0, 2)], [("ab", True), ("cd", False), ("ef", True)]),
        ([(0, 3), (2, 4)], [("abc", True), ("d", True), ("ef", False)]),
    ],
)
def test_segments_partition_the_text(
    bounds: list[tuple[int, int]], pieces: list[tuple[str, bool]]
) -> None:
    spans = [Span("p", start, end, 1.0, 0) for start, end in bounds]
    found = [(piece, span is not None) for piece, span in segments("abcdef", spans)]
    assert found == pieces


def test_levels_rise_with_the_score_and_start_at_one() -> None:
    spans = [Span("p", i, i + 1, score, 0) for i, score in enumerate([0.0, 1e-6, 0.3, 0.3, 2.0])]
    found = [levels(spans)[span] for span in spans]
    assert found == [1, 2, 4, 4, LEVELS]
    assert levels([]) == {}

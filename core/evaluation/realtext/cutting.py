"""Long texts cut into passages at the ends of paragraphs and sentences."""

from __future__ import annotations

import re

from ...specpc.units import Bounds, sentence_spans

WORDS = 120  # of a passage at most
_PARAGRAPH = re.compile(r"\S(?:(?!\n[ \t]*\n).)*", re.DOTALL)


def cut(text: str, words: int = WORDS) -> Bounds:
    """Cut a text into passages.

    Args:
        text: Paragraphs with empty lines between them.
        words: A passage holds whole paragraphs up to this many words; of a longer paragraph it
            holds whole sentences, and of a longer sentence the whole.

    Returns:
        Ascending spans, which together hold every character but white space.
    """
    return _join(
        text, [span for p in _PARAGRAPH.finditer(text) for span in _parts(p, words)], words
    )


def _parts(paragraph: re.Match[str], words: int) -> Bounds:
    """The paragraph, or what a passage can hold of it at a time."""
    text, first = paragraph.group(), paragraph.start()
    if len(text.split()) <= words:
        return [(first, first + len(text.rstrip()))]
    return _join(paragraph.string, [(first + s, first + e) for s, e in sentence_spans(text)], words)


def _join(text: str, spans: Bounds, words: int) -> Bounds:
    """Neighbours put together while the words allow."""
    joined: Bounds = []
    for start, end in spans:
        if joined and len(text[joined[-1][0] : end].split()) <= words:
            joined[-1] = (joined[-1][0], end)
        else:
            joined.append((start, end))
    return joined

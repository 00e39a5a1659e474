"""Questions about sentences of natural text: quotations to complete, words that were taken out."""

from __future__ import annotations

import random
import re
from typing import NamedTuple

from draftsieve.core.evaluation.world.facts import stopwords

from .turns import LEAD, Excerpt, Turn

_QUOTE_FORMS = (
    'Complete the quotation: "{s} ..."',
    'How does this sentence go on: "{s} ..."',
    'What follows the words "{s} ..."?',
)
_CLOZE_FORMS = (
    'Which word is missing: "{s}"?',
    'What stands at the gap: "{s}"?',
    'Fill the gap: "{s}".',
)
_AROUND_FORMS = (
    "Which word stands in one sentence with {k}?",
    "What goes with {k}?",
)
BLANK = "___"
# first words of a question for a number, a name, another word; and what may stand before a key word
_ASKING = (
    ("How many", "When", "In which year", "Which number", "What"),
    ("Who", "Where", "Which", "What", "Whose"),
    ("What", "Why", "How", "Which"),
)
_BETWEEN = ("the", "of", "in", "did", "was", "to", "is", "by", "a", "does", "for", "and", "", "")


def quotation(rng: random.Random, sentences: list[str]) -> Turn | None:
    """The rest of a sentence of natural text."""
    candidates = [s for s in sentences if 6 <= len(s.split()) <= 16]
    if not candidates:
        return None
    sentence = rng.choice(candidates)
    words = sentence.split()
    start = rng.randrange(max(3, len(words) - 10), len(words) - 1)
    begun = " ".join(words[:start])
    question = rng.choice(_QUOTE_FORMS).format(s=begun)
    excerpt = Excerpt(sentence, len(begun) + 1, question.find(begun) + len(begun))
    return Turn(question, f"{LEAD}{' '.join(words[start:])}", "quotation", excerpt=excerpt)


def cloze(rng: random.Random, sentences: list[str]) -> Turn | None:
    """A number, a name or a long word that was taken out of a sentence of natural text.

    The question gives the words around it, or some words of the sentence, most often as if
    somebody had asked for it.
    """
    candidates = [s for s in sentences if 6 <= len(s.split()) <= 24]
    if not candidates:
        return None
    sentence = rng.choice(candidates)
    words = [_Word(m.start(), m.group()) for m in re.finditer(r"\w+(?:['-]\w+)*", sentence)]
    texts = [word.text for word in words]
    wanted = [
        n
        for n, word in enumerate(words)
        if n and sentence[word.start - 1] == " " and _worth_asking(word.text, texts)
    ]
    if not wanted:
        return None
    place = rng.choice(wanted)
    word = words[place]
    if rng.random() < 0.3:
        first, last = max(0, place - rng.randrange(3, 8)), place + rng.randrange(3, 8)
        begin, end = words[first].start, words[min(last, len(words) - 1)].end
        before, after = sentence[begin : word.start], sentence[word.end : end]
        question = rng.choice(_CLOZE_FORMS).format(s=f"{before}{BLANK}{after}")
        excerpt = Excerpt(sentence, word.start, question.find(f" {BLANK}"))
        return Turn(question, f"{LEAD}{word.text}", "cloze", excerpt=excerpt)
    others = [w for w in words if w is not word and w.text.lower() not in stopwords()]
    if len(others) < 3:
        return None
    chosen = rng.sample(others, min(len(others), rng.randrange(3, 7)))
    question, keys = _ask_with(rng, chosen, word.text)
    excerpt = Excerpt(sentence, word.start, keys=keys)
    return Turn(question, f"{LEAD}{word.text}", "cloze", excerpt=excerpt)


class _Word(NamedTuple):
    """A word of a sentence."""

    start: int
    text: str

    @property
    def end(self) -> int:
        return self.start + len(self.text)


def _ask_with(
    rng: random.Random, chosen: list[_Word], wanted: str
) -> tuple[str, tuple[tuple[int, int], ...]]:
    """A question made of these words, and where they end in it and in their sentence."""
    keys = []
    if rng.random() < 0.25:
        shown = ", ".join(f'"{word.text}"' for word in chosen)
        question = rng.choice(_AROUND_FORMS).format(k=shown)
        keys = [(question.find(f'"{word.text}"') + len(word.text) + 1, word.end) for word in chosen]
        return question, tuple(keys)
    if rng.random() < 0.5:
        chosen = sorted(chosen)
    question = rng.choice(_ASKING[0 if wanted[0].isdigit() else 1 if wanted[0].isupper() else 2])
    for word in chosen:
        between = rng.choice(_BETWEEN)
        text = word.text.lower() if word.start == 0 and rng.random() < 0.7 else word.text
        question += f" {between} {text}" if between else f" {text}"
        keys.append((len(question), word.end))
    return f"{question}?", tuple(keys)


def _worth_asking(word: str, words: list[str]) -> bool:
    telling = word[:1].isdigit() or word[:1].isupper() or len(word) >= 6
    return telling and words.count(word) == 1

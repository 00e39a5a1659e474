"""Links: where a model should look while it reads and answers; training has a loss for them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from tokenizers import Encoding

from .scenes import Scene, Stated
from .turns import LEAD, Excerpt, Sought, Turn

LINK_KINDS = (
    "value to name",
    "name to value",
    "name to second token of value",
    "name asked for",
    "value",
    "name",
    "rest of value",
    "what follows a quotation",
    "word beside key words",
    "key word",
    "value to the value before it",
    "fact to passage number",
)
EVIDENCE_KINDS = range(4, 11)  # these need others, which lie in the lower half of the layers
BOUND_STEPS = 3  # tokens of an answer that depend on the name; later ones follow from those before


class Link(NamedTuple):
    """A position, and an earlier one that a head should look at; `kind` is one of `LINK_KINDS`."""

    asking: int
    found: int
    kind: int


class _Fact(NamedTuple):
    """Tokens of the passages that state a fact."""

    first: int  # of the value
    last: int  # of the value
    name: int  # the last one of the entity's name

    @property
    def later(self) -> int:
        """Where value and name are both known."""
        return max(self.first, self.name)


@dataclass(frozen=True, slots=True)
class Reading:
    """Texts and tokens of one turn of a conversation."""

    scene: Scene
    text: str  # the first message, with the passages
    read: Encoding
    prompt_text: str  # this turn's message, the first one or a later one
    prompt: Encoding
    answer: Encoding
    asking: int  # position of the last token before the answer

    def links(self, turn: Turn) -> Iterator[Link]:
        """Where to look for the answer of the turn."""
        if turn.excerpt:
            yield from self._excerpt_links(turn.question, turn.excerpt)
        for sought in turn.evidence:
            yield from self._value_links(sought)

    def _value_links(self, sought: Sought) -> Iterator[Link]:
        """A value belongs to a name: the later of the two looks at the earlier one.

        The name in the question looks at the one in the fact. What begins the answer looks at the
        name in the question, and at the later of the two in the fact.
        """
        begin, fact = self.answer.char_to_token(sought.start), self._find(sought.stated)
        if fact is None or begin is None:
            return
        passage = self.scene.passages[sought.stated.passage - 1]
        bracket = self.read.char_to_token(self.text.index(passage) - len("] "))
        if bracket is not None:
            yield Link(fact.later, bracket, 11)
        before = self._find(sought.before) if sought.before else None
        if before and before.last < fact.first:
            yield Link(fact.first, before.last, 10)
        asked = self._name(sought)
        if asked is not None and asked <= self.asking:  # the question's name looks at the fact's
            yield Link(asked, fact.name, 9)
        said = self.answer.ids[begin:-1]
        if sought.number:
            for step in range(len(said) - 1):  # the digits, without the bracket behind them
                if asked is not None:
                    yield Link(self.asking + begin + step, asked, 3)
                kind = 4 if fact.first > fact.name else 5
                yield Link(self.asking + begin + step, fact.later, kind)
            return
        value = self.read.ids[fact.first : fact.last + 1]
        for step, (token, wanted) in enumerate(zip(said, value, strict=False)):
            if step and token != wanted:
                break
            if asked is not None and step < BOUND_STEPS:
                yield Link(self.asking + begin + step, asked, 3)
            yield from _step_links(step, fact.first, fact.name, self.asking + begin)

    def _excerpt_links(self, question: str, excerpt: Excerpt) -> Iterator[Link]:
        """The answer looks at the word before it in the question and at its own first token.

        Key words of the question look at themselves in the sentence.
        """
        start = self.text.find(excerpt.sentence)
        first = self.read.char_to_token(start + excerpt.start) if start >= 0 else None
        lead = self.answer.char_to_token(len(LEAD))
        if first is None or lead is None:
            return
        if excerpt.asked is not None:
            asked = self._question_token(question, excerpt.asked)
            if asked is not None:
                yield Link(self.asking + lead, asked, 3)
        for key, place in excerpt.keys:
            asking = self._question_token(question, key)
            found = self.read.char_to_token(start + place - 1)
            if asking is not None and found is not None:
                yield Link(asking, found, 9)
        begins = 8 if excerpt.asked is None else 7
        wanted = self.read.ids[first:]
        for step, token in enumerate(self.answer.ids[lead:-1]):
            if step >= len(wanted) or token != wanted[step]:
                break
            yield Link(self.asking + lead + step, first + step, 6 if step else begins)

    def _find(self, stated: Stated) -> _Fact | None:
        """The tokens of a fact."""
        sentence, fact = stated.sentence, stated.fact
        passage = self.text.index(self.scene.passages[stated.passage - 1])
        start = self.text.find(sentence, passage)
        value, name = sentence.find(fact.value), sentence.find(fact.entity)
        if min(start, value, name) < 0:
            return None
        places = value, value + len(fact.value) - 1, name + len(fact.entity) - 1
        first, last, end = (self.read.char_to_token(start + place) for place in places)
        return None if first is None or last is None or end is None else _Fact(first, last, end)

    def _name(self, sought: Sought) -> int | None:
        """Position of the end of the entity's name in the answer or the question."""
        entity = sought.stated.fact.entity
        if sought.said is not None:
            token = self.answer.char_to_token(sought.said + len(entity) - 1)
            return None if token is None else self.asking + 1 + token
        place = self.prompt_text.rfind(entity)
        return self._prompt_token(place + len(entity)) if place >= 0 else None

    def _question_token(self, question: str, end: int) -> int | None:
        """Position of the token that holds the character before `end` of the question."""
        return self._prompt_token(self.prompt_text.rfind(question) + end)

    def _prompt_token(self, end: int) -> int | None:
        token = self.prompt.char_to_token(end - 1)
        return None if token is None else self.asking + 1 - len(self.prompt.ids) + token


def _step_links(step: int, first: int, name: int, asking: int) -> Iterator[Link]:
    """Links of token `step` of a value that begins at `first`, with the name ending at `name`."""
    if first > name:
        if step < BOUND_STEPS:
            yield Link(first + step, name, 0)
        yield Link(asking + step, first + step, 6 if step else 4)
    elif step < 2:
        yield Link(name, first + step, 1 + step)
        yield Link(asking + step, name, 5)
    else:
        yield Link(asking + step, first + step, 6)

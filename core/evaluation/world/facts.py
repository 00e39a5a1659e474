"""Attributes with their paraphrases, read from `attributes.txt`."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from .names import words

_HEAD = re.compile(r"\[(\w+)\.(\w+)\] (\w+): ([^,]+?)(, multi)?$")
_STATEMENTS = (
    "The {l} of {e} is {v}.",
    "{e} has the {l} {v}.",
    "For {e}, the {l} is {v}.",
    "{v} is the {l} of {e}.",
)
_QUESTIONS = (
    "{w} is the {l} of {e}?",
    "{w} is the {l} of {e}?",
    "{w} is {e}'s {l}?",
    "State the {l} of {e}.",
    "Tell me the {l} of {e}.",
)
_MULTI_QUESTIONS = ("Name every {l} of {e}.", "List each {l} of {e}.")


@dataclass(slots=True)
class Attribute:
    """One property that entities of a kind can have."""

    kind: str
    key: str
    value_type: str
    label: str
    multi: bool
    statements: list[str] = field(default_factory=list)
    questions: list[str] = field(default_factory=list)
    distant: list[str] = field(default_factory=list)  # share only the entity's name

    @property
    def article(self) -> str:
        """The word before an entity's name of this kind, with its space."""
        return "the " if self.kind == "device" else ""

    @property
    def question_word(self) -> str:
        """`Who` for people, else `What`."""
        return "Who" if self.value_type == "person" else "What"


@dataclass(frozen=True, slots=True)
class Fact:
    """One statement of the world: the entity has this value."""

    entity: str
    attribute: Attribute
    value: str


@cache
def stopwords() -> frozenset[str]:
    """Function words, which do not count when question and statement are compared."""
    return frozenset(words("stopwords"))


def content_words(text: str) -> set[str]:
    """Lower-case words without function words, cut to five letters as a crude stem."""
    found = re.findall(r"[a-z]+", text.lower())
    return {word[:5] for word in found if word not in stopwords()}


def shares_only_name(question: str, statement: str, entity: str, value: str) -> bool:
    """Whether the question has no content word of its statement but the entity's name."""
    ignored = content_words(entity)
    said = content_words(statement.replace(value, " ")) - ignored
    return not (content_words(question) - ignored) & said


def load_attributes(path: Path | None = None) -> list[Attribute]:
    """Read `attributes.txt` and add the paraphrases made from the label."""
    attributes: list[Attribute] = []
    text = (path or Path(__file__).with_name("attributes.txt")).read_text(encoding="utf-8")
    for line in text.splitlines():
        if match := _HEAD.match(line):
            kind, key, value_type, label, multi = match.groups()
            attributes.append(Attribute(kind, key, value_type, label, multi is not None))
        elif line[:2] in ("+ ", "? ", "~ "):
            current = attributes[-1]
            lists = {"+": current.statements, "?": current.questions, "~": current.distant}
            lists[line[0]].append(line[2:])
    for attribute in attributes:
        _add_label_forms(attribute)
    return attributes


def _add_label_forms(attribute: Attribute) -> None:
    def fill(form: str) -> str:
        form = form.replace("{e}", attribute.article + "{e}")
        form = form.replace("{l}", attribute.label).replace("{w}", attribute.question_word)
        return form[0].upper() + form[1:] if form[0] != "{" else form

    if attribute.multi:
        attribute.statements.append(fill("{v} is a {l} of {e}."))
        attribute.questions.extend(fill(form) for form in _MULTI_QUESTIONS)
        return
    attribute.statements.extend(fill(form) for form in _STATEMENTS)
    attribute.questions.extend(fill(form) for form in _QUESTIONS)

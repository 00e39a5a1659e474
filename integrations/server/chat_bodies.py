"""What of a chat request may be shortened: long tool results, and documents.

System text, tool schemas, what user and assistant said, and everything up to the caller's last
`cache_control` mark stay as they are. Nothing else of the request is looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...core.conversation.turns import ShortTurn

Shorten = Callable[[str, Sequence[str]], Sequence[ShortTurn]]  # of a turn: its request, its texts
_RESULTS = ("tool", "function")  # roles
_TEXTS = ("text", "content", "data")  # where servers look for a document's text, in this order


@dataclass(frozen=True, slots=True)
class Shortened:
    """A request as it is sent on; sizes in draft tokens of what could be shortened."""

    body: Mapping[str, Any]
    tokens: int = 0
    original_tokens: int = 0
    texts: tuple[tuple[str, str], ...] = ()  # original and what is sent, where these differ

    @property
    def changed(self) -> bool:
        """Whether anything was shortened."""
        return bool(self.texts)


@dataclass(frozen=True, slots=True)
class _Group:
    """Texts that came together, each with its path in the body."""

    question: str
    places: tuple[tuple[Any, ...], ...]
    texts: tuple[str, ...]


def shorten_chat(body: Mapping[str, Any], shorten: Shorten) -> Shortened:
    """Shorten a chat completion's request.

    Args:
        body: As it came; it is not changed.
        shorten: What becomes of texts that came together. The same texts and request must always
            become the same.

    Returns:
        The request with shorter texts, everything else as it was.
    """
    found: dict[str, Any] = dict(body)
    before = after = 0
    changed: list[tuple[str, str]] = []
    for group in _groups(body):
        for place, text, short in zip(
            group.places, group.texts, shorten(group.question, group.texts), strict=True
        ):
            before, after = before + short.original_tokens, after + short.tokens
            if short.shortened:
                found = _with(found, place, short.text)
                changed.append((text, short.text))
    return Shortened(found, after, before, tuple(changed))


def _groups(body: Mapping[str, Any]) -> Iterator[_Group]:
    """Results of the tools that an assistant called together; and the documents."""
    messages = body.get("messages")
    messages = messages if isinstance(messages, list) else []
    question, places, texts = "", [], []
    for index in range(len(messages)):
        message = messages[index] if isinstance(messages[index], dict) else {}
        if message.get("role") in _RESULTS:
            if index > _marked(messages):
                for place, text in _parts(message, ("messages", index)):
                    places.append(place)
                    texts.append(text)
            continue
        if places and question:
            yield _Group(question, tuple(places), tuple(texts))
        places, texts = [], []
        if message.get("role") == "user":
            question = _said(message) or question
    if places and question:
        yield _Group(question, tuple(places), tuple(texts))
    documents = body.get("documents")
    if isinstance(documents, list) and question:
        named = list(_documents(documents))
        if named:
            yield _Group(question, *(tuple(column) for column in zip(*named, strict=True)))


def _marked(messages: Sequence[Any]) -> int:
    """The last message that is marked for the provider's cache, -1 if none is."""

    def marked(value: Any) -> bool:
        if isinstance(value, dict):
            return "cache_control" in value or any(map(marked, value.values()))
        return isinstance(value, list) and any(map(marked, value))

    return max((index for index, each in enumerate(messages) if marked(each)), default=-1)


def _parts(
    message: Mapping[str, Any], place: tuple[Any, ...]
) -> Iterator[tuple[tuple[Any, ...], str]]:
    """The texts of a message, and where each of them stands."""
    content = message.get("content")
    if isinstance(content, str):
        yield (*place, "content"), content
    for index, part in enumerate(content if isinstance(content, list) else ()):
        if isinstance(part, dict) and isinstance(part.get("text"), str):
            yield (*place, "content", index, "text"), part["text"]


def _said(message: Mapping[str, Any]) -> str:
    return "\n".join(text for _, text in _parts(message, ())).strip()


def _documents(documents: Sequence[Any]) -> Iterator[tuple[tuple[Any, ...], str]]:
    for index, document in enumerate(documents):
        if isinstance(document, str):
            yield ("documents", index), document
        elif isinstance(document, dict):
            names = (name for name in _TEXTS if isinstance(document.get(name), str))
            if (name := next(names, None)) is not None:
                yield ("documents", index, name), document[name]


def _with(value: Any, place: tuple[Any, ...], text: str) -> Any:
    """A copy with another text at a place; what does not lie on the way is shared."""
    if not place:
        return text
    copy = dict(value) if isinstance(value, Mapping) else list(value)
    copy[place[0]] = _with(value[place[0]], place[1:], text)
    return copy

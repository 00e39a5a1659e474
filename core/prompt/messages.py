"""What is asked: messages, passages and tools, before any tokenizer has seen them.

Layout of a message's passages, on which the bundled models are trained:
"[1] first text", blank line, "[2] second text", blank line, "Question: ...". A passage's number
is its place and never changes: a passage without text is left out together with its number.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..errors import PromptError
from ..types import Passage, Segment

DEFAULT_SYSTEM = "Answer the question using only the passages."
QUESTION_HEADING = "Question: "
SEPARATOR = "\n\n"
SYSTEM_ROLES = frozenset({"system", "developer"})


@dataclass(frozen=True, slots=True)
class Part:
    """A stretch of a message. Where `passage` is set, the text is that of the prompt's passage."""

    text: str
    segment: Segment
    passage: int | None = None


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. `extra` (tool_calls, tool_call_id, ...) goes to the chat template as it is."""

    role: str
    parts: tuple[Part, ...]
    extra: Mapping[str, Any] = field(default_factory=dict, hash=False)


@dataclass(frozen=True, slots=True)
class Prompt:
    """A whole request: what is said, what was retrieved, which tools there are.

    Passage ids default to the passage's number ("1", "2", ...). Ids given by the caller are kept
    even when two passages share one, as retrievers do return duplicates; spans name passages by
    id, so give different ids where you must tell such passages apart.
    """

    messages: tuple[Message, ...]
    passages: tuple[Passage, ...]
    tools: tuple[Mapping[str, Any], ...] | None = None

    @classmethod
    def from_question(
        cls,
        question: str,
        passages: Sequence[str | Passage],
        *,
        system: str | None = DEFAULT_SYSTEM,
    ) -> Prompt:
        """Build the prompt for one question over passages.

        Args:
            question: What is asked.
            passages: Retrieved texts, in the order in which they are numbered.
            system: Text of the system message; None or "" for none.

        Returns:
            An optional system message and one user message: the numbered passages, then
            "Question: " and the question.

        Raises:
            PromptError: The question is empty, or something is not a string.
        """
        if not _text(question, "question").strip():
            raise PromptError("The question is empty: say what the passages shall answer.")
        taken = _passages(passages)
        heading = Part(QUESTION_HEADING, Segment.MESSAGE)
        user = Message(
            "user", (*_slots(range(len(taken))), heading, Part(question, Segment.QUESTION))
        )
        if system is None or not _text(system, "system text"):
            return cls((user,), taken)
        return cls((Message("system", (Part(system, Segment.SYSTEM),)), user), taken)

    @classmethod
    def from_messages(
        cls,
        messages: Sequence[Mapping[str, Any]],
        documents: Sequence[str | Passage] = (),
        tools: Sequence[Mapping[str, Any]] | None = None,
        schema: Mapping[str, Any] | None = None,
    ) -> Prompt:
        """Build a prompt from chat messages as chat templates take them.

        Args:
            messages: Mappings with "role", "content" and what else the template knows
                ("tool_calls", "tool_call_id", ...). Content is a string, None, or a list of
                {"type": "text", "text": ...} and {"type": "document", "text": ...} blocks; a
                document may have "id", "title" (kept as metadata) and "metadata", and becomes a
                passage in its place. Adjoining text blocks are joined without a separator.
            documents: Passages to stand, numbered, in front of the last user message's text.
                They take the first numbers; document blocks follow in order of appearance.
            tools: JSON schemas of tools, for the template.
            schema: JSON schema that the answer shall fit; the system text says so. To enforce it,
                generate with `Grammar.json_schema`.

        Returns:
            The prompt. Only documents may be compressed.

        Raises:
            PromptError: No messages, no user message for the documents, an empty last user
                message, a content block of another type, a tool call that cannot be read, or a
                wrong Python type.
        """
        found = list(_passages(documents))
        asking = _last_user(messages)
        if documents and asking is None:
            raise PromptError(
                "There are documents but no user message to put them in front of: add one."
            )
        read = [_message(m, found, asked=i == asking) for i, m in enumerate(messages)]
        if asking is not None:
            slots = _slots(range(len(documents)))
            read[asking] = replace(read[asking], parts=(*slots, *read[asking].parts))
            if not any(p.passage is not None or p.text.strip() for p in read[asking].parts):
                raise PromptError("The last user message is empty: say what is asked.")
        if schema is not None:
            shown = json.dumps(schema, ensure_ascii=False)
            read = add_system(read, f"Answer with JSON that fits this JSON schema:\n{shown}")
        return cls(tuple(read), tuple(found), None if tools is None else tuple(tools))

    def with_texts(self, texts: Sequence[str]) -> Prompt:
        """Return the same prompt with other passage texts.

        Args:
            texts: One text for each passage; "" leaves the passage out, number included.

        Returns:
            A prompt whose passages keep their ids, metadata and numbers.

        Raises:
            PromptError: There are more or fewer texts than passages, or one is not a string.
        """
        if len(texts) != len(self.passages):
            raise PromptError(
                f"Got {len(texts)} texts for {len(self.passages)} passages: give one for each."
            )
        pairs = zip(self.passages, texts, strict=True)
        changed = tuple(replace(passage, text=_text(text, "passage")) for passage, text in pairs)
        return replace(self, passages=changed)

    def layout(self, message: Message) -> tuple[Part, ...]:
        """Fill in a message's passages, their numbers and the blank lines around them.

        Args:
            message: One of this prompt's messages.

        Returns:
            The parts, none empty, whose texts put together are the message's content.
        """
        laid: list[Part] = []
        after_passage = False
        for part in message.parts:
            shown = part if part.passage is None else self._shown(part.passage)
            if shown is None or not shown.text:
                continue
            if laid and (after_passage or shown.passage is not None):
                laid.append(Part(SEPARATOR, Segment.MESSAGE))
            if shown.passage is not None:
                laid.append(Part(_number(shown.passage), Segment.NUMBER))
            laid.append(shown)
            after_passage = shown.passage is not None
        return tuple(laid)

    @property
    def question(self) -> str:
        """Own text of the last user message, without documents; "" if there is none."""
        users = [m for m in self.messages if m.role == "user"]
        parts = users[-1].parts if users else ()
        return "".join(p.text for p in parts if p.segment == Segment.QUESTION)

    @property
    def documents_text(self) -> str:
        """The numbered passages as they stand in the prompt, with blank lines between them."""
        shown = (p for m in self.messages for p in map(_index, m.parts) if p is not None)
        parts = (part for i in shown if (part := self._shown(i)) is not None)
        return SEPARATOR.join(_number(p.passage or 0) + p.text for p in parts)

    def _shown(self, index: int) -> Part | None:
        """The passage as a part, or None if it has no text."""
        text = self.passages[index].text
        return Part(text, Segment.PASSAGE, index) if text.strip() else None


def add_system(messages: Sequence[Message], text: str) -> list[Message]:
    """Add text to the first system message; without one in front, make one."""
    if messages and messages[0].role in SYSTEM_ROLES:
        part = Part(SEPARATOR + text, Segment.SYSTEM)
        first = replace(messages[0], parts=(*messages[0].parts, part))
        return [first, *messages[1:]]
    return [Message("system", (Part(text, Segment.SYSTEM),)), *messages]


def _number(index: int) -> str:
    return f"[{index + 1}] "


def _index(part: Part) -> int | None:
    return part.passage


def _slots(indices: Iterable[int]) -> tuple[Part, ...]:
    """Places that `Prompt.layout` fills with passages."""
    return tuple(Part("", Segment.PASSAGE, index) for index in indices)


def _text(value: object, name: str) -> str:
    if not isinstance(value, str):
        raise PromptError(f"The {name} must be a string, not {type(value).__name__}.")
    return value


def _passages(values: Sequence[str | Passage]) -> tuple[Passage, ...]:
    if isinstance(values, str):
        raise PromptError("Passages must be a sequence of texts, not one string: put it in a list.")
    return tuple(_passage(value, index) for index, value in enumerate(values))


def _passage(value: object, index: int) -> Passage:
    """Passage `index` of a prompt, with an id."""
    if not isinstance(value, str | Passage):
        raise PromptError(
            f"Passage {index + 1} must be a string or a Passage, not {type(value).__name__}."
        )
    passage = Passage(value) if isinstance(value, str) else value
    _text(passage.text, f"text of passage {index + 1}")
    return passage if passage.id is not None else replace(passage, id=str(index + 1))


def _last_user(messages: Sequence[Mapping[str, Any]]) -> int | None:
    """Index of the last user message; checks the messages' form on the way."""
    if isinstance(messages, str | Mapping) or not messages:
        raise PromptError("Messages must be a non-empty sequence of {'role': ..., 'content': ...}.")
    last = None
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise PromptError(f"Message {index + 1} is not a mapping with a 'role' string.")
        last = index if message["role"] == "user" else last
    return last


def _message(message: Mapping[str, Any], found: list[Passage], *, asked: bool) -> Message:
    """Read one message; its documents are appended to `found`."""
    role, content = message["role"], message.get("content")
    extra = {key: value for key, value in message.items() if key not in ("role", "content")}
    for call in extra.get("tool_calls") or ():
        _check_call(call)
    if content is None:
        return Message(role, (), {**extra, "content": None})
    segment = Segment.SYSTEM if role in SYSTEM_ROLES else Segment.MESSAGE
    segment = Segment.QUESTION if asked else segment
    if isinstance(content, str):
        return Message(role, (Part(content, segment),), extra)
    if not isinstance(content, Sequence):
        raise PromptError(
            f"The content of a {role} message must be a string or a list of blocks, "
            f"not {type(content).__name__}."
        )
    return Message(role, tuple(_block(block, segment, found) for block in content), extra)


def _check_call(call: object) -> None:
    """Refuse what no template could write as a call."""
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise PromptError(
            f"A tool call is no mapping with a function's name and arguments: {call!r}."
        )
    call_arguments(function["name"], function.get("arguments"))


def call_arguments(name: str, arguments: object) -> dict[str, Any]:
    """The arguments of a tool call, which some models give as JSON text.

    Raises:
        PromptError: They are no JSON object.
    """
    found, why = arguments or {}, "not one"
    if isinstance(found, str):
        try:
            found = json.loads(found)
        except ValueError as error:
            why = str(error)
    if isinstance(found, Mapping):
        return dict(found)
    raise PromptError(
        f"The arguments of a call of {name!r} are no JSON object ({why}): {arguments!r}. Mend the "
        "call, or leave it out of the conversation."
    )


def _block(block: object, segment: Segment, found: list[Passage]) -> Part:
    """Read one content block; a document is appended to `found`."""
    if isinstance(block, str):
        return Part(block, segment)
    kind = block.get("type") if isinstance(block, Mapping) else type(block).__name__
    if not isinstance(block, Mapping) or kind not in ("text", "document"):
        raise PromptError(f"Content blocks are of type 'text' or 'document', not {kind!r}.")
    text = _text(block.get("text"), f"'text' of a {kind} block")
    if kind == "text":
        return Part(text, segment)
    title = {} if block.get("title") is None else {"title": block["title"]}
    identifier = None if block.get("id") is None else str(block["id"])
    passage = Passage(text, identifier, {**title, **(block.get("metadata") or {})})
    found.append(_passage(passage, len(found)))
    return _slots([len(found) - 1])[0]

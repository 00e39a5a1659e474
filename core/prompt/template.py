"""A prompt is rendered by the chat template into pieces that remember where they come from.

The template gets a random placeholder for every text, so what stands between two placeholders was
written by the template itself, and only that is trusted to hold control tokens. Whitespace around
a placeholder shows whether the template trims or JSON-quotes the text, which is then done to the
text too. System text that a template refuses or drops goes in front of the first user message.

Limits: roles and `template_options` are trusted. A template sees a placeholder for each message,
so one that edits message text otherwise than by trimming or JSON quoting it (Qwen3 cuts the
thoughts out of earlier answers) leaves it as it is here. Tools go to templates that write calls as
`tools.py` reads them; for others they are described in the system text.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

from ..errors import PromptError
from ..types import Segment
from .messages import SEPARATOR, SYSTEM_ROLES, Message, Part, Prompt
from .tool_calls import in_plain_words, knows_tools

PLAIN_TEMPLATE = (
    "{{ bos_token or '' }}{% for message in messages %}"
    "{{ message.role | capitalize }}: {{ message.content or '' }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
"""For tokenizers without a chat template: "User: ...", a blank line, "Assistant:"."""

DEFAULT_TEMPLATE_OPTIONS: Mapping[str, Any] = {"enable_thinking": False}

# Around each placeholder: trimming removes it, which shows how the template treats the text.
_EDGE, _LINES = "\u2003", "\n" * 5
_QUOTED_LINES = json.dumps(_LINES)[1:-1]


class Piece(NamedTuple):
    """A stretch of the rendered prompt."""

    text: str
    segment: Segment = Segment.TEMPLATE
    passage: int = -1
    trusted: bool = False  # written by the template: may hold control tokens
    # (characters,) of quoted text: each character's place in the original
    origin: npt.NDArray[np.int64] | None = None


class ChatTemplate:
    """The chat template of one tokenizer.

    Args:
        tokenizer: One without a chat template gets `PLAIN_TEMPLATE`.
        options: Variables for the template; `DEFAULT_TEMPLATE_OPTIONS` where None.
        control: Matches the control tokens, which tools and tool calls must not bring in.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        options: Mapping[str, Any] | None,
        control: re.Pattern[str],
    ) -> None:
        self._options = dict(DEFAULT_TEMPLATE_OPTIONS if options is None else options)
        self._tokenizer = tokenizer
        self._template = None if tokenizer.chat_template else PLAIN_TEMPLATE
        self._knows_tools = knows_tools(tokenizer.chat_template)
        self._control = control

    def render(self, prompt: Prompt) -> list[Piece]:
        """Render a prompt, up to and including the generation prompt.

        Args:
            prompt: What to render.

        Returns:
            The pieces in order; their texts put together are the rendered prompt.

        Raises:
            PromptError: The template fails, or drops or repeats the text of a message.
        """
        turns = [replace(m, parts=prompt.layout(m)) for m in prompt.messages]
        tools = prompt.tools
        if not self._knows_tools and (tools or any(t.extra.get("tool_calls") for t in turns)):
            turns, tools = in_plain_words(turns, tools), None
        if self._adds_system:
            turns = _own_system(turns)
        try:
            return self._render_turns(turns, tools)
        except PromptError:
            if not any(turn.role in SYSTEM_ROLES for turn in turns):
                raise
            return self._render_turns(_merge_system(turns), tools)

    def _render_turns(
        self, turns: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None
    ) -> list[Piece]:
        """Apply the chat template to placeholders and cut the result into pieces."""
        marks = _Marks(turns, self._control)
        messages = [marks.message(index, turn) for index, turn in enumerate(turns)]
        masked = None if tools is None else marks.masked(list(tools))
        return list(marks.cut(self._apply(messages, masked)))

    def _apply(self, messages: list[dict[str, Any]], tools: Any = None) -> str:
        try:
            rendered = self._tokenizer.apply_chat_template(
                messages,
                tools=tools,
                chat_template=self._template,
                tokenize=False,
                add_generation_prompt=True,
                **self._options,
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise PromptError(
                f"The tokenizer's chat template refuses these messages: {error}"
            ) from error
        return str(rendered)

    @cached_property
    def _adds_system(self) -> bool:
        """Whether the template writes a text of its own where there is no system text."""
        system, user = {"role": "system", "content": "SYS"}, {"role": "user", "content": "USR"}
        try:
            with_system, without = self._apply([system, user]), self._apply([user])
        except PromptError:
            return False
        head, _, between = with_system.partition("USR")[0].partition("SYS")
        start = without.partition("USR")[0]
        same = start.startswith(head) and start.endswith(between)
        return same and len(start) > len(head) + len(between)


class _Marks:
    """Placeholders for one rendering: of whole messages, and of control strings elsewhere."""

    def __init__(self, turns: Sequence[Message], control: re.Pattern[str]) -> None:
        self._turns = turns
        self._texts = ["".join(part.text for part in turn.parts) for turn in turns]
        self._control = control
        self._masked: list[str] = []
        self._stem = "x" + secrets.token_hex(12)
        while any(self._stem in text for text in self._texts):
            self._stem = "x" + secrets.token_hex(12)

    def message(self, index: int, turn: Message) -> dict[str, Any]:
        """Turn `index` as the template gets it."""
        mark = f"{_LINES}{_EDGE}{self._stem}t{index}e{_EDGE}{_LINES}"
        content = mark if turn.parts else ""
        return {"role": turn.role, "content": content, **self.masked(dict(turn.extra))}

    def masked(self, value: Any) -> Any:
        """Replace the control strings in tools and tool calls by placeholders."""
        if isinstance(value, str):
            return self._control.sub(self._mask, value)
        if isinstance(value, Mapping):
            return {self.masked(key): self.masked(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.masked(item) for item in value]
        return value

    def _mask(self, match: re.Match[str]) -> str:
        self._masked.append(match[0])
        return f"{self._stem}m{len(self._masked) - 1}e"

    def cut(self, rendered: str) -> Iterator[Piece]:
        """Put the texts back in; what stands between them was written by the template."""
        found = list(re.finditer(rf"{self._stem}([tm])(\d+)e", rendered))
        self._check([int(match[2]) for match in found if match[1] == "t"])
        last, left = 0, 0
        for match, following in zip(found, [*found[1:], None], strict=True):
            before = rendered[last : match.start()]
            after = rendered[match.end() : following.start() if following else len(rendered)]
            last = match.end()
            if match[1] == "m":
                yield Piece(before[left:], trusted=True)
                yield Piece(self._masked[int(match[2])])
                left = 0
                continue
            quoted, front, front_trim = _edge(before, front=True)
            _, back, back_trim = _edge(after, front=False)
            yield Piece(before[left : len(before) - front], trusted=True)
            left = back
            parts = _trimmed(self._turns[int(match[2])].parts, front_trim, back_trim)
            yield from (_quoted(piece) if quoted else piece for piece in parts)
        yield Piece(rendered[last + left :], trusted=True)

    def _check(self, found: Sequence[int]) -> None:
        """Every text must stand in the prompt exactly once."""
        for index, turn in enumerate(self._turns):
            if self._texts[index] and found.count(index) != 1:
                done = "drops" if index not in found else "repeats"
                raise PromptError(
                    f"The tokenizer's chat template {done} the text of the {turn.role} message "
                    f"(number {index + 1}). Use a role that the template knows, or another "
                    "template."
                )


def _edge(context: str, *, front: bool) -> tuple[bool, int, str | None]:
    """How a template treated one edge of a text, read off what is left of the padding.

    Returns:
        Whether the text is JSON-quoted, the number of padding characters left, and what to trim:
        None for all whitespace, else the characters ("" for nothing).
    """
    for quoted, lines, trim in ((False, _LINES, ""), (True, _QUOTED_LINES, ""), (False, "", "\n")):
        if front and context.endswith(lines + _EDGE):
            return quoted, len(lines) + 1, trim
        if not front and context.startswith(_EDGE + lines):
            return quoted, len(lines) + 1, trim
    return False, 0, None


def _trimmed(parts: Sequence[Part], front: str | None, back: str | None) -> Iterator[Piece]:
    """The parts as untrusted pieces, less what the template trims off the whole text's edges."""
    text = "".join(part.text for part in parts)
    first, stop = len(text) - len(text.lstrip(front)), len(text.rstrip(back))
    place = 0
    for part in parts:
        kept = part.text[max(0, first - place) : max(0, stop - place)]
        place += len(part.text)
        yield Piece(kept, part.segment, -1 if part.passage is None else part.passage)


def _quoted(piece: Piece) -> Piece:
    """The piece as it stands inside a JSON string."""
    lengths = [len(json.dumps(char, ensure_ascii=False)) - 2 for char in piece.text]
    origin = np.repeat(np.arange(len(lengths)), np.array(lengths, dtype=np.int64))
    return piece._replace(text=json.dumps(piece.text, ensure_ascii=False)[1:-1], origin=origin)


def _own_system(turns: Sequence[Message]) -> list[Message]:
    """The turns behind a system message of their own, which may be empty."""
    has_one = turns[0].role in SYSTEM_ROLES
    first, rest = (turns[0], turns[1:]) if has_one else (Message("system", ()), turns)
    parts = first.parts or (Part("", Segment.SYSTEM),)  # with a part it gets a placeholder
    return [replace(first, role="system", parts=parts), *rest]


def _merge_system(turns: Sequence[Message]) -> list[Message]:
    """Put all system text in front of the first user message."""
    gap = Part(SEPARATOR, Segment.MESSAGE)
    system = [part for t in turns if t.role in SYSTEM_ROLES for part in (*t.parts, gap) if t.parts]
    merged = [turn for turn in turns if turn.role not in SYSTEM_ROLES]
    for index, turn in enumerate(merged):
        if turn.role == "user":
            merged[index] = replace(turn, parts=(*system, *turn.parts))
            return merged
    raise PromptError(
        "The tokenizer's chat template takes no system message and there is no user message to "
        "put its text into: add one."
    )

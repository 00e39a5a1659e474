"""A prompt becomes tokens that remember where they come from.

The chat template is rendered with random placeholders for every text. Control tokens are looked
for only in what the template itself wrote; each stretch between two of them is encoded as one
string by a copy of the tokenizer that has no control tokens. So no text (passage, question,
system text, tool result) can become a control token, and a harmless prompt gets the ids that
`tokenizer.apply_chat_template` gives it.

Limits: roles and `template_options` are trusted. A template sees a placeholder for each message,
so one that edits message text otherwise than by trimming or JSON quoting it (Qwen3 cuts the
thoughts out of earlier answers) leaves it as it is here. Every added token counts as a control
token, plain words that were added for fine-tuning too. Tokens added to a tokenizer after its
encoder was made are not known to it. A control token of a single character that the model's own
vocabulary spells stays reachable. Control tokens are found as written: a normalizer that changes
them (flag `normalized`, with Llama's old "Prepend") is not imitated.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from jinja2.exceptions import TemplateError
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from .errors import ModelError, PromptError
from .prompt import SEPARATOR, SYSTEM_ROLES, Message, Part, Prompt
from .types import PromptTokens, Segment

PLAIN_TEMPLATE = (
    "{% if tools %}{{ raise_exception('This model has no chat template and so no way to be told "
    "of tools.') }}{% endif %}{{ bos_token or '' }}{% for message in messages %}"
    "{{ message.role | capitalize }}: {{ message.content or '' }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
"""For tokenizers without a chat template: "User: ...", a blank line, "Assistant:"."""

DEFAULT_TEMPLATE_OPTIONS: Mapping[str, Any] = {"enable_thinking": False}

_Ints = npt.NDArray[np.int64]
_Json = dict[str, Any]
_SURROGATE = re.compile("[\ud800-\udfff]")
# What the tokenizers library counts as whitespace.
_SPACES = "".join(c for c in map(chr, range(0x3001)) if c.isspace() and c not in "\x1c\x1d\x1e\x1f")
# Around each placeholder: trimming removes it, which shows how the template treats the text.
_EDGE, _LINES = "\u2003", "\n" * 5
_QUOTED_LINES = json.dumps(_LINES)[1:-1]


class _Piece(NamedTuple):
    """A stretch of the rendered prompt."""

    text: str
    segment: Segment = Segment.TEMPLATE
    passage: int = -1
    trusted: bool = False  # written by the template: may hold control tokens
    origin: _Ints | None = None  # of quoted text: each character's place in the original


class _Encoded(NamedTuple):
    """Tokens in order, with the characters each covers before any gap is filled."""

    ids: _Ints
    start: _Ints
    end: _Ints


@dataclass(frozen=True, slots=True)
class _Control:
    """An added token as the tokenizer matches it."""

    id: int
    lstrip: bool
    rstrip: bool


class PromptEncoder:
    """Turns prompts into tokens with one tokenizer; safe to share between threads.

    Args:
        tokenizer: A tokenizer backed by the `tokenizers` library. One without a chat template
            gets `PLAIN_TEMPLATE`. It is read once and never changed.
        template_options: Variables for the chat template; {"enable_thinking": False} by default.

    Raises:
        ModelError: The tokenizer has no `tokenizers` backend.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template_options: Mapping[str, Any] | None = None,
    ) -> None:
        options = DEFAULT_TEMPLATE_OPTIONS if template_options is None else template_options
        self._options = dict(options)
        self._tokenizer = tokenizer
        self._template = None if tokenizer.chat_template else PLAIN_TEMPLATE
        self._plain = _PlainText(tokenizer)

    def encode(self, prompt: Prompt) -> PromptTokens:
        """Render and tokenise a prompt, up to and including the generation prompt.

        A token is its passage's if it covers any character of it, else it belongs to the last
        segment it touches. Each character of a passage lies in the span of one of its tokens;
        what no token covers (trimmed or normalised away) is added to the token before. System
        text that the template refuses or drops is put in front of the first user message.

        Args:
            prompt: What to encode.

        Returns:
            The tokens, with their segment, passage and character span in the passage's text.

        Raises:
            PromptError: The template fails, or drops or repeats the text of a message.
        """
        pieces = self._render(prompt)
        text = _SURROGATE.sub("\ufffd", "".join(piece.text for piece in pieces))
        bounds = np.cumsum([0, *(len(piece.text) for piece in pieces)])
        return _locate(self._plain.encode_rendered(text, pieces, bounds), pieces, bounds, prompt)

    def encode_text(self, text: str) -> list[int]:
        """Tokenise plain text: no control tokens, nothing added.

        Args:
            text: Any text.

        Returns:
            Token ids.
        """
        ids: list[int] = self._plain.encode_text(text).ids.tolist()
        return ids

    def count(self, text: str) -> int:
        """Count the tokens of plain text.

        Args:
            text: Any text.

        Returns:
            The length of `encode_text(text)`.
        """
        return len(self._plain.encode_text(text).ids)

    def offsets(self, text: str) -> list[tuple[int, int]]:
        """Say which characters each token of `encode_text(text)` covers.

        Args:
            text: Any text.

        Returns:
            A (start, end) for each token, ascending. Tokens that share a character share a
            span; the different spans follow each other without gap or overlap and cover the text.
        """
        encoded = self._plain.encode_text(text)
        start, end = _cover(encoded.start, 0, len(text))
        return list(zip(start.tolist(), end.tolist(), strict=True))

    def _render(self, prompt: Prompt) -> list[_Piece]:
        turns = [replace(m, parts=prompt.layout(m)) for m in prompt.messages]
        try:
            return self._render_turns(turns, prompt.tools)
        except PromptError:
            if not any(turn.role in SYSTEM_ROLES for turn in turns):
                raise
            return self._render_turns(_merge_system(turns), prompt.tools)

    def _render_turns(
        self, turns: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None
    ) -> list[_Piece]:
        """Apply the chat template to placeholders and cut the result into pieces."""
        marks = _Marks(turns, self._plain.control_pattern)
        messages = [marks.message(index, turn) for index, turn in enumerate(turns)]
        try:
            rendered = self._tokenizer.apply_chat_template(
                messages,
                tools=None if tools is None else marks.masked(list(tools)),
                chat_template=self._template,
                tokenize=False,
                add_generation_prompt=True,
                **self._options,
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise PromptError(
                f"The tokenizer's chat template refuses these messages: {error}"
            ) from error
        return list(marks.cut(str(rendered)))


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
        content = mark if self._texts[index] else ""
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

    def cut(self, rendered: str) -> Iterator[_Piece]:
        """Put the texts back in; what stands between them was written by the template."""
        found = list(re.finditer(rf"{self._stem}([tm])(\d+)e", rendered))
        self._check([int(match[2]) for match in found if match[1] == "t"])
        last, left = 0, 0
        for match, following in zip(found, [*found[1:], None], strict=True):
            before = rendered[last : match.start()]
            after = rendered[match.end() : following.start() if following else len(rendered)]
            last = match.end()
            if match[1] == "m":
                yield _Piece(before[left:], trusted=True)
                yield _Piece(self._masked[int(match[2])])
                left = 0
                continue
            quoted, front, front_trim = _edge(before, front=True)
            _, back, back_trim = _edge(after, front=False)
            yield _Piece(before[left : len(before) - front], trusted=True)
            left = back
            parts = _trimmed(self._turns[int(match[2])].parts, front_trim, back_trim)
            yield from (_quoted(piece) if quoted else piece for piece in parts)
        yield _Piece(rendered[last + left :], trusted=True)

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


def _trimmed(parts: Sequence[Part], front: str | None, back: str | None) -> Iterator[_Piece]:
    """The parts as untrusted pieces, less what the template trims off the whole text's edges."""
    text = "".join(part.text for part in parts)
    first, stop = len(text) - len(text.lstrip(front)), len(text.rstrip(back))
    place = 0
    for part in parts:
        kept = part.text[max(0, first - place) : max(0, stop - place)]
        place += len(part.text)
        yield _Piece(kept, part.segment, -1 if part.passage is None else part.passage)


def _quoted(piece: _Piece) -> _Piece:
    """The piece as it stands inside a JSON string."""
    lengths = [len(json.dumps(char, ensure_ascii=False)) - 2 for char in piece.text]
    origin = np.repeat(np.arange(len(lengths)), np.array(lengths, dtype=np.int64))
    return piece._replace(text=json.dumps(piece.text, ensure_ascii=False)[1:-1], origin=origin)


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


class _PlainText:
    """Copies of a tokenizer that know no control tokens, and where control tokens may stand."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            raise ModelError(
                f"{type(tokenizer).__name__} has no `tokenizers` backend, so token offsets are "
                "not known: load the model with a fast tokenizer (a folder with tokenizer.json)."
            )
        spec: _Json = json.loads(backend.to_str())
        added: list[_Json] = spec["added_tokens"]
        control = [token for token in added if not _is_blank(token["content"])]
        kept = [token for token in added if _is_blank(token["content"])]
        spec.update(added_tokens=kept, post_processor=None, truncation=None, padding=None)
        # As at the start of the prompt; after a control token; after a break inside a word.
        self._first = Tokenizer.from_str(json.dumps(spec))
        self._inner = self._without(spec, {"first"})
        self._bare = self._without(spec, {"first", "always", "Prepend", "ByteLevel"})
        self._renumber = {i: t["id"] for t in kept if (i := self._id(t["content"])) != t["id"]}
        self._controls = {token["content"]: _read_control(token) for token in control}
        self._control_ids = np.array(sorted(token["id"] for token in control), dtype=np.int64)
        self._unknown = _unknown_token(tokenizer)
        self.control_pattern = _control_pattern(control)

    def _without(self, spec: _Json, prefixes: set[str]) -> Tokenizer:
        """A copy that does not add these kinds of spaces in front of a text."""
        names = ("normalizer", "pre_tokenizer")
        changed = spec | {name: _prefixless(spec[name], prefixes) for name in names}
        same = all(changed[name] == spec[name] for name in names)
        return self._first if same else Tokenizer.from_str(json.dumps(changed))

    def _id(self, token: str) -> int:
        found = self._first.token_to_id(token)
        assert found is not None  # it was just added
        return found

    def encode_text(self, text: str) -> _Encoded:
        """Encode text that stands alone."""
        return self._stretch(_SURROGATE.sub("\ufffd", text), 0, self._first)

    def encode_rendered(self, text: str, pieces: Sequence[_Piece], bounds: _Ints) -> _Encoded:
        """Encode a rendered prompt: control tokens of trusted pieces, and the stretches between.

        Args:
            text: The texts of all pieces, put together.
            pieces: Where each character comes from.
            bounds: Start of each piece in `text`, and its length at the end.
        """
        encoded: list[_Encoded] = []
        place, tokenizer = 0, self._first
        for start, end, control in self._find_controls(text, pieces, bounds.tolist()):
            left = place + len(text[place:start].rstrip(_SPACES)) if control.lstrip else start
            encoded.append(self._stretch(text[place:left], place, tokenizer))
            encoded.append(_Encoded(np.array([control.id]), np.array([start]), np.array([end])))
            place = end + _leading_spaces(text, end) if control.rstrip else end
            tokenizer = self._inner
        encoded.append(self._stretch(text[place:], place, tokenizer))
        return _join(encoded)

    def _find_controls(
        self, text: str, pieces: Sequence[_Piece], bounds: Sequence[int]
    ) -> Iterator[tuple[int, int, _Control]]:
        for piece, (start, end) in zip(pieces, pairwise(bounds), strict=True):
            if piece.trusted:
                for match in self.control_pattern.finditer(text[start:end]):
                    yield start + match.start(), start + match.end(), self._controls[match[0]]

    def _stretch(self, text: str, place: int, tokenizer: Tokenizer) -> _Encoded:
        """Encode one string that starts at `place`; control ids that it spells are broken up."""
        if not text:
            return _Encoded(*(np.empty(0, np.int64) for _ in range(3)))
        encoding = tokenizer.encode(text, add_special_tokens=False)
        own_ids = np.array(encoding.ids, dtype=np.int64)
        ids = own_ids.copy()
        spans = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)
        for own, original in self._renumber.items():
            ids[own_ids == own] = original
        leaks = self._leaks(text, ids, spans)
        if leaks:
            cuts = [0, *leaks, len(text)]
            tokenizers = [tokenizer] + [self._bare] * len(leaks)
            parts = zip(pairwise(cuts), tokenizers, strict=True)
            return _join([self._stretch(text[a:b], place + a, t) for (a, b), t in parts])
        start, end = _groups(spans, len(text))
        return _Encoded(ids, start + place, end + place)

    def _leaks(self, text: str, ids: _Ints, spans: _Ints) -> list[int]:
        """Where to break the text so that it does not spell control tokens."""
        suspects = np.flatnonzero(np.isin(ids, self._control_ids))
        cuts: set[int] = set()
        for index in suspects.tolist():
            start, end = spans[index].tolist()
            unknown_id, unknown = self._unknown
            spelt = ids[index] != unknown_id or unknown in text[start:end]
            if spelt and end - start > 1:
                cuts.add(start + 1)
        return sorted(cuts)


def _is_blank(token: str) -> bool:
    return not token.replace("\u2581", " ").strip()


def _read_control(token: _Json) -> _Control:
    return _Control(token["id"], token["lstrip"], token["rstrip"])


def _control_pattern(tokens: Sequence[_Json]) -> re.Pattern[str]:
    """Leftmost, then longest match, as the tokenizer's own."""
    longest_first = sorted(tokens, key=lambda token: -len(token["content"]))
    words = [
        rf"(?<!\w){re.escape(token['content'])}(?!\w)"
        if token["single_word"]
        else re.escape(token["content"])
        for token in longest_first
    ]
    return re.compile("|".join(words) or r"(?!)")


def _unknown_token(tokenizer: PreTrainedTokenizerBase) -> tuple[int, str]:
    """The id and text of the token for unknown characters, which is no control token there."""
    token = tokenizer.unk_token
    return (-1, "") if token is None else (int(tokenizer.unk_token_id), str(token))


def _leading_spaces(text: str, start: int) -> int:
    """Number of whitespace characters from `start` on."""
    count = 0
    while start + count < len(text) and text[start + count] in _SPACES:
        count += 1
    return count


def _prefixless(component: _Json | None, prefixes: set[str]) -> _Json | None:
    """A normalizer or pre-tokenizer that leaves out these kinds of added leading spaces."""
    if component is None:
        return None
    for key in ("normalizers", "pretokenizers"):
        if key in component:
            inner = (_prefixless(each, prefixes) for each in component[key])
            return {**component, key: [each for each in inner if each is not None]}
    kind = component["type"]
    if kind == "Prepend" and kind in prefixes:
        return None
    if kind == "Metaspace" and component["prepend_scheme"] in prefixes:
        return {**component, "prepend_scheme": "never"}
    if kind == "ByteLevel" and kind in prefixes and "add_prefix_space" in component:
        return {**component, "add_prefix_space": False}
    return component


def _join(parts: Sequence[_Encoded]) -> _Encoded:
    return _Encoded(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def _groups(spans: _Ints, length: int) -> tuple[_Ints, _Ints]:
    """Give tokens that share a character (bytes of one, a bare prefix) the span of all of them."""
    if not len(spans):
        return spans[:, 0], spans[:, 1]
    start = np.minimum(np.maximum.accumulate(spans[:, 0]), length - 1)
    reach = np.maximum.accumulate(np.clip(spans[:, 1], start + 1, length))
    opens = np.append(True, start[1:] >= reach[:-1])
    group = np.cumsum(opens) - 1
    first = np.flatnonzero(opens)
    last = np.append(first[1:], len(spans)) - 1
    return start[first][group], reach[last][group]


def _cover(start: _Ints, base: int, length: int) -> tuple[_Ints, _Ints]:
    """Spans, counted from `base`, that cover 0..length; gaps go to the token before them.

    Args:
        start: Ascending starts of the tokens; tokens of one group share theirs.
        base: Where the covered text starts.
        length: Its length.
    """
    start = np.maximum(start - base, 0)
    start = np.where(start == start[:1], 0, start)
    following = np.searchsorted(start, start, side="right")
    return start, np.append(start, length)[following]


def _locate(
    encoded: _Encoded, pieces: Sequence[_Piece], bounds: _Ints, prompt: Prompt
) -> PromptTokens:
    """Say of each token which segment, passage and characters it stands for."""
    segments = np.array([piece.segment for piece in pieces], dtype=np.int8)
    segment = segments[np.searchsorted(bounds[:-1], encoded.end - 1, side="right") - 1]
    passage, start, end = (np.full(len(segment), -1, dtype=np.int32) for _ in range(3))
    for piece, (first, stop) in zip(pieces, pairwise(bounds.tolist()), strict=True):
        if piece.passage < 0:
            continue
        low = int(np.searchsorted(encoded.end, first, side="right"))
        own = slice(low, int(np.searchsorted(encoded.start, stop, side="left")))
        starts, ends = _cover(encoded.start[own], first, stop - first)
        at_end = ends == stop - first
        if piece.origin is not None and len(piece.origin):
            starts, ends = piece.origin[starts], piece.origin[ends - 1] + 1
        segment[own], passage[own] = int(Segment.PASSAGE), piece.passage
        start[own] = starts
        end[own] = np.where(at_end, len(prompt.passages[piece.passage].text), ends)
    columns = map(torch.from_numpy, (encoded.ids, segment, passage, start, end))
    return PromptTokens(*columns)

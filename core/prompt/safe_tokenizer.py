"""Text becomes tokens, and no text spells a control token.

A string is encoded by a copy of the tokenizer that takes control tokens for plain text; where the
vocabulary spells one all the same, the string is broken inside it. Control tokens come only from
the stretches that the caller trusts. Every token comes with the characters that it covers.

`Tokenizer.encode_special_tokens` does the first part and cannot do the rest: it is a state of the
tokenizer, which is the caller's (hence a copy); it spares only tokens marked special (the copy
marks all); Unigram models and merges of BPE still give a control token's id to text that spells it
(hence the breaks); and text that follows a control token or a break gets no space in front where a
text's beginning does (hence up to two more copies).

Limits: every added token counts as a control token, plain words that were added for fine-tuning
too. Tokens added to the tokenizer after the copy was made are not known to it. A control token of
a single character that the model's own vocabulary spells stays reachable. Control tokens are found
as written: a normalizer that changes them (flag `normalized`, with Llama's old "Prepend") is not
imitated.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from ..errors import ModelError

Ints = npt.NDArray[np.int64]
_Json = dict[str, Any]
_SURROGATE = re.compile("[\ud800-\udfff]")
# What the tokenizers library counts as whitespace.
_SPACES = "".join(c for c in map(chr, range(0x3001)) if c.isspace() and c not in "\x1c\x1d\x1e\x1f")


def replace_surrogates(text: str) -> str:
    """Replace lone surrogates, which no encoder takes, one character for one.

    Args:
        text: Any text.

    Returns:
        The text with U+FFFD for each surrogate, so every character keeps its place.
    """
    return _SURROGATE.sub("\ufffd", text)


class Encoded(NamedTuple):
    """Tokens in order, with the characters each covers before any gap is filled."""

    ids: Ints  # (tokens,)
    start: Ints  # (tokens,)
    end: Ints  # (tokens,) exclusive


@dataclass(frozen=True, slots=True)
class _Control:
    """An added token as the tokenizer matches it."""

    id: int
    lstrip: bool
    rstrip: bool


class PlainText:
    """Copies of a tokenizer that see no control tokens, and where control tokens may stand.

    Args:
        tokenizer: A tokenizer backed by the `tokenizers` library; read once and never changed.

    Attributes:
        control_pattern: Matches the control tokens as the tokenizer itself finds them.

    Raises:
        ModelError: The tokenizer has no `tokenizers` backend.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            raise ModelError(
                f"{type(tokenizer).__name__} has no `tokenizers` backend, so token offsets are "
                "not known: load the model with a fast tokenizer (a folder with tokenizer.json)."
            )
        spec: _Json = json.loads(backend.to_str())
        added: list[_Json] = spec["added_tokens"]
        for token in added:
            token["special"] = not _is_blank(token["content"])
        control = [token for token in added if token["special"]]
        spec.update(post_processor=None, truncation=None, padding=None)
        # As at the start of the prompt; after a control token; after a break inside a word.
        self._first = _blind(spec)
        self._inner = self._without(spec, {"first"})
        self._bare = self._without(spec, {"first", "always", "Prepend", "ByteLevel"})
        self._controls = {token["content"]: _read_control(token) for token in control}
        self._control_ids = np.array(sorted(token["id"] for token in control), dtype=np.int64)
        self._unknown = _unknown_token(tokenizer)
        self.control_pattern = _control_pattern(control)

    def _without(self, spec: _Json, prefixes: set[str]) -> Tokenizer:
        """A copy that does not add these kinds of spaces in front of a text."""
        names = ("normalizer", "pre_tokenizer")
        changed = spec | {name: _prefixless(spec[name], prefixes) for name in names}
        same = all(changed[name] == spec[name] for name in names)
        return self._first if same else _blind(changed)

    def encode_text(self, text: str) -> Encoded:
        """Encode text that stands alone.

        Args:
            text: Any text.

        Returns:
            Its tokens; no control tokens, nothing added.
        """
        return self._stretch(replace_surrogates(text), 0, self._first)

    def encode_rendered(self, text: str, trusted: Iterable[tuple[int, int]]) -> Encoded:
        """Encode a rendered prompt: control tokens where they may stand, and what lies between.

        Args:
            text: The whole prompt.
            trusted: Start and end of each stretch that may hold control tokens, ascending; a
                control token lies inside one of them.

        Returns:
            The tokens of the whole prompt.
        """
        text = replace_surrogates(text)
        encoded: list[Encoded] = []
        place, tokenizer = 0, self._first
        for start, end, control in self._find_controls(text, trusted):
            left = place + len(text[place:start].rstrip(_SPACES)) if control.lstrip else start
            encoded.append(self._stretch(text[place:left], place, tokenizer))
            encoded.append(Encoded(np.array([control.id]), np.array([start]), np.array([end])))
            place = end + _leading_spaces(text, end) if control.rstrip else end
            tokenizer = self._inner
        encoded.append(self._stretch(text[place:], place, tokenizer))
        return _join(encoded)

    def _find_controls(
        self, text: str, trusted: Iterable[tuple[int, int]]
    ) -> Iterator[tuple[int, int, _Control]]:
        for start, end in trusted:
            for match in self.control_pattern.finditer(text[start:end]):
                yield start + match.start(), start + match.end(), self._controls[match[0]]

    def _stretch(self, text: str, place: int, tokenizer: Tokenizer) -> Encoded:
        """Encode one string that starts at `place`; control ids that it spells are broken up."""
        if not text:
            return Encoded(*(np.empty(0, np.int64) for _ in range(3)))
        encoding = tokenizer.encode(text, add_special_tokens=False)
        ids = np.array(encoding.ids, dtype=np.int64)
        spans = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)
        leaks = self._leaks(text, ids, spans)
        if leaks:
            cuts = [0, *leaks, len(text)]
            tokenizers = [tokenizer] + [self._bare] * len(leaks)
            parts = zip(pairwise(cuts), tokenizers, strict=True)
            return _join([self._stretch(text[a:b], place + a, t) for (a, b), t in parts])
        start, end = _groups(spans, len(text))
        return Encoded(ids, start + place, end + place)

    def _leaks(self, text: str, ids: Ints, spans: Ints) -> list[int]:
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


def _blind(spec: _Json) -> Tokenizer:
    """A tokenizer that takes its special tokens for plain text."""
    tokenizer = Tokenizer.from_str(json.dumps(spec))
    tokenizer.encode_special_tokens = True
    return tokenizer


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


def _join(parts: Sequence[Encoded]) -> Encoded:
    return Encoded(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def _groups(spans: Ints, length: int) -> tuple[Ints, Ints]:
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

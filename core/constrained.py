"""Constrained decoding: the tokens that a grammar allows next, by llguidance (extra `[tools]`).

llguidance was chosen among outlines-core and xgrammar: one wheel of 3 MB for all Pythons, no
dependencies, no GPU, byte-level and byte-fallback tokenizers, most of JSON schema, and nothing is
precomputed over the vocabulary, so a new schema costs about a millisecond.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from threading import Lock
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from tokenizers import Tokenizer

from .errors import GrammarError, MissingExtraError

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

logger = logging.getLogger(__name__)

CALL_START, CALL_END = "<tool_call>", "</tool_call>"
"""Around a tool call, which is {"name": ..., "arguments": {...}}: the form of Hermes and Qwen."""

_JSON_STYLE: Mapping[str, Any] = {
    "whitespace_flexible": False,  # models that may add blanks can go on for ever
    "item_separator": ", ",
    "key_separator": ": ",
    "coerce_one_of": True,
    "lenient": True,
}
_LISTED = ("anyOf", "oneOf", "prefixItems")
_NAMED = ("properties", "patternProperties", "$defs", "definitions")
_BOUNDS = {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "enum", "const"}
_LARGEST = 2**53 - 1
_CACHED = 64  # compiled grammars per tokenizer
_CLOSING = ('"', "}", "]", ",")  # how JSON ends what is open, first that fits


@dataclass(frozen=True, slots=True)
class Grammar:
    """What an answer must look like, for `Generation(grammar=...)`. Equal grammars are shared.

    Make one with `json_schema`, `regex` or `tool_calls`. An answer that `max_new_tokens` cuts off
    is the beginning of an allowed one, and its finish reason is "length".

    Raises:
        MissingExtraError: llguidance is not installed.
    """

    kind: Literal["json_schema", "regex", "lark"]
    source: str
    calls_first: bool = False  # an answer that does not begin with a tool call holds none

    def __post_init__(self) -> None:
        if find_spec("llguidance") is None:
            raise MissingExtraError(
                "Constrained decoding (tools, structured output, grammars) needs llguidance, "
                'which is not installed: pip install "draftsieve[tools]"'
            )

    @classmethod
    def json_schema(cls, schema: Mapping[str, Any]) -> Grammar:
        """JSON that fits a schema, on one line.

        Args:
            schema: A JSON schema. Objects take only the properties it names, in its order, unless
                it sets "additionalProperties"; integers without bounds stay within 2**53, as
                RFC 7493 wants it. Keywords that cannot be enforced are ignored with a logged
                warning.
        """
        return cls("json_schema", json.dumps(_styled(schema), ensure_ascii=False))

    @classmethod
    def regex(cls, pattern: str) -> Grammar:
        """Text that a regular expression (Rust's syntax, no look-around) matches as a whole."""
        return cls("regex", pattern)

    @classmethod
    def tool_calls(
        cls,
        tools: Sequence[Mapping[str, Any]],
        choice: str = "auto",
        *,
        parallel: bool = True,
        answer: Mapping[str, Any] | None = None,
    ) -> Grammar:
        """Calls of tools with arguments that fit their schemas; `core.tools` reads them.

        Args:
            tools: OpenAI's form: {"type": "function", "function": {"name", "description",
                "parameters"}}, or the inner mapping alone.
            choice: "auto" for text, calls or both, "any" for calls only, or the name of the tool
                that must be called.
            parallel: Allow several calls in one answer.
            answer: JSON schema of what may be said instead of calls where the choice is "auto":
                the answer is then calls alone or such JSON alone. None allows any text.

        Raises:
            GrammarError: There are no tools, or none of that name.
        """
        functions = [tool.get("function", tool) for tool in tools]
        known = [function["name"] for function in functions]
        if not functions or choice not in ("auto", "any", *known):
            raise GrammarError(
                f"tool_choice={choice!r}, but the tools are {known}: "
                'give "auto", "any" or the name of one of them.'
            )
        wanted = [f for f in functions if choice in ("auto", "any", f["name"])]
        schema = answer if choice == "auto" else None
        free = choice == "auto" and schema is None
        return cls("lark", _calls_grammar(wanted, free, parallel, schema), schema is not None)


def _calls_grammar(
    functions: Sequence[Mapping[str, Any]],
    free: bool,
    parallel: bool,
    answer: Mapping[str, Any] | None,
) -> str:
    """Tool calls in llguidance's dialect of Lark; `free` allows text around them."""
    lines = ["%llguidance {}"]
    if free:  # a lazy lexeme ends where it first can: text can never hold the start of a call
        lines.append(f"start: {'call*' if parallel else 'call?'} text")
        lines.append(f'text: TEXT\nTEXT: /(.|\\n)*/\nopen[lazy]: TEXT "{CALL_START}"')
        lines.append(f'call: open "\\n" tool "\\n{CALL_END}"')
    else:
        lines.append(f"start: calls {'' if answer is None else '| answer'}")
        lines.append(f"calls: call {'(_more call)*' if parallel else ''}")
        lines.append(f'_more: "\\n"\ncall: "{CALL_START}\\n" tool "\\n{CALL_END}"')
    if answer is not None:
        lines.append(f"answer: %json {json.dumps(_styled(answer), ensure_ascii=False)}")
    lines.append("tool: " + " | ".join(f"tool_{i}" for i in range(len(functions))))
    for i, function in enumerate(functions):
        name = json.dumps(function["name"], ensure_ascii=False)
        head = json.dumps(f'{{"name": {name}, "arguments": ', ensure_ascii=False)
        schema = _styled(function.get("parameters") or {"type": "object", "properties": {}})
        lines.append(f'tool_{i}: {head} %json {json.dumps(schema, ensure_ascii=False)} "}}"')
    return "\n".join(lines) + "\n"


def _styled(schema: Mapping[str, Any]) -> dict[str, Any]:
    """The schema with closed objects and our way of writing JSON."""
    if not isinstance(schema, Mapping):
        raise GrammarError(f"A JSON schema is a mapping, not {type(schema).__name__}.")
    return {**_closed(schema), "x-guidance": dict(_JSON_STYLE)}


def _closed(schema: Any) -> Any:
    """The schema with bounded integers, and objects that take only the properties they name.

    Branches of "allOf" stay open: each of them names only its share.
    """
    if not isinstance(schema, Mapping):
        return schema
    found = dict(schema)
    for key in _NAMED:
        if isinstance(found.get(key), Mapping):
            found[key] = {name: _closed(value) for name, value in found[key].items()}
    for key in _LISTED:
        if isinstance(found.get(key), list):
            found[key] = [_closed(value) for value in found[key]]
    for key in ("items", "additionalProperties"):
        if key in found:
            found[key] = _closed(found[key])
    if "properties" in found and "allOf" not in found:
        found.setdefault("additionalProperties", False)
    if found.get("type") == "integer" and not found.keys() & _BOUNDS:
        found |= {"minimum": -_LARGEST, "maximum": _LARGEST}
    return found


class Grammars:
    """Compiles grammars for one tokenizer and keeps the last 64; safe to share between threads.

    Args:
        tokenizer: A tokenizer of the `tokenizers` library, byte-level or with byte fallback.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._lock = Lock()
        self._compiled = lru_cache(_CACHED)(self._compile)
        self._vocabulary = lru_cache(1)(self._read_vocabulary)

    def start(self, grammar: Grammar, ends: frozenset[int]) -> Constraint:
        """A fresh constraint for one answer.

        Args:
            grammar: What is allowed.
            ends: Ids that end an answer; they are allowed only where the grammar is complete.

        Raises:
            GrammarError: The grammar or the tokenizer cannot be compiled.
        """
        with self._lock:
            matcher = self._compiled(grammar, ends).deep_copy()
            single = map(self._vocabulary(ends).tokenize_str, _CLOSING)
        return Constraint(matcher, sorted(ends), [ids[0] for ids in single if len(ids) == 1])

    def _compile(self, grammar: Grammar, ends: frozenset[int]) -> LLMatcher:
        from llguidance import LLMatcher

        makers: Mapping[str, Callable[[str], str]] = {
            "json_schema": LLMatcher.grammar_from_json_schema,
            "regex": LLMatcher.grammar_from_regex,
            "lark": LLMatcher.grammar_from_lark,
        }
        source, vocabulary = makers[grammar.kind](grammar.source), self._vocabulary(ends)
        failed, messages = LLMatcher.validate_grammar_with_warnings(source, vocabulary)
        if failed:
            raise GrammarError(f"The {grammar.kind} grammar cannot be compiled: {messages[0]}")
        for message in messages:
            logger.warning("A part of the %s grammar is not enforced: %s", grammar.kind, message)
        return LLMatcher(vocabulary, source, log_level=0)

    def _read_vocabulary(self, ends: frozenset[int]) -> LLTokenizer:
        """llguidance's view of the tokenizer, made once (about a second for 150,000 tokens)."""
        from llguidance import LLTokenizer

        plain = Tokenizer.from_str(self._tokenizer.to_str())
        plain.no_padding()
        plain.no_truncation()
        try:
            return LLTokenizer(plain.to_str(), eos_token=sorted(ends) or None)
        except (ValueError, RuntimeError) as error:
            raise GrammarError(
                f"llguidance cannot read this tokenizer, so no grammar can be used: {error}"
            ) from error


class Constraint:
    """Where one answer stands in its grammar: which tokens may follow, and whether it is whole.

    Args:
        matcher: llguidance's state.
        ends: Ids that end an answer.
        closing: Ids that end a part of it, the first that is allowed counts.
    """

    def __init__(self, matcher: LLMatcher, ends: Sequence[int], closing: Sequence[int]) -> None:
        self._matcher, self._ends, self._closing = matcher, ends, closing

    @property
    def complete(self) -> bool:
        """Nothing but an end token may follow."""
        return bool(self._matcher.is_stopped())

    def mask(self, logits: torch.Tensor) -> torch.Tensor:
        """Forbid what the grammar does not allow next.

        Where an answer may not end yet, the wish to end it counts for the token that closes the
        open string, object or list: small models would else go on until they are cut off.

        Args:
            logits: (vocabulary,) of the next token; not changed.

        Returns:
            (vocabulary,) logits, minus infinity where forbidden; unchanged once it is complete.

        Raises:
            GrammarError: The grammar has grown too complex to go on.
        """
        if self.complete:
            return logits
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        self._check()
        allowed = np.zeros(logits.numel(), dtype=np.bool_)
        known = np.unpackbits(bits, bitorder="little")[: logits.numel()]
        allowed[: len(known)] = known  # models may have more logits than the tokenizer has tokens
        masked = logits.masked_fill(~torch.from_numpy(allowed).to(logits.device), float("-inf"))
        closing = next((token for token in self._closing if allowed[token]), None)
        if closing is not None and self._ends and not allowed[self._ends].any():
            masked[closing] = torch.maximum(masked[closing], logits[self._ends].max())
        return masked

    def accept(self, token: int) -> None:
        """Go on behind a token that `mask` allowed."""
        if not self.complete:
            self._matcher.consume_token(token)
            self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise GrammarError(f"The grammar cannot be followed: {self._matcher.get_error()}")

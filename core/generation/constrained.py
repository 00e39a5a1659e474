"""Constrained decoding: the tokens that a grammar allows next, by llguidance (extra `[tools]`).

llguidance was chosen among outlines-core and xgrammar: one wheel of 3 MB for all Pythons, no
dependencies, no GPU, byte-level and byte-fallback tokenizers, most of JSON schema, and nothing is
precomputed over the vocabulary, so a new schema costs about a millisecond.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from threading import Lock
from typing import TYPE_CHECKING

import numpy as np
import torch
from tokenizers import Tokenizer

from ..errors import GrammarError
from ..grammar import Grammar

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

logger = logging.getLogger(__name__)

_CACHED = 64  # compiled grammars per tokenizer
_CLOSING = ('"', "}", "]", ",")  # how JSON ends what is open, first that fits


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

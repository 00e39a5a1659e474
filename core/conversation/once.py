"""Texts that are shortened once, against the request of their turn, and never again.

What a text becomes depends on nothing but itself, those beside it, and that request. So a provider
that keeps the beginning of a conversation finds it again, turn after turn, also after a restart.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from threading import Lock

from ..compressor import Compressor
from ..config import SpecPC
from .memory import digest
from .turns import LEFT_OUT, ShortTurn

_LEAST = 0.9  # a text of which more would be left is sent as it is


class OnceCompressor:
    """Shortens texts by a ratio. Safe to use from several threads at once.

    Args:
        compressor: The draft.
        method: How texts are read and cut.
        min_tokens: Shorter texts stay whole, in draft tokens.
        remember: Most groups of texts whose form is remembered, which saves reading them again.
    """

    def __init__(
        self,
        compressor: Compressor,
        method: SpecPC,
        *,
        min_tokens: int = 64,
        remember: int = 4096,
    ) -> None:
        self.compressor, self.method = compressor, method
        self._min_tokens, self._most = min_tokens, remember
        self._forms: OrderedDict[bytes, tuple[ShortTurn, ...]] = OrderedDict()
        self._lock = Lock()

    def shorten(
        self, question: str, texts: Sequence[str], timeout: float | None = None
    ) -> tuple[ShortTurn, ...]:
        """What is sent of texts that came together.

        Args:
            question: The request of their turn.
            texts: Tool results, documents.
            timeout: Seconds after which it fails; None for no limit.

        Returns:
            One form for each text; tokens are the draft's.

        Raises:
            PromptError: The question is empty.
            RequestTimeoutError: The time is up.
        """
        key = digest([question, *texts])
        with self._lock:
            if key in self._forms:
                self._forms.move_to_end(key)
                return self._forms[key]
        found = self._shorten(question, texts, timeout)
        with self._lock:
            self._forms[key] = found
            while len(self._forms) > self._most:
                self._forms.popitem(last=False)
        return found

    def _shorten(
        self, question: str, texts: Sequence[str], timeout: float | None
    ) -> tuple[ShortTurn, ...]:
        sizes = [self.compressor.count_tokens(text) for text in texts]
        whole = [
            ShortTurn(text, ((0, len(text)),) if text else (), size, size)
            for text, size in zip(texts, sizes, strict=True)
        ]
        loose = [index for index, size in enumerate(sizes) if size >= self._min_tokens]
        if not loose:
            return tuple(whole)
        context = self.compressor.compress(
            question, [texts[index] for index in loose], self.method, timeout=timeout
        )
        spans: list[list[tuple[int, int]]] = [[] for _ in loose]
        for span in context.spans:
            spans[span.passage_index].append((span.start, span.end))
        kept = dict(zip(context.indices, context.passages, strict=True))
        for place, index in enumerate(loose):
            text = (kept[place].text if place in kept else "") or LEFT_OUT
            tokens = self.compressor.count_tokens(text)
            if tokens < _LEAST * sizes[index]:
                whole[index] = ShortTurn(text, tuple(spans[place]), tokens, sizes[index])
        return tuple(whole)

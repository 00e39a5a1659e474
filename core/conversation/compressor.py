"""A conversation kept within a budget: old turns and long results are shortened, once each.

sizes -> which texts give way -> one compression of them against the question -> remembered.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import lru_cache
from math import ceil

from ..compressor import Compressor
from ..config import OnError, SpecPC
from ..errors import BudgetError, ConfigError
from ..prompt.messages import DEFAULT_SYSTEM, Prompt
from ..runtime.limits import deadline_after, until
from .memory import TurnMemory
from .turns import ShortTurn, ShortTurns, Spans, Turn, total, with_note

logger = logging.getLogger(__name__)

_TEMPLATE = 4  # tokens allowed for what a chat template puts around a turn
_ALL = {"drop_empty": False, "min_tokens": 0, "max_passages": None}  # every text is read and told
_LEAST = 0.1  # a compression that would leave less than this share makes room elsewhere first


class TurnCompressor:
    """Shortens conversations and remembers what became of each text.

    Safe to use from several threads at once, for any number of conversations.

    Args:
        compressor: The draft.
        method: How texts are read and cut. `capacity` is the most draft tokens of a whole
            conversation, with all that must stay in it; a ratio is refused.
        fill: Share of the capacity that a compression aims at, in (0, 1]. The rest is for what
            comes next, so that not every new text leads to a compression.
        min_tokens: Shorter texts stay whole.
        stable_prefix: A text is sent in the same form as long as there is room, also when the
            question changes, so that a provider's prompt cache goes on matching. Otherwise a new
            question compresses old texts anew.
        system: System text that the draft reads.
        remember: Most texts whose form is remembered; those unused for longest are forgotten.

    Raises:
        ConfigError: `method` has a ratio, or `fill` is not in (0, 1].
    """

    def __init__(
        self,
        compressor: Compressor,
        method: SpecPC,
        *,
        fill: float = 0.7,
        min_tokens: int = 64,
        stable_prefix: bool = False,
        system: str | None = DEFAULT_SYSTEM,
        remember: int = 4096,
    ) -> None:
        if method.capacity is None:
            raise ConfigError(
                f"ratio={method.ratio} says nothing about the size of a conversation: give the "
                "method a capacity, the most tokens of a whole request."
            )
        if not 0 < fill <= 1:
            raise ConfigError(f"fill={fill} is no share of the capacity: give one in (0, 1].")
        self.capacity = method.capacity
        self._compressor, self._method, self._system = compressor, method, system
        self._fill, self._min_tokens, self._stable = fill, min_tokens, stable_prefix
        self._count = lru_cache(1024)(compressor.count_tokens)
        self.memory = TurnMemory(stable_prefix=stable_prefix, most=remember)

    def compress(
        self,
        question: str,
        turns: Sequence[Turn],
        *,
        limit: int | None = None,
        on_error: OnError = "raise",
        timeout: float | None = None,
    ) -> ShortTurns:
        """Fit a conversation into the capacity.

        Args:
            question: The latest request; texts are kept as far as they matter to it.
            turns: Everything that is sent, in order; also what only counts (tool schemas).
            limit: Most tokens that the model reads; None if unknown. Bounds the capacity.
            on_error: "raise", or "original": where what must stay exceeds the capacity, the other
                texts are shortened to a tenth, with a logged warning that says which capacity
                would do; and where shortening fails, the originals come back if they are within
                `limit`, with a logged warning and the reason in `fallback`.
            timeout: Seconds after which shortening fails; None for no limit.

        Returns:
            One text for each turn. Where all fits, those are the originals, but for texts that
            were shortened before.

        Raises:
            BudgetError: What must stay exceeds the capacity, or even `limit`; or shortening
                failed, for whatever reason, and the originals exceed `limit`.
            PromptError: The question is empty, and something has to be shortened.
        """
        whole = [self._whole(turn) for turn in turns]
        size = sum(turn.tokens for turn in whole)
        try:
            with until(deadline_after(timeout)):
                return self._compress(question, turns, whole, size, limit, on_error)
        except Exception as error:
            if on_error == "raise":
                raise
            if limit is not None and size > limit:
                raise BudgetError(
                    f"The conversation has {size} tokens, the model reads at most {limit}, and "
                    f"shortening it failed: {error}"
                ) from error
            logger.warning("Shortening failed, all turns stay whole: %s", error)
            logger.debug("The failure in full:", exc_info=error)
            return ShortTurns(tuple(whole), size, size, fallback=f"{type(error).__name__}: {error}")

    def size_of(self, turns: Sequence[Turn]) -> int:
        """Draft tokens of a whole conversation."""
        return total(self._whole(turn) for turn in turns)

    def capacity_of(self, question: str, turns: Sequence[Turn], ratio: float) -> int:
        """Draft tokens of a conversation that keeps a share of what may be shortened.

        Texts whose form is remembered count as they were sent, so that nobody gives way twice.

        Args:
            question: As for `compress`, whose `limit` the result can be.
            turns: The same.
            ratio: The share, in (0, 1].
        """
        whole = [self._whole(turn) for turn in turns]
        loose = self._loose(turns, whole)
        keys = self.memory.keys(question, turns, loose)
        known = self.memory.recall(dict(zip(loose, keys, strict=True)))
        new = sum(whole[index].tokens for index in loose if index not in known)
        sent = total(known.get(index, full) for index, full in enumerate(whole))
        return sent - new + ceil(ratio * new)

    async def acompress(
        self,
        question: str,
        turns: Sequence[Turn],
        *,
        limit: int | None = None,
        on_error: OnError = "raise",
        timeout: float | None = None,
    ) -> ShortTurns:
        """`compress` in the compressor's worker thread; the event loop stays free."""
        return await self._compressor.worker.run(
            self.compress, question, turns, limit=limit, on_error=on_error, timeout=timeout
        )

    def _compress(
        self,
        question: str,
        turns: Sequence[Turn],
        whole: Sequence[ShortTurn],
        size: int,
        limit: int | None,
        on_error: OnError,
    ) -> ShortTurns:
        capacity = self.capacity if limit is None else min(limit, self.capacity)
        loose = self._loose(turns, whole)
        every = range(len(turns))
        keys = dict(zip(every, self.memory.keys(question, turns, every), strict=True))
        known = self.memory.recall({index: keys[index] for index in loose})
        sent = [known.get(index, full) for index, full in enumerate(whole)]
        group: list[int] = []
        if total(sent) > capacity:
            seen = list(known)
            found = self._give_way(turns, whole, sent, seen, loose, capacity)
            if found is None:
                found = self._too_small(turns, whole, sent, seen, loose, capacity, limit, on_error)
            group, room = found
            for index, short in zip(
                group, self._shorten(question, turns, whole, group, room), strict=True
            ):
                sent[index] = short
        # what had to stay whole this time may be shortened later, when it is no longer the newest
        fixed_form = every if self._stable else group
        self.memory.store({keys[index]: sent[index] for index in fixed_form})
        logger.info("Conversation: %d of %d tokens, %d texts read", total(sent), size, len(group))
        return ShortTurns(tuple(sent), total(sent), size, compressed=len(group))

    def _loose(self, turns: Sequence[Turn], whole: Sequence[ShortTurn]) -> list[int]:
        """Places of the texts that may be shortened."""
        return [
            index
            for index, (turn, full) in enumerate(zip(turns, whole, strict=True))
            if turn.keep != "always" and full.tokens >= self._min_tokens
        ]

    def _give_way(
        self,
        turns: Sequence[Turn],
        whole: Sequence[ShortTurn],
        sent: Sequence[ShortTurn],
        known: Sequence[int],
        loose: Sequence[int],
        capacity: int,
    ) -> tuple[list[int], int] | None:
        """Which texts are compressed, and the tokens they get together; None if there are none.

        New texts first, so that each is compressed once; then the order depends on what is worth
        more, a stable prefix or whole newest results; at last everything that may be shortened.
        Each group gets what the aimed-at size leaves, or if that is too little, the capacity.
        """
        old = [i for i in loose if turns[i].keep == "never"]
        new, new_old = ([i for i in group if i not in known] for group in (loose, old))
        order = (new_old, new, old) if self._stable else (new_old, old, new)
        for group in (*order, list(loose)):
            for budget in (round(capacity * self._fill), capacity):
                room = self._room(turns, sent, group, budget)
                if group and room >= self._tenth(whole, group):
                    return group, room
        room = self._room(turns, sent, loose, capacity)
        return (list(loose), room) if loose and room >= 1 else None

    def _too_small(
        self,
        turns: Sequence[Turn],
        whole: Sequence[ShortTurn],
        sent: Sequence[ShortTurn],
        known: Sequence[int],
        loose: Sequence[int],
        capacity: int,
        limit: int | None,
        on_error: OnError,
    ) -> tuple[list[int], int]:
        """`_give_way` where what must stay fills the budget: a tenth of the rest, if that may be.

        Raises:
            BudgetError: It may not, or what must stay exceeds even the model's limit.
        """
        stays = total(sent) - sum(sent[i].tokens for i in loose)
        least = capacity - self._room(turns, sent, loose, capacity)
        enough = least + self._tenth(whole, loose)
        told = (
            f"The budget is {capacity} tokens, but what must stay (system text, tools, newest "
            f"turns) takes {stays}, beside {len(loose)} texts that can be shortened: a capacity "
            f"of {enough} would do; or keep fewer turns."
        )
        most = enough if limit is None else min(limit, enough)
        if on_error == "raise" or most < least:
            raise BudgetError(told)
        logger.warning("%s Until then those texts are shortened to a tenth.", told)
        if total(sent) <= most:  # they already are
            return [], 0
        new, tenth = [i for i in loose if i not in known], self._tenth(whole, loose)
        if new and self._room(turns, sent, new, most) >= self._tenth(whole, new):
            return new, self._tenth(whole, new)
        return list(loose), min(tenth, self._room(turns, sent, loose, most))

    @staticmethod
    def _tenth(whole: Sequence[ShortTurn], group: Sequence[int]) -> int:
        """The least that a group's texts should keep, in tokens."""
        return ceil(_LEAST * sum(whole[i].tokens for i in group))

    def _room(
        self, turns: Sequence[Turn], sent: Sequence[ShortTurn], group: Sequence[int], budget: int
    ) -> int:
        """Tokens for the kept text of a group beside all others and the group's own notes."""
        others = total(sent) - sum(sent[i].tokens for i in group)
        notes = sum(self._count(with_note("", turns[i].note)) + _TEMPLATE + 1 for i in group)
        return budget - others - notes

    def _shorten(
        self,
        question: str,
        turns: Sequence[Turn],
        whole: Sequence[ShortTurn],
        group: Sequence[int],
        room: int,
    ) -> list[ShortTurn]:
        """One compression of a group's texts into `room` tokens."""
        if room < 1:
            return [self._short(turns[i], whole[i], "", ()) for i in group]
        texts = [turns[i].text for i in group]
        prompt = Prompt.from_question(question, texts, system=self._system)
        fixed = len(self._compressor.encoder.encode(prompt.with_texts([""] * len(texts))))
        method = self._method.model_copy(update={"capacity": fixed + room, **_ALL})
        context = self._compressor.compress_prompt(prompt, method)[1]
        spans: list[list[tuple[int, int]]] = [[] for _ in group]
        for span in context.spans:
            spans[span.passage_index].append((span.start, span.end))
        return [
            self._short(turns[i], whole[i], passage.text, tuple(kept))
            for i, passage, kept in zip(group, context.passages, spans, strict=True)
        ]

    def _short(self, turn: Turn, whole: ShortTurn, text: str, spans: Spans) -> ShortTurn:
        """The kept text with its note; the original where that is no longer."""
        noted = with_note(text, turn.note)
        tokens = self._count(noted) + turn.tokens + _TEMPLATE
        if text == turn.text or tokens >= whole.tokens:
            return whole
        return ShortTurn(noted, spans, tokens, whole.tokens)

    def _whole(self, turn: Turn) -> ShortTurn:
        tokens = self._count(turn.text) + turn.tokens + _TEMPLATE
        return ShortTurn(turn.text, ((0, len(turn.text)),) if turn.text else (), tokens, tokens)

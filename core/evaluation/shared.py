"""What all methods share on one item: the draft's readings and the target's full prefill."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from copy import deepcopy
from pathlib import Path
from typing import Any, TypeVar

import torch

from ..compressor import Compressor
from ..config import Generation, Method, SpecPC
from ..errors import ModelError
from ..generation.answer import answer_of
from ..generation.pipeline import Pipeline
from ..kv_cache.greedy import greedy
from ..kv_cache.prefill import Start
from ..kv_cache.prefix import Memory, read_memory
from ..models.loading import LoadedModel, fingerprint
from ..models.names import BUILTIN
from ..prompt.encoder import PromptEncoder, PromptTokens
from ..prompt.messages import Prompt
from ..request import Memories
from ..specpc.draft import DraftModel
from ..specpc.sparse_positions import kept_places, start_at
from ..specpc.stored.passage_store import PassageStore
from ..types import Answer, DraftReading
from .baselines import Kept
from .likelihood import AnswerReading, divergence, read_answer
from .tasks import EvalItem

T = TypeVar("T")
NO_TARGET = "no target"
_NOT_READ = {  # options that change what is kept, but not what the draft reads
    "capacity": None,
    "ratio": 1.0,
    "kernel_size": 1,
    "pool": None,
    "neighbor_tokens": None,
    "unit": "token",
    "unit_score": "max",
    "language": None,
    "lexical_weight": 0.0,
    "semantic_weight": 0.0,
    "embedder": None,
    "passage_weight": 0.0,
    "likelihood_passages": None,
    "passage_floor": 0,
    "score_mass": None,
    "positions": "reset",
    "gap_marker": None,
    "drop_empty": False,
    "min_tokens": 0,
    "max_passages": None,
}


class Once:
    """Values computed once an item, with the seconds that each of them took."""

    def __init__(self) -> None:
        self._found: dict[object, tuple[Any, float]] = {}
        self.saved = 0.0  # seconds that repeated calls would have taken

    def __call__(self, key: object, make: Callable[[], T]) -> T:
        """The value of a key; a repeated call adds its seconds to `saved`."""
        if key in self._found:
            value, seconds = self._found[key]
            self.saved += seconds
            return value  # type: ignore[no-any-return]
        began, before = time.perf_counter(), self.saved
        value = make()
        seconds = time.perf_counter() - began + self.saved - before
        self._found[key] = value, seconds
        return value

    def clear(self) -> None:
        """Forget everything."""
        self._found.clear()
        self.saved = 0.0


class SharedDraft(DraftModel):
    """A draft that reads and guesses once for all methods with equal draft options."""

    once: Once

    def guess(
        self, prompts: Sequence[PromptTokens], tokens: Sequence[int], memory: Memory | None = None
    ) -> list[torch.Tensor]:
        return [self._guess_once(*each, memory) for each in zip(prompts, tokens, strict=True)]

    def _guess_once(self, prompt: PromptTokens, tokens: int, memory: Memory | None) -> torch.Tensor:
        key = ("guess", prompt.ids.numpy().tobytes(), tokens)
        return self.once(key, lambda: super(SharedDraft, self).guess([prompt], [tokens], memory)[0])

    def read(
        self, prompts: Sequence[PromptTokens], method: SpecPC, lookaheads: Sequence[int]
    ) -> list[DraftReading]:
        pairs = zip(prompts, lookaheads, strict=True)
        return [self._read_once(prompt, method, lookahead) for prompt, lookahead in pairs]

    def _read_once(self, tokens: PromptTokens, method: SpecPC, lookahead: int) -> DraftReading:
        cut = min(method.window_size, method.capacity or method.window_size)
        reads = method.model_copy(update={**_NOT_READ, "window_size": cut})
        key = ("read", tokens.ids.numpy().tobytes(), reads, lookahead)
        return self.once(
            key, lambda: super(SharedDraft, self).read([tokens], method, [lookahead])[0]
        )


class Bench:
    """A pair of models for measuring: greedy, one request at a time.

    Args:
        target: The model that answers; None where nothing is answered.
        draft: The model that reads first.
        max_new_tokens: Most tokens of an answer, and of the draft's guess.
        template_options: Extra arguments of both chat templates.
        embedder: What SpecPC asks where its options weigh an embedder and name none.
    """

    def __init__(
        self,
        target: LoadedModel | None,
        draft: LoadedModel,
        *,
        max_new_tokens: int = 64,
        template_options: Mapping[str, Any] | None = None,
        embedder: str | Path | None = None,
    ) -> None:
        self.once, self.embedder = Once(), embedder
        self.generation = Generation(max_new_tokens=max_new_tokens)
        self.names = {"target": target.name if target else NO_TARGET, "draft": draft.name}
        self.weights = {"draft": fingerprint(draft.model)}
        if target is not None:
            self.weights["target"] = fingerprint(target.model)
        else:
            target = draft  # has a place to be, and is never asked
        self.target, self.tokenizer = target.model.eval(), target.tokenizer
        reader = SharedDraft(draft.model, draft.tokenizer, template_options, progress=False)
        reader.once = self.once
        self.draft = Compressor.of(reader)
        self.encoder = PromptEncoder(target.tokenizer, template_options)
        self.pipeline = Pipeline(self.target, self.tokenizer, self.encoder, reader)

    def open(self, item: EvalItem) -> Case:
        """Start on an item; what the last one left is forgotten."""
        self.once.clear()
        return Case(self, item)


class Case:
    """One item while its methods run."""

    def __init__(self, bench: Bench, item: EvalItem) -> None:
        self.bench, self.item, self.once = bench, item, bench.once
        self.prompt = item.prompt()
        self.tokens = bench.draft.encoder.encode(self.prompt)
        self.passage_tokens = int((~self.tokens.protected).sum())
        self.prefill_seconds = 0.0  # of the target's full prefill, once it has been shared
        self.stores: dict[object, PassageStore] = {}  # of the item's passages, by their options
        self._memories: Memories | None = None
        self._read = False
        self._own: tuple[torch.Tensor, AnswerReading] | None = None

    def budget(self, share: float) -> int:
        """Passage tokens that may stay, by the rule of `SpecPC.ratio` and `SpecKV.ratio`."""
        return max(1, round(self.passage_tokens * share))

    def draft_answer(self) -> str:
        """The draft's own greedy answer to the whole prompt."""
        ids = self.bench.draft.guess(self.prompt, self.bench.generation.max_new_tokens)
        return str(self.bench.draft.tokenizer.decode(ids.tolist(), skip_special_tokens=True))

    def memories(self) -> Memories | None:
        """The target's keys and values of the whole prompt; None where layers do not allow it."""
        if not self._read:
            self._read = True
            began = time.perf_counter()
            with suppress(ModelError):
                ids = self.bench.encoder.encode(self.prompt).ids
                self._memories = Memories(read_memory(self.bench.target, ids), None)
                self.prefill_seconds = time.perf_counter() - began
        return self._memories

    @property
    def spoken(self) -> bool:
        """Whether answers may be sentences, and the reference answer is read too."""
        return self.item.real or not self.bench.names["target"].startswith(BUILTIN)

    def read_reference(self, begun: torch.Tensor | Start) -> AnswerReading | None:
        """What the target expects at each token of the reference answer.

        Args:
            begun: Prompt tokens, or where decoding would begin; the latter stays as it is.
        """
        if not self.spoken:
            return None
        found = self.bench.encoder.encode_text(self.item.reference)
        start = deepcopy(begun) if isinstance(begun, Start) else begun
        return read_answer(self.bench.target, start, torch.tensor(found, dtype=torch.int64))

    def full_reading(self) -> AnswerReading | None:
        """The same after the whole prompt; None where that exceeds the target's window."""

        def read() -> AnswerReading | None:
            ids, window = self.bench.encoder.encode(self.prompt).ids, pair.context_window
            if window is not None and ids.numel() > window:
                return None
            memories = self.memories()
            return self.read_reference(
                ids if memories is None else memories.target.start(pair.target, ids)
            )

        pair = self.bench.pipeline.pair
        return self.once("full reading", read)

    def own_divergence(self, begun: Start) -> float | None:
        """How far the target strays from its own greedy answer to the whole prompt.

        Args:
            begun: Where decoding would begin; stays as it is.

        Returns:
            The divergence at that answer's tokens; None where the reference is not read, or the
            whole prompt has no full reading.
        """
        if not self.spoken or (memories := self.memories()) is None:
            return None
        target = self.bench.target
        if self._own is None:
            ids, limit = self.bench.encoder.encode(self.prompt).ids, self.bench.generation
            said = greedy(
                target, ids, limit.max_new_tokens, memories.target.start(target, ids)
            )  # (answer,)
            self._own = said, read_answer(target, memories.target.start(target, ids), said)
        said, full = self._own
        return divergence(full, read_answer(target, deepcopy(begun), said))

    def answer(self, prompt: Prompt, method: Method | None, *, shared: bool) -> Answer:
        """What the engine answers; arguments as for `answer_and_read`."""
        return self.answer_and_read(prompt, method, shared=shared)[0]

    def answer_and_read(
        self, prompt: Prompt, method: Method | None, *, shared: bool
    ) -> tuple[Answer, AnswerReading | None, float | None]:
        """What the engine answers, and what the target thinks of known answers.

        Args:
            prompt: The item's prompt, or a shorter one.
            method: A method on the cache, or both stages.
            shared: Go on from the full prefill, which the prompt must begin with.

        Returns:
            The answer, the reading of the reference answer, and `own_divergence` for methods on
            the cache.
        """
        memories = self.memories() if shared else None
        pipeline, options = self.bench.pipeline, [self.bench.generation]
        (request,) = pipeline.prepare([prompt], method, options, "raise", memories)
        with request.clock("prefill"):
            start = pipeline.begin([request])
        reading = self.read_reference(request.ids if start is None else start)
        strays = None if start is None else self.own_divergence(start)
        text = "".join(piece for (piece,) in pipeline.decode([request], start))
        return answer_of(request, text), reading, strays

    def start_in_place(self, kept: Kept) -> tuple[torch.Tensor, Start]:
        """The kept characters' tokens, and where a target begins that reads them in their places.

        Returns:
            (kept,) int64 ids, and the start.
        """
        tokens = self.bench.encoder.encode(self.prompt)
        spans = ((index, *span) for index, own in enumerate(kept) for span in own)
        places = kept_places(tokens, spans)  # (kept,)
        ids = tokens.ids[places]
        return ids, start_at(self.bench.target, [ids], [places])

    def answer_in_place(self, kept: Kept) -> tuple[str, int]:
        """Read only the kept characters, each at its original position.

        Returns:
            The answer, and the number of tokens read.
        """
        ids, start = self.start_in_place(kept)
        said = greedy(self.bench.target, ids, self.bench.generation.max_new_tokens, start)
        text = str(self.bench.tokenizer.decode(said.tolist(), skip_special_tokens=True))
        return text, ids.numel()

"""`PassageStore`: passages that the draft has read once, for any number of questions.

What a passage is read as depends on the draft, on the beginning that its template writes, and on
the passage's own text: that text's hash is its name. Keys and values are those of the draft's
cache, at the positions behind the beginning; every passage starts there anew.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import torch
from tqdm import tqdm

from ...config import SpecPC
from ...errors import ModelError, StoreError
from ...kv_cache.layers import StoppableCache, full_states
from ...models import embedder
from ...models.embedder import Embedder
from ...models.footprint import explain_out_of_memory
from ...models.loading import fingerprint
from ...prompt.encoder import PromptTokens
from ...prompt.messages import Prompt
from ...store.codec import Codec
from ...store.entries import Entry
from ...store.shards import Shards, ShardStats
from ...types import DraftReading, Passage
from ..draft import DraftModel
from ..head_weights import head_weights
from .frame import Frame
from .guessing import asks_once, guess_stored
from .indexing import digest, read_passages
from .late import BEHIND, QuestionStates, passages_fit, question_vectors
from .layout import Layers, Layout, Tier, layout_of, settled_for
from .moving import can_move
from .reading import Beginning, read_stored, stands_at
from .vectors import PROBE, StoredVectors, has_vectors, vectors_in

logger = logging.getLogger(__name__)
FORMAT = 1
MEMORY = ":memory:"
LONGEST = 4096  # tokens of a passage that are read in one piece; each piece begins anew
ASKING = 256  # tokens of the draft's window that are left to questions
_ROUND = 128  # passages that are read before they are written


class PassageStore:
    """Keys and values of passages by the hash of their text. Safe to use from several threads.

    Args:
        shards: Where they lie.
        draft: Who reads.
        layout: Which keys and values are kept.
        frame: What stands around passages.
    """

    def __init__(
        self,
        shards: Shards,
        draft: DraftModel,
        layout: Layout,
        frame: Frame,
        vectors: StoredVectors | None = None,
    ) -> None:
        self.shards, self.draft, self.layout, self.frame = shards, draft, layout, frame
        self.vectors, self.for_guesses = vectors, False
        window, begin = draft.context_window, len(frame.ids)
        self.piece = LONGEST if window is None else min(LONGEST, window - begin - ASKING)
        if self.piece <= 0:
            raise ModelError(
                f"The draft's window of {window} tokens holds no passage beside the beginning "
                f"({begin} tokens) and a question ({ASKING}): choose another draft."
            )
        self._beginning: Beginning | None = None
        self._movable: bool | None = None
        self._said: dict[int, str] = {}

    @classmethod
    def open(
        cls,
        path: str | Path,
        draft: DraftModel | HasDraft,
        *,
        tier: Tier | None = None,
        codec: Codec | None = None,
        layers: Layers | None = None,
        first_layer: int | None = None,
        for_guesses: bool = False,
        embedder: Embedder | str | Path | None = None,
        limit: int | None = None,
    ) -> PassageStore:
        """Open a store, or make one. What is not said is as the store was made.

        Args:
            path: Its folder; ":memory:" for one that is forgotten with the object.
            draft: Who reads: a `Compressor`, or the draft inside of it.
            tier: "cache" (of new stores) keeps keys and values, so that the question sees the
                passages; "keys" only the keys of the heads that count.
            codec: How numbers are kept: "float16", "int8" (of new stores) or "int4".
            layers: "heads" (of new stores) keeps the layers up to the last one of which a head
                counts, "all" every layer, for `likelihood_weight` and for guessed answers. Of a
                draft whose heads are not calibrated all are kept.
            first_layer: The question sees the passages from this layer on; lower ones are not
                kept. 0 (of new stores) gives the scores of passages that are read now. For
                SmolLM2-135M 14 takes a quarter of the bytes (docs/store.md says what it costs).
            for_guesses: SpecKV's guesses, and those of `Compressor.guess_answer`, are written from
                the store where it holds all layers and all passages: they cost the question alone,
                and are worse than those of a draft that reads (docs/results.md).
            embedder: Keeps its vectors of the passages' sentences too (see `SpecPC.embedder`), and
                is asked by methods with a `semantic_weight` that have none of their own.
            limit: Most bytes on disk, vectors apart; what was not used for longest leaves.

        Raises:
            StoreError: The folder holds a store of another draft, or of other options, or something
                else.
            ModelError: A layer of the draft is not plain full attention.
            ConfigError: tier="keys" for a draft whose heads are not calibrated.
        """
        reader = draft if isinstance(draft, DraftModel) else draft.draft
        where = None if str(path) == MEMORY else Path(path).expanduser()
        made = {} if where is None else Shards.made_with(where)
        chosen: dict[str, Any] = {
            "tier": tier or made.get("tier", "cache"),
            "codec": codec or made.get("codec", "int8"),
            "layers": layers or made.get("layers", "heads"),
            "first_layer": made.get("first_layer", 0) if first_layer is None else first_layer,
        }
        layout, frame = layout_of(reader.model, **chosen), Frame(reader.encoder)
        about = {"format": FORMAT, **_about(reader, frame), **chosen, "heads": _hash(layout.keys)}
        shards = Shards.open(where, about, limit=limit)
        vectors = None if embedder is None else StoredVectors(where, embedder)
        found = cls(shards, reader, layout, frame, vectors)
        found.for_guesses = for_guesses
        return found

    @property
    def where(self) -> str:
        """Its folder, or ":memory:"."""
        return str(self.shards.path or MEMORY)

    @property
    def described(self) -> str:
        """What of passages it keeps, and how, in words."""
        keys, values = len(self.layout.keys), len(self.layout.values)
        return f"{keys} keys and {values} values a token as {self.layout.codec}"

    def of(self, draft: DraftModel) -> PassageStore:
        """The same store with another copy of its draft. Both are closed together.

        Raises:
            StoreError: It is another draft.
        """
        if draft is self.draft:
            return self
        frame = Frame(draft.encoder)
        if _about(draft, frame) != _about(self.draft, self.frame):
            raise StoreError(
                "This store was opened with another draft than the one that is to read with it "
                "(other weights, or another chat template): open it with that one, or index the "
                "passages again into a store of its own."
            )
        found = PassageStore(self.shards, draft, self.layout, frame, self.vectors)
        found.for_guesses = self.for_guesses
        return found

    def embed_with(self, embedder: Embedder | str | Path) -> None:
        """Keep an embedder's sentence vectors too from now on, see `open`.

        Raises:
            StoreError: The store has another embedder's.
        """
        self.vectors = StoredVectors(self.shards.path, embedder)

    def add(self, passages: Iterable[str | Passage]) -> int:
        """Read passages that are not there yet.

        What has been read is written every hundred passages or so: a run that was ended goes on
        where it was.

        Args:
            passages: Any number; not more than that are held.

        Returns:
            How many were new.

        Raises:
            StoreError: They cannot be written (disk full, read-only, beyond the limit).
            OutOfMemoryError: The draft's pass does not fit into memory.
        """
        total = len(passages) if isinstance(passages, Sequence) else None
        new, rest = 0, iter(passages)
        bar = tqdm(total=total, desc="Draft reads", disable=not self.draft.progress, leave=False)
        with bar:
            while some := list(islice(rest, _ROUND)):
                texts = dict.fromkeys(_text(each) for each in some)
                known = self.shards.has([digest(text) for text in texts])
                unknown = [text for text in texts if digest(text) not in known]
                doing = f"{len(unknown)} passages were read for a store"
                with explain_out_of_memory(doing, draft=self.draft.model):
                    new += self.shards.put(self.read(unknown))
                if self.vectors is not None:
                    self.vectors.add([digest(text) for text in texts], list(texts))
                bar.update(len(some))
        return new

    def discard(self, passages: Iterable[str | Passage]) -> int:
        """Forget passages, given by their texts or by their hashes; returns how many there were."""
        names = [_text(each) for each in passages]
        names = [name if _is_digest(name) else digest(name) for name in names]
        with self._sentences() as sentences:
            if sentences is not None:
                sentences.discard(names)
        return self.shards.discard(names)

    def prune(self, passages: Iterable[str | Passage]) -> int:
        """Forget all passages but these, which leave the disk; returns how many there were.

        Args:
            passages: Everything that remains, as texts or hashes. What is not there is not read.
        """
        names = [_text(each) for each in passages]
        kept = {name if _is_digest(name) else digest(name) for name in names}
        with self._sentences() as sentences:
            if sentences is not None:
                sentences.discard({*sentences.keys()} - kept - {PROBE})
        gone = self.shards.discard({*self.shards.keys()} - kept)
        self.compact()
        return gone

    def __contains__(self, passage: object) -> bool:
        return isinstance(passage, str | Passage) and bool(
            self.shards.has([digest(_text(passage))])
        )

    def stats(self) -> ShardStats:
        """Passages, tokens and bytes; those of sentence vectors are counted apart."""
        return self.shards.stats()

    def compact(self) -> int:
        """Let discarded passages leave the disk; returns the bytes that became free."""
        with self._sentences() as sentences:
            more = 0 if sentences is None else sentences.compact()
        return self.shards.compact() + more

    def verify(self) -> list[str]:
        """Read everything; drops what is damaged and returns the passages' hashes."""
        with self._sentences() as sentences:
            more = [] if sentences is None else sentences.verify()
        return list(dict.fromkeys([*self.shards.verify(), *more]))

    def close(self) -> None:
        """Let go of the files."""
        self.shards.close()
        if self.vectors is not None:
            self.vectors.shards.close()

    def __enter__(self) -> PassageStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _sentences(self) -> AbstractContextManager[Shards | None]:
        """Where sentence vectors lie, also those of an embedder that is not here."""
        if self.vectors is None:
            return vectors_in(self.shards.path)
        return nullcontext(self.vectors.shards)

    def settled(self, method: SpecPC) -> tuple[SpecPC, str | None]:
        """A method as it is for these passages, and what had to be left out of it; see
        `settled_for`. Its embedder opens the vectors in the store's folder, if there are some.

        Raises:
            ConfigError: The method reads passages together, or needs layers that are not stored.
            StoreError: The vectors are another embedder's.
        """
        asked = method.embedder if method.semantic_weight else None
        if self.vectors is None and asked is not None and has_vectors(self.shards.path):
            self.vectors = StoredVectors(self.shards.path, asked)
        embedder = None if self.vectors is None else self.vectors.embedder
        return settled_for(method, self.draft.model, self.layout, embedder)

    def reading(
        self, prompt: Prompt, tokens: PromptTokens, method: SpecPC, remember: bool = False
    ) -> DraftReading:
        """What the draft makes of a prompt's question over stored passages.

        Args:
            prompt: Whose question is asked over whose passages.
            tokens: The same prompt as the draft's tokens, which get the scores.
            method: As `settled` gave it.
            remember: Keep passages that had to be read now.
        """
        texts = [passage.text for passage in prompt.passages]
        entries = self.entries(texts, remember)
        asked = method.embedder and embedder.load_embedder(method.embedder)
        if self.vectors is not None and asked is self.vectors.embedder:
            known = self.vectors.known([digest(text) for text in texts], texts)
            embedder.remember(asked, known)
        tail, model, begin = self.frame.tail(prompt.question), self.draft.model, self.beginning()
        late = self.layout.late(model) if method.likelihood_weight else None
        if late is None or self.layout.reaches_top:
            return read_stored(
                model, begin, self.layout, entries, tail, tokens, method, texts, self.piece
            )
        ids = [tokens.ids[tokens.passage == index] for index in range(len(texts))]
        method, layout = method.model_copy(update={"likelihood_weight": 0.0}), self.layout
        states, source = QuestionStates(late, tail), method.head_weights
        read = 0 if source is None else head_weights(model, source).last_layer
        alone = not layout.values and read >= states.last_layer  # the pass sees no passages
        found = read_stored(
            model, begin, layout, entries, tail, tokens, method, texts, self.piece, states
        )
        if alone:
            asked = states.vectors(model, stands_at(begin, entries, tail, self.piece))
        else:
            asked = question_vectors(model, late, begin, tail, min(BEHIND, self.piece))
        fit = passages_fit(
            model, late, layout, begin, entries, tail, asked, self._words, ids, self.piece
        )
        return replace(found, likelihood=fit)

    def _words(self, ids: torch.Tensor) -> list[str]:
        """What tokens say, whatever their case, and whether a space stands in front."""
        numbers = ids.tolist()
        for number in {*numbers} - self._said.keys():
            self._said[number] = self.draft.text([number]).strip().casefold()
        return [self._said[number] for number in numbers]

    def guesses(self, prompt: Prompt) -> bool:
        """Whether the draft's guesses are to come from here, and `guess` reads nothing but a
        prompt's question: no conversation and no tools are in it, all of its passages are here, and
        so is every layer.
        """
        if not self.for_guesses:
            return False
        names = {digest(passage.text) for passage in prompt.passages if passage.text.strip()}
        asked = bool(names) and self.layout.whole and asks_once(prompt)
        return asked and self.shards.has(list(names)) == names

    def guess(self, prompt: Prompt, tokens: int, *, moved: bool = True) -> torch.Tensor:
        """The draft's greedy answer to a prompt's question over its passages, read apart.

        It is asked as passages are read for the store: behind the default system text.

        Args:
            prompt: Whose question is asked; passages that are not here are read now.
            tokens: Most tokens of the answer; an end token stops and is included.
            moved: Let passages stand behind each other, where the draft has plain rotary embeddings
                and its window holds them; False leaves all where they were read, at the beginning.

        Returns:
            (guessed,) int64, the draft's ids.

        Raises:
            ConfigError: The store lacks layers.
            PromptError: The question exceeds the draft's window.
        """
        texts = [passage.text for passage in prompt.passages]
        model, begin, tail = self.draft.model, self.beginning(), self.frame.tail(prompt.question)
        with explain_out_of_memory("guessing an answer from stored passages", draft=model):
            entries = self.entries(texts, False) if self.layout.whole else ()
            moved = moved and self.can_move()
            return guess_stored(model, begin, self.layout, entries, tail, tokens, self.piece, moved)

    def beginning(self) -> Beginning:
        """What the draft makes of the fixed beginning; read once."""
        if self._beginning is None:
            cache = StoppableCache(config=self.draft.model.config)
            with torch.no_grad():
                ids = self.frame.ids[None].to(self.draft.model.device)
                self.draft.model.get_decoder()(input_ids=ids, past_key_values=cache, use_cache=True)
            self._beginning = Beginning(tuple(full_states(cache)))
        return self._beginning

    def can_move(self) -> bool:
        """Whether stored passages can stand at other positions than they were read at."""
        if self._movable is None:
            self._movable = can_move(self.draft.model, self.frame.ids, self.beginning())
        return self._movable

    def read(self, texts: Sequence[str]) -> Iterator[Entry]:
        """What the draft makes of texts now, see `read_passages`; nothing is kept."""
        begin = self.beginning()
        return read_passages(self.draft.model, begin, self.layout, self.frame, texts, self.piece)

    def entries(self, texts: Sequence[str], remember: bool) -> list[Entry | None]:
        """What is stored of each text, or read now; None for those without tokens.

        Args:
            texts: Of passages.
            remember: Keep those that had to be read now.
        """
        names = [digest(text) for text in texts]
        known = self.shards.get(list(dict.fromkeys(names)))
        missing = {n: t for n, t in zip(names, texts, strict=True) if n not in known}
        fresh = {entry.key: entry for entry in self.read(list(missing.values()))}
        if remember and fresh:
            try:
                self.shards.put(fresh.values())
                if self.vectors is not None:
                    self.vectors.add(list(missing), list(missing.values()))
            except StoreError as error:  # the question can be answered all the same
                logger.warning("%d passages were read, but not stored: %s", len(fresh), error)
        return [known.get(name) or fresh.get(name) for name in names]


def store_of(store: PassageStore | str | Path, draft: DraftModel) -> PassageStore:
    """A store that this draft reads with; a folder is opened, or made."""
    return store.of(draft) if isinstance(store, PassageStore) else PassageStore.open(store, draft)


class HasDraft(Protocol):
    """A compressor, or what else holds a draft."""

    draft: DraftModel


def _about(draft: DraftModel, frame: Frame) -> dict[str, str]:
    """What tells drafts apart: weights, and what their template writes in front of passages."""
    return {"draft": fingerprint(draft.model), "beginning": _hash(frame.ids.tolist())}


def _hash(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def _is_digest(name: str) -> bool:
    return len(name) == 64 and all(c in "0123456789abcdef" for c in name)


def _text(passage: str | Passage) -> str:
    return passage if isinstance(passage, str) else passage.text

"""Batches of fixed shape, made by a background process."""

from __future__ import annotations

import multiprocessing
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.queues import Queue
from pathlib import Path
from queue import Full

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from .generator import RowKind, make_row
from .scenes import natural_sentences

TYPES = (
    "copy",
    "one-fact",
    "two-fact",
    "all-values",
    "two-hop",
    "which",
    "quotation",
    "unanswerable",
    "cloze",
)
NATURAL_SHARE = 0.3  # of the rows of 256 tokens and more
OTHER_SHARE, OTHER_WEIGHT = 0.12, 0.3  # of the tokens that are not answers
SWAP_SHARE = 0.5  # of the copy rows
PICKED_SHARE = 0.26  # positions with logits, of all
DEV_SEED = 777


@dataclass(frozen=True, slots=True)
class Phase:
    """One step of the curriculum; it ends on accuracy, or at `until` of the run at the latest."""

    name: str
    lengths: tuple[int, ...]  # of the rows, step by step in turn
    copy_share: float
    easy_share: float  # of the rows that are not copy rows
    accuracy: float
    until: float


PHASES = (
    Phase("copy-32", (32,), 1.0, 0.0, 0.9, 0.08),
    Phase("copy-64", (64,), 1.0, 0.0, 0.9, 0.14),
    Phase("rag-128", (128,), 0.1, 0.9, 0.93, 0.30),
    Phase("rag-256", (256,), 0.15, 0.7, 0.9, 0.40),
    Phase("rag-512", (512,), 0.05, 0.3, 2.0, 0.45),
    Phase("rag-1024", (1024,), 0.02, 0.2, 2.0, 0.57),
    Phase("rag-2304", (2304,), 0.02, 0.15, 2.0, 0.64),
    Phase("rag-mixed", (512, 1024, 256, 512, 1024, 2304), 0.03, 0.3, 2.0, 0.75),
    Phase("rag-long", (512, 1024, 2304, 4608, 1024, 2304, 8448), 0.02, 0.15, 2.0, 1.0),
)
LONGEST = max(max(phase.lengths) for phase in PHASES)


@dataclass(frozen=True, slots=True)
class Batch:
    """Arrays of one step."""

    phase: int
    ids: NDArray[np.int32]  # (rows, length)
    picked: NDArray[np.int64]  # (picked,) flat positions whose next token is predicted
    wanted: NDArray[np.int64]  # (picked,) the next tokens
    weight: NDArray[np.float32]  # (picked,) 1 for answers, 0.3 for others, 0 for padding
    group: NDArray[np.int32]  # (picked,) number of the answer, -1 for others
    types: NDArray[np.int8]  # (answers,) index into TYPES
    links: NDArray[np.int64]  # (links, 4) row, position, earlier position, kind


def copy_row(rng: random.Random, stream: list[int], length: int) -> tuple[list[int], list[range]]:
    """Spans that come twice; the ranges are what can be predicted by copying."""

    def draw(count: int) -> list[int]:
        if natural:
            start = rng.randrange(len(stream) - count)
            return stream[start : start + count]
        return [rng.randrange(4, 4096) for _ in range(count)]

    ids: list[int] = []
    ranges: list[range] = []
    natural = rng.random() < 0.5
    block = min(length, rng.choice((32, 64, 128, 256, 512, 1024)))
    while len(ids) + block <= length:
        size = rng.randrange(3, min(block // 2, 24))
        gap = rng.randrange(0, block - 2 * size + 1)
        span = draw(size)
        tail = draw(block - 2 * size - gap)
        ids += span + draw(gap)
        ranges.append(range(len(ids) + (2 if natural else 1), len(ids) + size))
        ids += span + tail
    return ids + [0] * (length - len(ids)), ranges


def swap_row(
    rng: random.Random, stops: list[int], stream: list[int], length: int
) -> tuple[list[int], list[range]]:
    """Random "value phrase name ." statements, then "name ? value" in another order.

    Finding a value from a name that follows it takes other heads than copying does; without this
    warm-up the models stayed at chance on such sentences. The ranges are the repeated values.
    `stops` are ids of full stop and question mark.
    """

    def draw(most: int) -> list[int]:
        return [rng.randrange(300, 4096) for _ in range(rng.randrange(1, most + 1))]

    ids: list[int] = []
    ranges: list[range] = []
    longest = rng.choice((1, 1, 2, 4))
    start = rng.randrange(len(stream) - 8)
    phrase = stream[start : start + rng.choice((0, 1, 2, 3, 5, 7))]  # as "is the start date of"
    before = stream[start + 7 : start + 7 + rng.choice((0, 0, 1))]  # as "on"
    while len(ids) + 24 <= length:
        room = (length - len(ids)) // 2
        pairs: list[tuple[list[int], list[int]]] = []
        used = 0
        for _ in range(rng.choice((2, 3, 4, 6, 8, 12, 24))):
            pair = draw(longest), draw(longest)
            used += len(before) + len(pair[0]) + len(phrase) + len(pair[1]) + 1
            if used > room:
                break
            pairs.append(pair)
        for value, name in pairs:
            ids += [*before, *value, *phrase, *name, stops[0]]
        for value, name in rng.sample(pairs, len(pairs)):
            ids += [*name, stops[1]]
            ranges.append(range(len(ids), len(ids) + len(value)))
            ids += value
    return ids[:length] + [0] * (length - len(ids)), [r for r in ranges if r.stop <= length]


def draw_kind(rng: random.Random, phase: Phase, length: int, held_out: bool) -> RowKind:
    """What a row is made of; evaluation rows are of all kinds of facts at once."""
    if held_out:
        return "all"
    natural = NATURAL_SHARE if length >= 256 else 0.0
    return rng.choices(
        ("easy", "natural", "all"),
        (phase.easy_share, natural, max(0.0, 1 - phase.easy_share - natural)),
    )[0]


def make_batch(
    number: int, seed: int, phase: int, tokens: int, folder: Path, held_out: bool = False
) -> Batch:
    """The batch of a step: the same arguments give the same batch."""
    tokenizer, stream = _tools(folder)
    stops = [tokenizer.token_to_id(mark) for mark in ".?"]
    corpus = natural_sentences(folder / "corpus" / "sentences.txt")
    running = natural_sentences(folder / "corpus" / "running.txt")
    length = PHASES[phase].lengths[number % len(PHASES[phase].lengths)]
    rng = random.Random(f"{seed}/{phase}/{number}/{held_out}")
    rows: list[list[int]] = []
    marks: list[tuple[int, int, int, int]] = []  # row, start, end, type
    links: list[tuple[int, int, int, int]] = []
    for row in range(max(1, tokens // length)):
        if rng.random() < PHASES[phase].copy_share and not (held_out and phase > 1):
            swap = rng.random() < SWAP_SHARE
            ids, ranges = (
                swap_row(rng, stops, stream, length + 1)
                if swap
                else copy_row(rng, stream, length + 1)
            )
            marks += [(row, r.start, r.stop, 0) for r in ranges]
        else:
            kind = draw_kind(rng, PHASES[phase], length, held_out)
            text = running if kind == "natural" else corpus
            made = make_row(rng, tokenizer, text, length + 1, held_out, kind)
            ids = made.ids + [0] * (length + 1 - len(made.ids))
            marks += [(row, start, end, TYPES.index(kind)) for kind, start, end in made.answers]
            links += [(row, *map(int, link)) for link in made.links]
        rows.append(ids)
    return _pack(np.array(rows, dtype=np.int32), marks, links, phase, rng.randrange(2**31))


def _pack(
    table: NDArray[np.int32],
    marks: list[tuple[int, int, int, int]],
    links: list[tuple[int, int, int, int]],
    phase: int,
    seed: int,
) -> Batch:
    """Choose the positions: all answers, a sample of the others, padding up to a fixed count."""
    rows, length = table.shape[0], table.shape[1] - 1
    count = int(rows * length * (0.75 if phase < 2 else PICKED_SHARE))
    group = np.full((rows, length), -1, dtype=np.int32)
    for number, (row, start, end, _) in enumerate(marks):
        group[row, start - 1 : end - 1] = number
    following = table[:, 1:].reshape(-1).astype(np.int64)
    flat = group.reshape(-1)
    random_state = np.random.default_rng(seed)
    others = (flat < 0) & (following != 0) & (random_state.random(flat.size) < OTHER_SHARE)
    picked = np.concatenate((np.flatnonzero(flat >= 0), np.flatnonzero(others)))[:count]
    weight = np.where(flat[picked] >= 0, 1.0, OTHER_WEIGHT).astype(np.float32)
    padding = count - picked.size
    picked = np.pad(picked, (0, padding))
    chosen = flat[picked]
    chosen[count - padding :] = -1
    return Batch(
        phase,
        np.ascontiguousarray(table[:, :-1]),
        picked,
        following[picked],
        np.pad(weight, (0, padding)),
        chosen,
        np.array([mark[3] for mark in marks], dtype=np.int8),
        np.array(links, dtype=np.int64).reshape(-1, 4),
    )


_CACHE: dict[Path, tuple[Tokenizer, list[int]]] = {}


def _tools(folder: Path) -> tuple[Tokenizer, list[int]]:
    """Tokenizer and the natural text as one stream of ids."""
    if folder not in _CACHE:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer" / "tokenizer.json"))
        text = "\n".join(natural_sentences(folder / "corpus" / "sentences.txt")[:4000])
        _CACHE[folder] = tokenizer, tokenizer.encode(text).ids
    return _CACHE[folder]


def _work(
    queue: Queue[Batch], phase: object, start: int, seed: int, tokens: int, folder: Path
) -> None:
    number, parent = start, os.getppid()
    while os.getppid() == parent:  # else the trainer was killed
        now = phase.value  # type: ignore[attr-defined]
        batch = make_batch(number, seed, now, tokens, folder)
        number += 1
        while os.getppid() == parent:
            try:
                queue.put(batch, timeout=5)
                break
            except Full:
                continue


class BatchSource:
    """Reads batches of the current phase from a background process."""

    def __init__(self, folder: Path, seed: int, start: int, phase: int, tokens: int) -> None:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        context = multiprocessing.get_context("spawn")
        self._phase = context.Value("i", phase)
        self._queue: Queue[Batch] = context.Queue(maxsize=4)
        self._process = context.Process(
            target=_work, args=(self._queue, self._phase, start, seed, tokens, folder), daemon=True
        )
        self._process.start()

    def set_phase(self, phase: int) -> None:
        """Batches made before this call for another phase are dropped."""
        self._phase.value = phase

    def __iter__(self) -> Iterator[Batch]:
        while True:
            batch = self._queue.get()
            if batch.phase == self._phase.value:
                yield batch

    def close(self) -> None:
        """End the background process."""
        self._process.terminate()
        self._process.join()

"""Entries whose every byte follows from a number, and what processes of their own do with them."""

from __future__ import annotations

import hashlib
import logging
import os
import random
import time
from collections.abc import Iterable
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Event
from pathlib import Path

import torch

from draftsieve.core.errors import StoreError
from draftsieve.core.store.entries import Entry
from draftsieve.core.store.shards import Shards

ABOUT = {"draft": "tiny", "layers": [1, 2], "codec": "int8"}
NOBODY = 65534


def key_of(number: int) -> str:
    return hashlib.sha256(str(number).encode()).hexdigest()


def entry(number: int, rows: int | None = None) -> Entry:
    """An entry whose every byte follows from its number."""
    rows = number % 7 + 1 if rows is None else rows
    noise = torch.Generator().manual_seed(number)
    return Entry(
        key_of(number),
        rows,
        {
            "keys": torch.randint(-128, 128, (rows, 2, 8), generator=noise, dtype=torch.int8),
            "scale": torch.rand((rows, 2), generator=noise).half(),
            "sums": torch.rand(rows, generator=noise),
        },
    )


def assert_exact(found: dict[str, Entry], numbers: Iterable[int], rows: int | None = None) -> None:
    for number in numbers:
        got, made = found[key_of(number)], entry(number, rows)
        assert got.key == made.key
        assert got.rows == made.rows
        assert list(got.tensors) == list(made.tensors)
        for name, tensor in made.tensors.items():
            assert got.tensors[name].dtype == tensor.dtype
            assert torch.equal(got.tensors[name], tensor), (number, name)


def keys_of(numbers: Iterable[int]) -> list[str]:
    return [key_of(number) for number in numbers]


def flip(file: Path, at: int, mask: int = 0x10) -> None:
    """Another byte at that place."""
    data = bytearray(file.read_bytes())
    data[at] ^= mask
    file.write_bytes(data)


class Warnings(logging.Handler):
    """What the package warned of."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []
        logging.getLogger("draftsieve").addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def batch(number: int) -> range:
    """Numbers of the entries that are put together."""
    return range(number * 4, number * 4 + 4)


def write_until_killed(path: Path, first: int, done: Connection) -> None:
    """Puts, discards and compacts without end, and tells what it has begun and finished."""
    torch.set_num_threads(1)
    with Shards.open(path, ABOUT) as store:
        for number in range(first, first + 1_000_000):
            store.put(entry(each) for each in batch(number))
            done.send(("put", number))
            if number % 3 == 0:
                done.send(("discarding", number))
                store.discard(keys_of(batch(number)))
            if number % 5 == 0:
                store.compact()


def read_until_told(path: Path, seed: int, stop: Event, result: Connection) -> None:
    """Gets entries, of which those below 40 must be there; tells how many, and what was wrong."""
    torch.set_num_threads(1)
    warnings, chance, got = Warnings(), random.Random(seed), 0
    try:
        with Shards.open(path, ABOUT) as store:
            while not stop.is_set():
                numbers = chance.sample(range(80), 10)
                found = store.get(keys_of(numbers))
                assert_exact(found, [n for n in numbers if n < 40 or key_of(n) in found])
                got += len(found)
    except BaseException as error:
        result.send((got, [repr(error), *warnings.messages]))
        raise
    result.send((got, warnings.messages))


def use_read_only(path: Path, result: Connection) -> None:
    """What can be done by somebody who may not write; tells answers and messages."""
    if os.geteuid() == 0:
        os.setuid(NOBODY)
    told: dict[str, object] = {}
    with Shards.open(path, ABOUT) as store:
        told["found"] = sorted(store.get(keys_of(range(10))))
        told["stats"] = store.stats().entries
        told["broken"] = store.verify()
        told["has"] = len(store.has(keys_of(range(10))))
        for name, action in (
            ("put", lambda: store.put([entry(50)])),
            ("discard", lambda: store.discard([key_of(1)])),
            ("compact", store.compact),
        ):
            try:
                action()
            except StoreError as error:
                told[name] = str(error)
        result.send(told)
        if result.recv() == "again":
            time.sleep(0.01)
            result.send(len(store.get(keys_of(range(100, 110)))))
            result.recv()


def use_after_a_fork(path: Path, result: Connection) -> None:
    """Parent and child read and write through what was opened before."""
    with Shards.open(path, ABOUT) as store:
        store.put([entry(1)])
        store.get([key_of(1)])
        parents = store._index._database._connection  # SQLite forbids a child to use it
        child = os.fork()
        if not child:
            assert_exact(store.get([key_of(1)]), [1])
            store.put([entry(2)])
            os._exit(int(store._index._database._connection is parents))
        store.put([entry(3)])
        ended = os.waitpid(child, 0)[1]
        assert_exact(store.get(keys_of([1, 2, 3])), [1, 2, 3])
        store.put([entry(4)])
    result.send(ended)

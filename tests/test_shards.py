"""Arrays by key on disk and in memory: what was put comes back, or nothing does."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest
import torch

from draftsieve.core.errors import StoreError
from draftsieve.core.store.entries import Entry
from draftsieve.core.store.shards import Shards

ABOUT = {"draft": "tiny", "layers": [1, 2], "codec": "int8"}
Opened = Callable[..., Shards]


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


@pytest.fixture(params=["disk", "memory"])
def opened(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Opened]:
    """Opens a store, on disk or in memory."""
    stores: list[Shards] = []

    def open_(limit: int | None = None) -> Shards:
        path = tmp_path / "store" if request.param == "disk" else None
        stores.append(Shards.open(path, ABOUT, limit=limit))
        return stores[-1]

    yield open_
    for store in stores:
        store.close()


def test_what_was_put_comes_back(opened: Opened) -> None:
    store = opened()
    assert store.put(entry(number) for number in range(10)) == 10
    assert store.put([entry(10)]) == 1
    found = store.get(keys_of([3, 10, 99, 0, 3]))
    assert list(found) == keys_of([3, 10, 0])
    assert_exact(found, [3, 10, 0])
    assert store.has(keys_of([3, 99])) == {key_of(3)}
    assert list(store.keys()) == sorted(keys_of(range(11)))
    stats = store.stats()
    assert (stats.entries, stats.rows) == (11, sum(n % 7 + 1 for n in range(11)))
    assert stats.bytes > stats.rows * (16 + 4 + 4)
    assert store.get([]) == {}
    assert store.put([]) == 0


def test_entries_that_are_there_are_skipped(opened: Opened) -> None:
    store = opened()
    assert store.put([entry(1), entry(2), entry(1)]) == 2
    size = store.stats().bytes
    assert store.put([entry(2), entry(1)]) == 0
    assert store.stats().bytes == size
    assert store.put([entry(2), entry(3)]) == 1
    assert_exact(store.get(keys_of([1, 2, 3])), [1, 2, 3])


def test_what_the_caller_changes_later_is_not_stored(opened: Opened) -> None:
    store, mine = opened(), entry(1)
    store.put([mine])
    mine.tensors["keys"].zero_()
    assert_exact(store.get([key_of(1)]), [1])


@pytest.mark.parametrize(
    "other",
    [
        Entry("a", 2, {"keys": torch.zeros(2, 2, 8)}),
        Entry("a", 2, {"keys": torch.zeros(2, 2, 9, dtype=torch.int8)}),
        Entry("a", 3, {"keys": torch.zeros(2, 2, 8, dtype=torch.int8)}),
        Entry("a", 2, {"values": torch.zeros(2, 2, 8, dtype=torch.int8)}),
        Entry("a", 2, {}),
        Entry("a", 1, {"keys": torch.zeros((), dtype=torch.int8)}),
    ],
)
def test_entries_of_another_form_are_refused(opened: Opened, other: Entry) -> None:
    store = opened()
    store.put([Entry("b", 2, {"keys": torch.zeros(2, 2, 8, dtype=torch.int8)})])
    with pytest.raises(StoreError, match="'a'"):
        store.put([Entry("c", 2, {"keys": torch.zeros(2, 2, 8, dtype=torch.int8)}), other])
    assert list(store.keys()) == ["b"]


def test_discarded_entries_leave_the_disk_when_the_store_is_compacted(opened: Opened) -> None:
    store = opened()
    for first in range(0, 60, 20):
        store.put(entry(number, 500) for number in range(first, first + 20))
    kept = store.get(keys_of(range(0, 60, 2)))
    before = store.stats()
    assert store.discard(keys_of([*range(1, 60, 2), 99])) == 30
    assert store.discard([]) == 0
    assert store.has(keys_of(range(60))) == {*keys_of(range(0, 60, 2))}
    assert store.stats().bytes >= before.bytes - 4096
    freed = store.compact()
    assert freed > 30 * 500 * 24
    assert store.stats().bytes == before.bytes - freed
    assert_exact(kept, range(0, 60, 2), 500)  # what was handed out stays readable
    assert_exact(store.get(keys_of(range(60))), range(0, 60, 2), 500)
    assert store.compact() == 0
    assert store.verify() == []
    store.discard(list(store.keys()))
    store.compact()
    assert store.stats().entries == 0
    assert store.stats().bytes < 60_000


def test_a_closed_store_says_so(opened: Opened) -> None:
    store = opened()
    store.put([entry(1)])
    found = store.get([key_of(1)])
    store.close()
    store.close()
    assert_exact(found, [1])
    with pytest.raises(StoreError, match="closed"):
        store.get([key_of(1)])


def test_a_store_is_for_what_it_was_made_with(tmp_path: Path) -> None:
    with Shards.open(tmp_path / "deep" / "store", ABOUT) as store:
        store.put([entry(1)])
    with Shards.open(str(tmp_path / "deep" / "store"), {**ABOUT, "layers": (1, 2)}) as store:
        assert_exact(store.get([key_of(1)]), [1])
    for about, told in (
        ({**ABOUT, "draft": "other"}, "draft 'tiny', not 'other'"),
        ({**ABOUT, "more": 1}, "more None, not 1"),
        ({"draft": "tiny"}, "codec 'int8', not None; layers"),
    ):
        with pytest.raises(StoreError, match=told):
            Shards.open(tmp_path / "deep" / "store", about)


def flip(file: Path, at: int) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 0x10
    file.write_bytes(data)


def test_a_flipped_byte_costs_one_entry(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with Shards.open(tmp_path, ABOUT) as store:
        store.put(entry(number) for number in range(20))
    (shard,) = tmp_path.glob("shard-*")
    flip(shard, shard.stat().st_size - 1)
    with Shards.open(tmp_path, ABOUT) as store, caplog.at_level(logging.WARNING):
        found = store.get(keys_of(range(20)))
        assert len(found) == 19
        (lost,) = {*keys_of(range(20))} - {*found}
        assert lost in caplog.text
        assert_exact(found, [n for n in range(20) if key_of(n) != lost])
        assert store.has([lost]) == set()
        number = keys_of(range(20)).index(lost)
        assert store.put([entry(number)]) == 1
        assert_exact(store.get([lost]), [number])

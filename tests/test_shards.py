"""Arrays by key on disk and in memory: what was put comes back, or nothing does."""

from __future__ import annotations

import errno
import logging
import os
import random
import resource
import sqlite3
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from draftsieve.core.errors import StoreError
from draftsieve.core.store import reading, shards
from draftsieve.core.store.entries import Entry
from draftsieve.core.store.files import Folder
from draftsieve.core.store.shards import Shards

from .shards_fixtures import ABOUT, assert_exact, entry, flip, key_of, keys_of

Opened = Callable[..., Shards]


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


@pytest.mark.parametrize("damage", ["cut", "longer", "deleted", "header", "empty"])
def test_a_lost_shard_costs_its_entries(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    with Shards.open(tmp_path, ABOUT) as store:
        store.put(entry(number) for number in range(5))
        (shard,) = tmp_path.glob("shard-*")
        store.put(entry(number) for number in range(5, 10))
    data = shard.read_bytes()
    if damage == "deleted":
        shard.unlink()
    else:
        new = {"cut": data[:-9], "longer": data + b"x", "header": b"\xff" * 8 + data[8:]}
        shard.write_bytes(new.get(damage, b""))
    with Shards.open(tmp_path, ABOUT) as store, caplog.at_level(logging.WARNING):
        found = store.get([key_of(1), key_of(7)])
        assert_exact(found, [7])
        assert len(found) == len(caplog.records) == 1
        assert shard.name in caplog.text
        assert store.has(keys_of(range(10))) == {*keys_of(range(5, 10))}  # the whole shard left
        assert store.put(entry(number) for number in range(10)) == 5
        assert_exact(store.get(keys_of(range(10))), range(10))
        assert len(list(tmp_path.glob("shard-*"))) == 2
        assert store.verify() == []


def test_verify_drops_what_is_broken(tmp_path: Path) -> None:
    with Shards.open(tmp_path, ABOUT) as store:
        store.put(entry(number, 50) for number in range(6))
        assert len(store.get(keys_of(range(6)))) == 6  # mapped, and compared once
        (shard,) = tmp_path.glob("shard-*")
        data = bytearray(shard.read_bytes())
        data[-1] ^= 1
        with shard.open("r+b") as file:  # in place, as a disk does it
            file.write(data)
        (broken,) = store.verify()
        assert store.has(keys_of(range(6))) == {*keys_of(range(6))} - {broken}
        assert store.verify() == []
        store.put(entry(number, 50) for number in range(10, 12))
        for file in tmp_path.glob("shard-*"):
            os.truncate(file, 100)
        assert len(store.verify()) == 7
        assert store.stats().entries == 0


@pytest.mark.parametrize("change", ["compact", "discard"])
def test_what_moves_between_look_up_and_reading_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, change: str
) -> None:
    """Another process compacts after the index was asked, before the shard is opened."""
    with Shards.open(tmp_path, ABOUT) as store, Shards.open(tmp_path, ABOUT) as other:
        store.put(entry(number) for number in range(10))
        read, calls = Folder.read, []

        def late(self: Folder, shard: str, size: int) -> Mapping[str, torch.Tensor]:
            if not calls:
                calls.append(shard)
                other.discard(keys_of(range(5, 10) if change == "compact" else range(10)))
                other.compact()
            return read(self, shard, size)

        monkeypatch.setattr(Folder, "read", late)
        found = store.get(keys_of(range(10)))
        assert calls
        assert_exact(found, range(5) if change == "compact" else ())
        assert len(found) == store.stats().entries == len(store.get(keys_of(range(10))))
        assert not caplog.records


def test_compacting_does_not_hide_damage(tmp_path: Path) -> None:
    with Shards.open(tmp_path, ABOUT) as store:
        store.put(entry(number, 50) for number in range(6))
        store.discard([key_of(0)])
    (shard,) = tmp_path.glob("shard-*")
    flip(shard, shard.stat().st_size - 1)
    with Shards.open(tmp_path, ABOUT) as store:
        store.compact()
        assert store.stats().entries == 4
        found = store.get(keys_of(range(6)))
        assert_exact(found, [n for n in range(6) if key_of(n) in found], 50)
        assert len(found) == 4


def test_any_flipped_bit_of_a_shard_is_noticed(tmp_path: Path) -> None:
    chance = random.Random(0)
    with Shards.open(tmp_path, ABOUT) as store:
        store.put(entry(number) for number in range(6))
    (shard,) = tmp_path.glob("shard-*")
    index = tmp_path / "index.sqlite"
    whole, names = shard.read_bytes(), index.read_bytes()
    for at in [*range(0, 320, 8), *chance.sample(range(len(whole)), 20)]:
        flip(shard, at, 1 << chance.randrange(8))
        with Shards.open(tmp_path, ABOUT) as store:
            found = store.get(keys_of(range(6)))
            assert_exact(found, [n for n in range(6) if key_of(n) in found])
        shard.write_bytes(whole)
        index.write_bytes(names)


def test_any_flipped_bit_of_the_index_loses_entries_at_most(tmp_path: Path) -> None:
    chance = random.Random(1)
    with Shards.open(tmp_path, ABOUT) as store:
        store.put(entry(number) for number in range(20))
        store.put(entry(number) for number in range(20, 40))
    index = tmp_path / "index.sqlite"
    whole = index.read_bytes()
    used = [at for at, byte in enumerate(whole) if byte]
    for at in [*range(0, 100, 5), *chance.sample(used, 60)]:
        flip(index, at, 1 << chance.randrange(8))
        try:
            with Shards.open(tmp_path, ABOUT) as store:
                found = store.get(keys_of(range(40)))
                assert_exact(found, [n for n in range(40) if key_of(n) in found])
                store.verify()
        except StoreError:
            pass
        for file in tmp_path.glob("index.sqlite-*"):
            file.unlink()
        index.write_bytes(whole)


def use(path: Path) -> None:
    with Shards.open(path, ABOUT) as store:
        store.get(keys_of(range(100)))
        store.verify()


def test_a_forged_index_names_no_other_files(tmp_path: Path) -> None:
    path, outside = tmp_path / "store", tmp_path / "outside.safetensors"
    with Shards.open(path, ABOUT) as store:
        store.put([entry(1)])
    (shard,) = path.glob("shard-*")
    shard.rename(outside)
    with sqlite3.connect(path / "index.sqlite") as database:
        database.execute("UPDATE shards SET name = '../outside.safetensors'")
    database.close()
    with Shards.open(path, ABOUT) as store:
        store.compact()
        assert store.get([key_of(1)]) == {}
        store.compact()
    assert outside.exists()


@pytest.mark.parametrize("damage", ["noise", "cut", "deleted", "empty", "text"])
def test_a_damaged_index_is_an_error_that_says_what_to_do(tmp_path: Path, damage: str) -> None:
    with Shards.open(tmp_path, ABOUT) as store:
        store.put(entry(number) for number in range(100))
    index = tmp_path / "index.sqlite"
    data = index.read_bytes()
    if damage == "deleted":
        index.unlink()
    else:
        noise = random.Random(0).randbytes(len(data) - 100)
        new = {"noise": data[:100] + noise, "cut": data[:5000], "text": b"hello" * 999}
        index.write_bytes(new.get(damage, b""))
    for _ in range(2):  # it stays an error
        with pytest.raises(StoreError, match=r"(damaged|lost).* index again"):
            use(tmp_path)
    assert len(list(tmp_path.glob("shard-*"))) == 1


def test_what_is_no_store_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreError, match="Give a folder"):
        Shards.open(tmp_path / "file", ABOUT)
    with pytest.raises(StoreError, match="Give a folder"):
        Shards.open(tmp_path / "file" / "below", ABOUT)
    with pytest.raises(StoreError, match="holds 'file'"):
        Shards.open(tmp_path, ABOUT)
    assert [file.name for file in tmp_path.iterdir()] == ["file"]
    other = tmp_path / "other"
    other.mkdir()
    with sqlite3.connect(other / "index.sqlite") as database:
        database.execute("CREATE TABLE songs (name)")
    database.close()
    with pytest.raises(StoreError, match="another program"):
        Shards.open(other, ABOUT)
    Shards.open(tmp_path / "newer", ABOUT).close()
    with sqlite3.connect(tmp_path / "newer" / "index.sqlite") as database:
        database.execute("PRAGMA user_version = 99")
    database.close()
    with pytest.raises(StoreError, match="format 99"):
        Shards.open(tmp_path / "newer", ABOUT)
    with pytest.raises(StoreError, match="hold nothing"):
        Shards.open(None, ABOUT, limit=0)


def fill(store: Shards) -> None:
    """The shards are small, but the log of the index grows."""
    for first in range(10, 2_000, 100):
        store.put(entry(number, 5) for number in range(first, first + 100))


@pytest.mark.parametrize("largest", [1_000, 20_000, 41_000])
def test_a_full_disk_leaves_a_valid_store(tmp_path: Path, largest: int) -> None:
    """No file may grow beyond `largest`: the shard does not fit, or the index's log does not."""
    with Shards.open(tmp_path, ABOUT) as store:
        store.put(entry(number) for number in range(10))
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, hard))
        try:
            with pytest.raises(StoreError, match="Free space"):
                fill(store)
            assert len(store.get(keys_of(range(10)))) == 10
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        entries = store.stats().entries
        assert entries % 100 == 10
        known = store.has(keys_of(range(2_000)))
        assert len(known) == entries
        shards = {file.name for file in tmp_path.glob("shard-*")}
        assert len(shards) == 1 + (entries - 10) // 100  # nothing half-written is left
        assert not list((tmp_path / "writing").iterdir())
        assert store.verify() == []
        assert store.put(entry(number, 5) for number in range(10, 2_000)) == 2_000 - entries


def test_a_nearly_full_disk_is_compacted_shard_by_shard(tmp_path: Path) -> None:
    """All that is left does not fit into one new file, but each shard's own does."""
    with Shards.open(tmp_path, ABOUT) as store:
        for number in range(0, 8, 2):
            store.put([entry(number, 20_000), entry(number + 1, 20_000)])
        store.discard(keys_of(range(0, 8, 2)))
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))
        try:
            assert store.compact() >= 4 * 480_000
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert len(list(tmp_path.rglob("shard-*"))) == 4
        assert_exact(store.get(keys_of(range(1, 8, 2))), range(1, 8, 2), 20_000)


def test_too_many_open_files_are_no_damage(tmp_path: Path) -> None:
    """Of a shard that cannot be opened now nothing is known: nothing may be dropped."""
    with Shards.open(tmp_path, ABOUT) as store:
        for number in range(3):
            store.put([entry(number)])
        store.get([key_of(0)])
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        lowest = os.open(os.devnull, os.O_RDONLY)
        os.close(lowest)
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
        try:
            for action in (lambda: store.get(keys_of([1, 2])), store.verify, store.stats):
                with pytest.raises(StoreError, match="unharmed"):
                    action()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert_exact(store.get(keys_of([0, 1, 2])), [0, 1, 2])


def test_a_failing_flush_stores_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with Shards.open(tmp_path, ABOUT) as store:
        store.put([entry(1)])
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fail)
            with pytest.raises(StoreError, match="No space left"):
                store.put([entry(2)])
        assert list(store.keys()) == [key_of(1)]
        assert len(list(tmp_path.rglob("shard-*"))) == 1
        assert store.put([entry(2)]) == 1


def test_the_least_recently_used_leave_at_the_limit(opened: Opened) -> None:
    """An entry of 1,000 rows has 24 kB; an index 40 kB: of eight there is room for seven."""
    limit = 7 * 24_000 + 48_000
    store = opened(limit)
    for number in range(7):
        store.put([entry(number, 1_000)])
    assert store.stats().entries == 7
    store.get([key_of(0)])
    store.put([entry(1, 1_000)])
    store.put([entry(7, 1_000)])
    left = {number for number in range(8) if store.has([key_of(number)])}
    assert {0, 1, 7} <= left
    assert 2 not in left
    assert_exact(store.get(keys_of(left)), left, 1_000)
    for number in range(8, 40):
        store.put([entry(number, 1_000)])
        assert store.stats().bytes <= limit
        assert store.has(keys_of([number, number - 1, number - 2])) == {
            *keys_of([number, number - 1, number - 2])
        }
    assert 5 <= store.stats().entries <= 8
    with pytest.raises(StoreError, match="limit is"):
        store.put(entry(number, 1_000) for number in range(100, 110))
    assert store.has([key_of(39)])


def test_use_times_are_shared_once_a_minute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def bytes_of_the_log() -> bytes:
        return (tmp_path / "index.sqlite-wal").read_bytes()

    limit = 4 * 24_000 + 48_000
    with Shards.open(tmp_path, ABOUT, limit=limit) as store, Shards.open(tmp_path, ABOUT) as reader:
        for number in range(4):
            store.put([entry(number, 1_000)])
        before = bytes_of_the_log()
        reader.get([key_of(0)])
        assert bytes_of_the_log() == before
        monkeypatch.setattr(shards, "_EVERY", 0.0)
        reader.get([key_of(0)])
        assert bytes_of_the_log() != before
        store.put([entry(4, 1_000)])
        assert store.has(keys_of(range(5))) >= {*keys_of([0, 4])}
        assert not store.has([key_of(1)])


def test_entries_are_views_and_few_shards_stay_mapped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "_OPEN", 3)

    def mapped() -> int:
        return Path("/proc/self/maps").read_text().count(f"{tmp_path}/shard-")

    with Shards.open(tmp_path, ABOUT) as store:
        for number in range(0, 20, 2):
            store.put([entry(number), entry(number + 1)])
        found = store.get(keys_of([0, 1]))
        first, second = (each.tensors["keys"].untyped_storage() for each in found.values())
        assert first.data_ptr() == second.data_ptr()
        del first, second
        found.clear()
        tells = Path("/proc/self/maps").exists()
        found = store.get(keys_of(range(20)))
        assert_exact(found, range(20))
        if tells:
            assert mapped() == 10
            found.clear()
            assert mapped() == 3
        store.discard(keys_of(range(10, 20)))
        store.compact()
        if tells:
            assert mapped() == 0


def test_threads_share_a_store(opened: Opened) -> None:
    store = opened()
    store.put(entry(number) for number in range(20))

    def read(seed: int) -> int:
        chance = random.Random(seed)
        for _ in range(60):
            numbers = chance.sample(range(60), 10)
            found = store.get(keys_of(numbers))
            assert_exact(found, [n for n in numbers if n < 20 or key_of(n) in found])
        return 1

    def write(first: int) -> int:
        for turn in range(6):
            store.put(entry(number) for number in range(first, first + 20))
            store.discard(keys_of(range(first, first + 20, 2)))
            if turn % 2:
                store.compact()
        return 1

    with ThreadPoolExecutor(6) as pool:
        readers = [pool.submit(read, seed) for seed in range(4)]
        writers = [pool.submit(write, first) for first in (20, 40)]
        assert sum(each.result() for each in (*readers, *writers)) == 6
    assert store.verify() == []
    assert store.stats().entries == 40

"""Several processes at one store: killed while they write, reading while others write."""

from __future__ import annotations

import multiprocessing
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from draftsieve.core.store.shards import Shards

from .shards_fixtures import (
    ABOUT,
    assert_exact,
    batch,
    entry,
    flip,
    key_of,
    keys_of,
    read_until_told,
    use_after_a_fork,
    use_read_only,
    write_until_killed,
)

pytestmark = pytest.mark.skipif(
    "forkserver" not in multiprocessing.get_all_start_methods(), reason="no forkserver here"
)
Start = Callable[..., tuple[BaseProcess, Connection]]


@pytest.fixture(scope="module")
def start() -> Start:
    """Starts a process quickly: torch is imported once, in the process that they are forked of."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.shards_fixtures"])

    def start_(target: Callable[..., None], *arguments: object) -> tuple[BaseProcess, Connection]:
        mine, theirs = context.Pipe()
        process = context.Process(target=target, args=(*arguments, theirs), daemon=True)
        process.start()
        theirs.close()
        return process, mine

    return start_


def test_a_killed_writer_leaves_whole_puts_or_nothing(tmp_path: Path, start: Start) -> None:
    chance = random.Random(15)
    finished: set[int] = set()
    discarded: set[int] = set()
    first = 0
    for turn in range(24):
        process, told = start(write_until_killed, tmp_path, first)
        if turn % 4:  # otherwise anywhere, while it opens the store as well
            told.poll(20)
        time.sleep(chance.random() * 0.12)
        process.kill()
        process.join()
        last = first
        try:
            while True:
                kind, last = told.recv()
                (finished if kind == "put" else discarded).add(last)
        except (EOFError, OSError):
            pass
        with Shards.open(tmp_path, ABOUT) as store:
            assert store.verify() == []
            for number in range(last + 3):
                found = store.get(keys_of(batch(number)))
                assert len(found) in (0, 4), number
                assert_exact(found, batch(number) if found else ())
                assert found or number in discarded or number not in finished, number
        first = last + 2
    assert len(finished) > 20
    with Shards.open(tmp_path, ABOUT) as store:
        store.compact()
        assert store.verify() == []
        assert len(list(tmp_path.rglob("shard-*"))) == 1


def test_readers_go_on_while_one_writes_discards_and_compacts(tmp_path: Path, start: Start) -> None:
    """Never a wrong byte, never a miss of what is there all the time, no warning."""
    with Shards.open(tmp_path, ABOUT) as store:
        store.put(entry(number) for number in range(40))
        stop = multiprocessing.get_context("forkserver").Event()
        readers = [start(read_until_told, tmp_path, seed, stop) for seed in range(8)]
        chance, freed = random.Random(0), 0
        until = time.monotonic() + 4
        while time.monotonic() < until:
            store.put(entry(number) for number in chance.sample(range(40, 80), 15))
            store.discard(keys_of(chance.sample(range(40, 80), 15)))
            freed += store.compact()
        stop.set()
        for process, told in readers:
            got, wrong = told.recv()
            assert not wrong
            assert got > 40
            process.join()
        assert freed > 0
        assert store.verify() == []
        store.compact()
        assert len(list(tmp_path.glob("shard-*"))) == 1


@pytest.fixture
def public_path() -> Iterator[Path]:
    """A folder that every user may enter."""
    path = Path(tempfile.mkdtemp())
    path.chmod(0o755)
    yield path
    for folder in [path, *path.rglob("*")]:
        folder.chmod(0o755)
    shutil.rmtree(path)


@pytest.mark.parametrize("writer_is_there", [False, True])
def test_a_read_only_store_is_read_and_not_changed(
    public_path: Path, start: Start, writer_is_there: bool
) -> None:
    store = Shards.open(public_path, ABOUT)
    store.put(entry(number) for number in range(10))
    if not writer_is_there:
        store.close()
    (shard,) = public_path.glob("shard-*")
    flip(shard, shard.stat().st_size - 1)
    for file in public_path.iterdir():
        file.chmod(0o555 if file.is_dir() else 0o444)
    public_path.chmod(0o555)
    before = {file: file.stat().st_mtime_ns for file in public_path.rglob("*")}
    process, told = start(use_read_only, public_path)
    answers = told.recv()
    assert len(answers["found"]) == 9
    assert answers["stats"] == answers["has"] == 10
    assert len(answers["broken"]) == 1
    for name in ("put", "discard", "compact"):
        assert "read-only" in answers[name]
    assert before == {file: file.stat().st_mtime_ns for file in public_path.rglob("*")}
    for file in [public_path, *public_path.iterdir()]:
        file.chmod(0o755)
    if not writer_is_there:  # somebody else starts to write after all
        store = Shards.open(public_path, ABOUT)
    store.put(entry(number) for number in range(100, 110))
    told.send("again")
    assert told.recv() == 10
    told.send("end")
    process.join()
    store.close()


def test_a_store_can_be_used_after_a_fork(tmp_path: Path, start: Start) -> None:
    process, told = start(use_after_a_fork, tmp_path)
    assert told.recv() == 0
    process.join()
    with Shards.open(tmp_path, ABOUT) as store:
        assert store.verify() == []
        assert_exact(store.get(keys_of([1, 2, 3, 4])), [1, 2, 3, 4])
        assert store.has([key_of(4)])

"""Arrays by key, written once and read often, by any number of processes.

The entries of one `put` are one shard, a file that never changes; an index says which rows of which
shard are whose. A shard counts once the index names it, so that a writer may die at any instant.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from threading import Lock
from typing import Any, Self

from ..errors import StoreError
from .entries import Entry, form_of, places_of, stacked
from .files import INDEX, Files, Memory
from .index import Index, ShardUse
from .opening import compare, folder_of, has_no_shards
from .reading import Reader

logger = logging.getLogger(__name__)

_EVERY = 60.0  # seconds after which use times are written
_SHARD = 256 << 20  # bytes of the shards that `compact` makes
_SMALL = _SHARD // 4  # smaller ones are put together


@dataclass(frozen=True, slots=True)
class ShardStats:
    """What a store holds."""

    entries: int
    rows: int
    bytes: int  # shards and index


class Shards:
    """A store of arrays: see `open`. Threads may share it."""

    def __init__(self, files: Files, index: Index, limit: int | None) -> None:
        self._files, self._index, self._limit = files, index, limit
        self._reader = Reader(files, index)
        self._used: dict[str, float] = {}  # seconds since 1970, by key; not yet written
        self._written = time.monotonic()
        self._lock = Lock()  # of the two

    @classmethod
    def open(
        cls, path: str | Path | None, about: Mapping[str, Any], *, limit: int | None = None
    ) -> Shards:
        """Open a store; where there is none, make one.

        Args:
            path: Its folder, on a disk of this machine (the index's log needs shared memory); None:
                in memory, for this process alone.
            about: What entries are made with, as JSON values. A store is for one such.
            limit: Most bytes of shards and index. Above it the least recently used entries leave
                after a `put`; while that is done there may be as many more as the call brought, and
                `compact` needs for rewriting.

        Raises:
            StoreError: The folder is no store, damaged, made with something else, or cannot be
                made.
        """
        if limit is not None and limit <= 0:
            raise StoreError(f"A store of {limit} bytes can hold nothing. Give a larger limit.")
        about = json.loads(json.dumps(about))
        if path is None:
            index = Index(None)
            index.make(about)
            return cls(Memory(), index, limit)
        files = folder_of(Path(path))
        index = Index(Path(path) / INDEX, read_only=files.read_only)
        try:
            if index.is_new():
                with files.lock():  # another process may have been first
                    if index.is_new():
                        has_no_shards(files)
                        index.make(about)
            compare(files.name, index.about(), about)
        except BaseException:
            index.close()
            raise
        return cls(files, index, limit)

    @staticmethod
    def made_with(path: str | Path) -> dict[str, Any]:
        """What a store was made with; nothing where there is none.

        Raises:
            StoreError: The index is damaged, or another program's.
        """
        if not (Path(path) / INDEX).is_file():
            return {}
        index = Index(Path(path) / INDEX, read_only=True)
        try:
            return {} if index.is_new() else dict(index.about())
        finally:
            index.close()

    @property
    def path(self) -> Path | None:
        """The store's folder; None in memory."""
        return self._files.path

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process opens the folder itself; what is in memory stays in its own process."""
        return partial(Shards.open, limit=self._limit), (self.path, self._index.about())

    def __deepcopy__(self, memo: object) -> Self:
        return self

    def put(self, entries: Iterable[Entry]) -> int:
        """Store entries, as one shard: all of them, or none if this is interrupted.

        Returns:
            How many were new; those that are there already are skipped.

        Raises:
            StoreError: They differ from the stored ones in form, exceed the limit, or cannot be
                written (disk full, read-only, ...).
        """
        given = {entry.key: entry for entry in entries}
        with self._writing():
            form = form_of(given.values(), self._index.form())
            known = self._index.has(given)
            self._note(known)
            new = [entry for key, entry in given.items() if key not in known]
            if new and form is not None:
                tensors = stacked(new)
                self._need_room(sum(tensor.nbytes for tensor in tensors.values()))
                shard, size = self._files.write(tensors)
                self._index.add(places_of(new, shard, size, tensors), form, time.time())
                self._fit(shard)
        return len(new)

    def get(self, keys: Sequence[str]) -> dict[str, Entry]:
        """The entries that are there. Their tensors are views of mapped files: do not change them.

        An entry whose checksum does not fit is dropped with a warning, and is not there any more.
        Checksums are compared when an entry is first used.
        """
        found = {
            entry.key: entry for entry in self._reader.read(self._index.find(dict.fromkeys(keys)))
        }
        self._note(found)
        self._keep_house()
        return {key: found[key] for key in keys if key in found}

    def has(self, keys: Sequence[str]) -> set[str]:
        """Those of the keys that are there."""
        return self._index.has(dict.fromkeys(keys))

    def keys(self) -> Iterator[str]:
        """Every key, in order."""
        return self._index.keys()

    def discard(self, keys: Iterable[str]) -> int:
        """Forget entries. Their bytes stay in the shards until `compact`.

        Returns:
            How many of them were there.
        """
        return self._index.discard(dict.fromkeys(keys))

    def stats(self) -> ShardStats:
        """Entries, their rows, and bytes of shards and index."""
        entries, rows = self._index.counts()
        return ShardStats(entries, rows, self._bytes())

    def compact(self) -> int:
        """Rewrite shards without what was discarded, and put small ones together.

        Readers of other processes go on; what they have mapped leaves the disk when they let go.

        Returns:
            Bytes that were freed.
        """
        with self._writing():
            before = self._bytes()
            self._compact()
            return max(0, before - self._bytes())

    def verify(self) -> list[str]:
        """Compare every checksum.

        Returns:
            Keys of broken entries. They are dropped, except where the folder is read-only.

        Raises:
            StoreError: The index is damaged.
        """
        self._index.check()
        broken: list[str] = []
        self._reader.keep_only(())  # a file that was cut since must not be read through its old map
        inside = (self._index.inside([shard]) for shard in self._index.names())
        for places in chain([self._index.lost()], inside):
            for _ in self._reader.read(places, broken, anew=True):
                pass
        return broken

    def close(self) -> None:
        """Write use times and let go of files. Entries that callers hold stay readable."""
        self._write_used()
        self._index.close()
        self._reader.keep_only(())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Use times

    def _note(self, keys: Iterable[str]) -> None:
        if not self._files.read_only:
            now = time.time()
            with self._lock:
                self._used.update((key, now) for key in keys)

    def _write_used(self) -> None:
        with self._lock:
            used, self._used = self._used, {}
            self._written = time.monotonic()
        if used and not self._index.touch(used):
            with self._lock:
                self._used = used | self._used

    def _keep_house(self) -> None:
        """Once a minute: write use times, let go of shards that others have removed."""
        if time.monotonic() - self._written < _EVERY:
            return
        self._write_used()
        self._reader.keep_only(self._index.names())

    # Writing

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Alone, and with nothing left of writers that were killed or failed."""
        if self._files.read_only:
            raise StoreError(
                f"The store {self._files.name} is read-only. Give permission to write there, or "
                "copy it to another folder."
            )
        with self._files.lock():
            self._files.sweep(self._index.names())
            try:
                yield
            except BaseException:
                with suppress(StoreError):
                    self._files.sweep(self._index.names())
                    self._index.end_log()  # on a full disk that leaves room for discarding
                raise

    def _bytes(self) -> int:
        return self._files.bytes() + self._index.bytes()

    def _need_room(self, size: int) -> None:
        if self._limit is not None and size + self._index.bytes() > self._limit:
            raise StoreError(
                f"Entries of {size:,} bytes do not fit into the store {self._files.name}, whose "
                f"limit is {self._limit:,} bytes. Store fewer at once, or give a larger limit."
            )

    def _fit(self, newest: str) -> None:
        """Above the limit: discard down to nine tenths of it, so that this is done seldom."""
        if self._limit is None or (size := self._bytes()) <= self._limit:
            return
        self._write_used()
        shards = self._index.shards().values()
        a_row = max(1, sum(shard.size for shard in shards) // max(1, sum(s.rows for s in shards)))
        too_many = -(-(size - self._limit * 9 // 10) // a_row)
        unused = sum(shard.rows - shard.used for shard in shards)
        try:
            self._index.discard(self._index.oldest(too_many - unused, newest))
            self._compact()
        except StoreError as error:  # what was put is there
            logger.warning(
                "The store exceeds its limit of %d bytes for now. %s", self._limit, error
            )

    def _compact(self) -> None:
        shards = self._index.shards()
        for group in _groups(shards):
            try:
                self._rewrite(group)
                continue
            except StoreError:
                if len(group) == 1:
                    raise
            for name in group:  # perhaps for want of space, of which single shards need less
                if shards[name].used < shards[name].rows:
                    self._rewrite([name])
        self._index.shrink()

    def _rewrite(self, group: list[str]) -> None:
        """One shard of what is left of some."""
        places = {place.key: place for place in self._index.inside(group)}
        kept = list(self._reader.read([*places.values()], anew=True))
        if kept:
            old = [places[entry.key] for entry in kept]
            tensors = stacked(kept)
            shard, size = self._files.write(tensors)
            self._index.move(old, places_of(kept, shard, size, tensors))
        self._index.forget(group)
        self._reader.keep_only(self._index.names())
        for name in group:
            self._files.remove(name)


def _groups(shards: Mapping[str, ShardUse]) -> Iterator[list[str]]:
    """Shards to rewrite as one each: those with unused rows, and small ones."""
    live = {name: shard.size * shard.used // max(1, shard.rows) for name, shard in shards.items()}
    loose = {name for name, shard in shards.items() if shard.used < shard.rows}
    if empty := [name for name, shard in shards.items() if not shard.entries]:
        yield empty  # first, as this needs no space
    group: list[str] = []
    total = 0
    for name in sorted(live.keys() - {*empty}, key=lambda name: live[name]):
        if name in loose or live[name] < _SMALL:
            if group and total + live[name] > _SHARD:
                yield group
                group, total = [], 0
            group.append(name)
            total += live[name]
    if len(group) > 1 or loose & {*group}:
        yield group

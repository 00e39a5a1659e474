"""The index of a store: which rows of which shard hold an entry."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import StoreError
from .database import Database
from .entries import Form, Place

_VERSION = 1  # of the tables
_OURS = 0x64737631  # SQLite's application id
_AT_ONCE = 500  # keys in a statement
_TABLES = (
    "CREATE TABLE facts (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID",
    "CREATE TABLE shards (id INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL UNIQUE, "
    "rows INTEGER NOT NULL, bytes INTEGER NOT NULL)",
    "CREATE TABLE entries (key TEXT PRIMARY KEY, shard INTEGER NOT NULL, start INTEGER NOT NULL, "
    "rows INTEGER NOT NULL, checksum INTEGER NOT NULL, used REAL NOT NULL) WITHOUT ROWID",
    "CREATE INDEX entries_of_shards ON entries (shard, rows)",
    f"PRAGMA user_version = {_VERSION}",
    f"PRAGMA application_id = {_OURS}",
)
_PLACES = (  # a shard that the index does not know is called ""
    "SELECT key, COALESCE(name, ''), COALESCE(bytes, 0), start, entries.rows, checksum "
    "FROM entries LEFT JOIN shards ON id = shard"
)


@dataclass(frozen=True, slots=True)
class ShardUse:
    """A shard, and how much of it entries still use."""

    size: int  # bytes
    rows: int
    entries: int
    used: int  # of the rows


class Index:
    """Each method is one transaction, or reads only."""

    def __init__(self, file: Path | None, *, read_only: bool = False) -> None:
        self._database = Database(file, read_only=read_only)
        self.close = self._database.close

    # What the store is

    def is_new(self) -> bool:
        """Nothing has been made here yet.

        Raises:
            StoreError: It was made by another program, or by another version of this one.
        """
        name = self._database.name
        with self._database.reading() as db:
            version, owner = (_pragma(db, each) for each in ("user_version", "application_id"))
            if not (version or owner or db.execute("SELECT 1 FROM sqlite_master").fetchone()):
                return True
        if owner != _OURS:
            raise StoreError(
                f"{name} is no store: its index.sqlite was made by another program. Give another "
                "folder."
            )
        if version != _VERSION:
            raise StoreError(
                f"The store {name} is of format {version}, but this version of draftsieve reads "
                f"format {_VERSION}. Make another store, and index again."
            )
        return False

    def make(self, about: Mapping[str, Any]) -> None:
        """The tables of a new store."""
        with self._database.reading() as db:
            db.execute("PRAGMA auto_vacuum = INCREMENTAL")
            db.execute("PRAGMA journal_mode = WAL")
        with self._database.writing() as db:
            for statement in _TABLES:
                db.execute(statement)
            db.execute("INSERT INTO facts VALUES ('about', ?)", [json.dumps(about)])

    def about(self) -> dict[str, Any]:
        """What the store was made with."""
        return dict(self._fact("about"))

    def form(self) -> Form | None:
        """What every entry looks like, once there was one."""
        form: Form | None = self._fact("form")
        return form

    def _fact(self, name: str) -> Any:
        with self._database.reading() as db:
            found = db.execute("SELECT value FROM facts WHERE name = ?", [name]).fetchone()
        try:
            return found and json.loads(found[0])
        except (TypeError, ValueError) as error:
            raise self._database.damaged(error) from error

    def check(self) -> None:
        """Read the whole index.

        Raises:
            StoreError: It is damaged.
        """
        with self._database.reading() as db:
            if (found := _pragma(db, "integrity_check(1)")) != "ok":
                raise self._database.damaged(found)

    # Entries

    def find(self, keys: Collection[str]) -> list[Place]:
        """Where those lie that are there."""
        return self._places("key IN ({})", keys)

    def inside(self, shards: Collection[str]) -> list[Place]:
        """All entries of those shards."""
        return self._places("shard IN (SELECT id FROM shards WHERE name IN ({}))", shards)

    def lost(self) -> list[Place]:
        """Entries of shards that the index does not know."""
        return self._places("name IS NULL OR name = {}", [""])

    def _places(self, where: str, values: Collection[str]) -> list[Place]:
        found: list[Place] = []
        with self._database.reading() as db:
            for some, marks in _parts(values):
                rows = db.execute(f"{_PLACES} WHERE {where.format(marks)}", some)
                found += [Place(*row) for row in rows]
        for each in found:
            numbers: tuple[object, ...] = (each.size, each.start, each.rows, each.checksum)
            if not all(isinstance(number, int) for number in numbers):
                raise self._database.damaged(f"entry {each.key!r} lies at {numbers}")
        return found

    def has(self, keys: Collection[str]) -> set[str]:
        """Those that are there."""
        with self._database.reading() as db:
            return {
                key
                for some, marks in _parts(keys)
                for (key,) in db.execute(f"SELECT key FROM entries WHERE key IN ({marks})", some)
            }

    def keys(self) -> Iterator[str]:
        """All keys in order; what comes or goes meanwhile may be among them or not."""
        some = [""]
        while some:
            statement = "SELECT key FROM entries WHERE key > ? ORDER BY key LIMIT 1000"
            with self._database.reading() as db:
                some = [key for (key,) in db.execute(statement, [some[-1]])]
            yield from some

    def oldest(self, rows: int, spared: str) -> list[str]:
        """Keys of at least so many rows, least recently used first, none of the spared shard."""
        statement = (
            "SELECT key, entries.rows FROM entries LEFT JOIN shards ON id = shard "
            "WHERE name IS NOT ? ORDER BY used, key"
        )
        found: list[str] = []
        with self._database.reading() as db:
            for key, more in db.execute(statement, [spared]):
                if rows <= 0:
                    break
                found.append(key)
                rows -= more
        return found

    def discard(self, keys: Collection[str]) -> int:
        """How many of them were there."""
        with self._database.writing() as db:
            return sum(
                db.execute(f"DELETE FROM entries WHERE key IN ({marks})", some).rowcount
                for some, marks in _parts(keys)
            )

    def drop(self, places: Iterable[Place]) -> None:
        """Those entries, unless they lie elsewhere by now."""
        with self._database.writing() as db:
            db.executemany(
                "DELETE FROM entries WHERE key = ? AND start = ? AND checksum = ? AND "
                "COALESCE((SELECT name FROM shards WHERE id = entries.shard), '') = ?",
                ((at.key, at.start, at.checksum, at.shard) for at in places),
            )

    def touch(self, used: Mapping[str, float]) -> bool:
        """Note when entries were used last; False where that has to wait."""
        try:
            with self._database.writing(hurried=True) as db:
                db.executemany(
                    "UPDATE entries SET used = MAX(used, ?) WHERE key = ?",
                    ((when, key) for key, when in used.items()),
                )
        except StoreError:
            return False
        return True

    # Shards

    def shards(self) -> dict[str, ShardUse]:
        """What is left of each."""
        statement = "SELECT shard, COUNT(*), SUM(rows) FROM entries GROUP BY shard"
        with self._database.reading() as db:
            used = {shard: counts for shard, *counts in db.execute(statement)}
            shards = db.execute("SELECT id, name, bytes, rows FROM shards ORDER BY id").fetchall()
        return {
            name: ShardUse(size, rows, *used.get(number, (0, 0)))
            for number, name, size, rows in shards
        }

    def names(self) -> set[str]:
        """Of all shards."""
        with self._database.reading() as db:
            return {name for (name,) in db.execute("SELECT name FROM shards")}

    def add(self, places: Sequence[Place], form: Form, now: float) -> None:
        """A shard and all its entries, which are new."""
        with self._database.writing() as db:
            number = _new_shard(db, places)
            db.execute("INSERT OR IGNORE INTO facts VALUES ('form', ?)", [json.dumps(form)])
            db.executemany(
                "INSERT INTO entries VALUES (?, ?, ?, ?, ?, ?)",
                ((at.key, number, at.start, at.rows, at.checksum, now) for at in places),
            )

    def move(self, old: Sequence[Place], new: Sequence[Place]) -> None:
        """Entries lie in a new shard now; those that have left since `old` was read stay away."""
        with self._database.writing() as db:
            number = _new_shard(db, new)
            db.executemany(
                "UPDATE entries SET shard = ?, start = ? WHERE key = ? AND start = ? AND "
                "shard = (SELECT id FROM shards WHERE name = ?)",
                (
                    (number, to.start, at.key, at.start, at.shard)
                    for at, to in zip(old, new, strict=True)
                ),
            )

    def forget(self, shards: Collection[str]) -> None:
        """Shards, with whatever entries they still have."""
        with self._database.writing() as db:
            for some, marks in _parts(shards):
                ids = f"SELECT id FROM shards WHERE name IN ({marks})"
                db.execute(f"DELETE FROM entries WHERE shard IN ({ids})", some)
                db.execute(f"DELETE FROM shards WHERE name IN ({marks})", some)

    # Sizes

    def counts(self) -> tuple[int, int]:
        """Entries, and their rows."""
        with self._database.reading() as db:
            found = db.execute("SELECT COUNT(*), TOTAL(rows) FROM entries").fetchone()
        return int(found[0]), int(found[1])

    def bytes(self) -> int:
        """Size of the index."""
        with self._database.reading() as db:
            return int(_pragma(db, "page_count")) * int(_pragma(db, "page_size"))

    def shrink(self) -> None:
        """Give pages that nothing uses back to the disk."""
        with self._database.reading() as db:
            db.executescript("PRAGMA incremental_vacuum")  # `execute` would give back one page
        self.end_log()

    def end_log(self) -> None:
        """Move what the log holds into the index, and empty it."""
        with self._database.reading() as db:
            db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()


def _pragma(db: sqlite3.Connection, name: str) -> Any:
    return db.execute(f"PRAGMA {name}").fetchone()[0]


def _new_shard(db: sqlite3.Connection, places: Sequence[Place]) -> int:
    values = (places[0].shard, sum(place.rows for place in places), places[0].size)
    made = db.execute("INSERT INTO shards (name, rows, bytes) VALUES (?, ?, ?)", values).lastrowid
    assert made is not None
    return made


def _parts(values: Collection[str]) -> Iterator[tuple[list[str], str]]:
    """Some values at a time, with a question mark for each."""
    rest = list(values)
    for first in range(0, len(rest), _AT_ONCE):
        some = rest[first : first + _AT_ONCE]
        yield some, ",".join("?" * len(some))

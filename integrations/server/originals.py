"""The whole texts behind shortened ones, by hash, in SQLite; each tenant sees its own."""

from __future__ import annotations

import hashlib
import os
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from threading import Lock

from ...core.errors import StoreError

_TABLE = """
CREATE TABLE IF NOT EXISTS originals (
    tenant TEXT NOT NULL, hash TEXT NOT NULL, text TEXT NOT NULL,
    size INTEGER NOT NULL, used REAL NOT NULL, PRIMARY KEY (tenant, hash)
) WITHOUT ROWID"""
_PUT = """
INSERT INTO originals VALUES (?, ?, ?, ?, ?)
ON CONFLICT (tenant, hash) DO UPDATE SET used = excluded.used"""


class Originals:
    """Texts by tenant and hash, until they are too old or too many. Safe to use from threads.

    Args:
        file: Where they lie; None keeps them in memory.
        max_bytes: Most bytes of text of all tenants; those unused for longest leave first.
        max_seconds: How long a text stays after it was last put or read.
        clock: Seconds since the epoch.

    Raises:
        StoreError: The file cannot be opened.
    """

    def __init__(
        self,
        file: Path | None = None,
        *,
        max_bytes: int = 256 * 1024 * 1024,
        max_seconds: float = 86_400.0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._name = "in memory" if file is None else repr(str(file))
        self._max_bytes, self._max_seconds, self._clock = max_bytes, max_seconds, clock
        self._turn = Lock()
        with self._told():
            if file is not None:  # texts of users: for the server's user alone
                os.close(os.open(file, os.O_CREAT, 0o600))
            place = ":memory:" if file is None else str(file)
            self._base = sqlite3.connect(place, check_same_thread=False, timeout=30)
            self._base.execute("PRAGMA journal_mode=WAL")
            self._base.execute("PRAGMA synchronous=NORMAL")
            with self._base:
                self._base.execute(_TABLE)

    def put(self, tenant: str, texts: Mapping[str, str]) -> None:
        """Keep texts under their hashes.

        Raises:
            StoreError: They cannot be written (disk full, read-only, damaged).
        """
        now = self._clock()
        rows = [(tenant, key, text, len(text.encode()), now) for key, text in texts.items()]
        with self._told(), self._turn, self._base:
            self._base.executemany(_PUT, rows)
            self._base.execute("DELETE FROM originals WHERE used < ?", (now - self._max_seconds,))
            self._shrink()

    def get(self, tenant: str, key: str) -> str | None:
        """The text that a tenant has under a hash; None if there is none, or no longer.

        Raises:
            StoreError: It cannot be read.
        """
        now = self._clock()
        where = "WHERE tenant = ? AND hash = ? AND used >= ?"
        values = (tenant, key, now - self._max_seconds)
        with self._told(), self._turn, self._base:
            found = self._base.execute(f"SELECT text FROM originals {where}", values).fetchone()
            self._base.execute(f"UPDATE originals SET used = ? {where}", (now, *values))
        return None if found is None else str(found[0])

    def close(self) -> None:
        """Close the database."""
        with self._turn:
            self._base.close()

    def _shrink(self) -> None:
        """Let those unused for longest leave until the rest is small enough."""
        (total,) = self._base.execute("SELECT COALESCE(SUM(size), 0) FROM originals").fetchone()
        if total <= self._max_bytes:
            return
        oldest = self._base.execute("SELECT tenant, hash, size FROM originals ORDER BY used")
        gone = []
        for tenant, key, size in oldest.fetchall():
            if total <= self._max_bytes:
                break
            gone.append((tenant, key))
            total -= size
        self._base.executemany("DELETE FROM originals WHERE tenant = ? AND hash = ?", gone)

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            raise StoreError(
                f"The originals of shortened texts ({self._name}) cannot be kept or read: {error}. "
                "Free space on the disk, correct its permissions, or name another file."
            ) from error


def hash_of(text: str) -> str:
    """24 hexadecimal digits, by content: what clients of this form look for in texts."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:24]

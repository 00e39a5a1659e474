"""An SQLite database of several threads and processes; what goes wrong is told as a StoreError."""

from __future__ import annotations

import os
import sqlite3
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import RLock

from ..errors import StoreError

_PATIENCE = 30_000  # milliseconds to wait for another process's transaction
_HURRIED = 20
_FULL = (
    "The disk of the store {name} is full. Free space, and try again; a limit keeps a store small."
)
_BUSY = (
    "The index of the store {name} has been locked by another process for a long time. Try again."
)
_READ_ONLY = "The store {name} cannot be written to: its folder or its index is read-only."
_LEFT_OPEN = (
    "The index of the store {name} cannot be opened. Give permission to read and write the folder; "
    "if its last writer was killed, open the store once with that permission."
)
_FAILED = (
    "The index of the store {name} could not be read or written ({error}). Free space on the disk, "
    "or correct its permissions or limits, and try again."
)
_DAMAGED = (  # malformed pages, tables that are gone, text that is none, ...
    sqlite3.SQLITE_CORRUPT,
    sqlite3.SQLITE_NOTADB,
    sqlite3.SQLITE_ERROR,
    sqlite3.SQLITE_SCHEMA,
    sqlite3.SQLITE_MISMATCH,
)
_MESSAGES = {
    sqlite3.SQLITE_FULL: _FULL,
    sqlite3.SQLITE_BUSY: _BUSY,
    sqlite3.SQLITE_LOCKED: _BUSY,
    sqlite3.SQLITE_READONLY: _READ_ONLY,
    sqlite3.SQLITE_CANTOPEN: _LEFT_OPEN,
    sqlite3.SQLITE_PERM: _LEFT_OPEN,
}


class Database:
    """One connection a process; its threads take turns."""

    def __init__(self, file: Path | None, *, read_only: bool = False) -> None:
        self.name = "in memory" if file is None else repr(str(file.parent))
        self._file, self._read_only = file, read_only
        self._turn = RLock()
        self._closed = False
        self._connect()

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """The connection, for statements of a transaction each."""
        with self._turn, self._told():
            if self._closed:
                raise StoreError(f"The store {self.name} is closed. Open it again.")
            if self._seen != self._stamp():
                self._leave()
                self._connect()
            yield self._connection

    @contextmanager
    def writing(self, *, hurried: bool = False) -> Iterator[sqlite3.Connection]:
        """The connection in a transaction that is on the disk when it ends.

        Args:
            hurried: Wait neither for other processes nor for the disk: after a power failure the
                transaction may be gone.
        """
        with self.reading() as db:
            if self._read_only:
                raise StoreError(_READ_ONLY.format(name=self.name))
            db.execute(f"PRAGMA synchronous = {'NORMAL' if hurried else 'FULL'}")
            db.execute(f"PRAGMA busy_timeout = {_HURRIED if hurried else _PATIENCE}")
            try:
                db.execute("BEGIN IMMEDIATE")
                yield db
                db.execute("COMMIT")
            finally:
                if db.in_transaction:
                    db.execute("ROLLBACK")
                db.execute(f"PRAGMA busy_timeout = {_PATIENCE}")

    def damaged(self, why: object) -> StoreError:
        """What to tell of an index that cannot be trusted."""
        return StoreError(
            f"The index of the store {self.name} is damaged ({why}). Delete the folder or give "
            "another one, and index again."
        )

    def close(self) -> None:
        """Can be called again."""
        with self._turn:
            self._closed = True
            self._close()

    def _leave(self) -> None:
        if self._seen[0] == os.getpid():
            self._close()
        else:  # after a fork: the parent's connection must neither be used nor closed here
            self._close.detach()
            self._inherited = self._connection

    def _connect(self) -> None:
        name, uri = ":memory:" if self._file is None else str(self._file), False
        with self._told():
            self._seen = self._stamp()
        if self._file is not None and self._read_only:
            # without a log nobody writes: SQLite needs to be told, as it cannot make its lock files
            uri, name = True, f"{self._file.absolute().as_uri()}?mode=ro"
            name += "" if self._seen[1] else "&immutable=1"
        with self._told():
            self._connection = sqlite3.connect(
                name,
                timeout=_PATIENCE / 1000,
                isolation_level=None,
                check_same_thread=False,
                uri=uri,
            )
        self._close = weakref.finalize(self, self._connection.close)

    def _stamp(self) -> tuple[int, ...]:
        """Changes when the connection must be made anew."""
        if self._file is None:
            return (0,)
        if not self._read_only:
            return (os.getpid(),)
        log = self._file.with_name(f"{self._file.name}-wal")
        has_log = log.exists() and log.stat().st_size > 0
        found = self._file.stat()
        return (os.getpid(), 1) if has_log else (os.getpid(), 0, found.st_mtime_ns, found.st_size)

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.ProgrammingError, sqlite3.InterfaceError):
            raise  # wrong use of SQLite is no fault of the store
        except UnicodeDecodeError as error:
            raise self.damaged(error) from error
        except sqlite3.Error as error:
            code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT) & 0xFF
            if code in _DAMAGED:
                raise self.damaged(error) from error
            message = _MESSAGES.get(code, _FAILED)
            raise StoreError(message.format(name=self.name, error=error)) from error
        except OSError as error:
            raise StoreError(_FAILED.format(name=self.name, error=error)) from error

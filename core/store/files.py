"""Where shards lie: files of a folder, or memory. A shard is written once and never changed."""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from threading import RLock
from typing import Protocol

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..errors import StoreError

INDEX, LOCK, WRITING = "index.sqlite", "write.lock", "writing"
_NAME = re.compile(r"shard-[0-9a-f]{32}\.safetensors")
_PATIENCE = 600.0  # seconds that a writer waits for another


class BrokenError(Exception):
    """What lies at a place is not what was put there.

    Args:
        message: In which way.
        whole: Nothing of the shard can be read.
    """

    def __init__(self, message: str, *, whole: bool = False) -> None:
        super().__init__(message)
        self.whole = whole


class Files(Protocol):
    """What `Shards` asks of either."""

    name: str  # for messages
    read_only: bool

    @property
    def path(self) -> Path | None:
        """The folder; None in memory."""

    def lock(self) -> AbstractContextManager[object]:
        """One writer at a time, of all threads and processes."""

    def write(self, tensors: Mapping[str, torch.Tensor]) -> tuple[str, int]:
        """A new shard: its name and its bytes."""

    def read(self, shard: str, size: int) -> Mapping[str, torch.Tensor]:
        """A shard of that many bytes, without copying it."""

    def remove(self, shard: str) -> None:
        """Once no index names it; what others have open stays theirs."""

    def sweep(self, known: Collection[str]) -> None:
        """Remove what no index names: the remains of killed writers. Only under the lock."""

    def bytes(self) -> int:
        """Size of all shards."""


class Folder:
    """Shards as safetensors files, mapped into memory when they are read."""

    def __init__(self, path: Path) -> None:
        self.path, self.name = path, repr(str(path))
        index = path / INDEX
        self.read_only = not os.access(path, os.W_OK) or (
            index.exists() and not os.access(index, os.W_OK)
        )

    @contextmanager
    def lock(self) -> Iterator[None]:
        """The operating system frees it when its process dies."""
        try:
            held = FileLock(self.path / LOCK).acquire(timeout=_PATIENCE)
        except Timeout as error:
            raise StoreError(
                f"Another process has been writing into the store {self.name} for "
                f"{_PATIENCE:.0f} s. Try again when it is done, or end it."
            ) from error
        except OSError as error:
            raise _failed(self.name, error) from error
        with held:
            yield

    def write(self, tensors: Mapping[str, torch.Tensor]) -> tuple[str, int]:
        """Written elsewhere, flushed to the disk, and only then named a shard."""
        shard = f"shard-{uuid.uuid4().hex}.safetensors"
        new = self.path / WRITING / shard
        try:
            new.parent.mkdir(exist_ok=True)
            save_file(dict(tensors), new)
            new.chmod((self.path / INDEX).stat().st_mode & 0o777)  # readable by whom the index is
            _flush(new)
            os.replace(new, self.path / shard)
            _flush(self.path)
            return shard, (self.path / shard).stat().st_size
        except (OSError, SafetensorError) as error:
            with suppress(OSError):
                new.unlink(missing_ok=True)
            raise _failed(self.name, error) from error

    def read(self, shard: str, size: int) -> Mapping[str, torch.Tensor]:
        """Views of the mapped file.

        Raises:
            BrokenError: It is missing, cut, or its header cannot be read.
            StoreError: It cannot be opened now (too many open files, no permission, ...).
        """
        if not _NAME.fullmatch(shard):  # a damaged or forged index must not name other files
            raise BrokenError("that is no name of a shard")
        file = self.path / shard
        try:
            if (found := file.stat().st_size) != size:  # a cut file must not be mapped
                raise BrokenError(f"it is {found} bytes long instead of {size}", whole=True)
            return load_file(file)
        except FileNotFoundError as error:
            if file.exists():  # safetensors says the same of what it could not open
                raise _failed(self.name, error) from error
            raise BrokenError("it is missing", whole=True) from error
        except SafetensorError as error:
            raise BrokenError(f"its header is damaged: {error}", whole=True) from error
        except (OSError, RuntimeError) as error:
            raise _failed(self.name, error) from error

    def remove(self, shard: str) -> None:
        """Where a mapped file cannot be removed it stays, and the next writer tries again."""
        if _NAME.fullmatch(shard):
            with suppress(OSError):
                (self.path / shard).unlink(missing_ok=True)

    def sweep(self, known: Collection[str]) -> None:
        """Half-written files too."""
        for file in (*self._files("shard-*"), *self._files(f"{WRITING}/*")):
            if file.name not in known:
                with suppress(OSError):
                    file.unlink(missing_ok=True)

    def bytes(self) -> int:
        """Size of all shards on disk, those that nobody names any more included."""
        total = 0
        for file in self._files("shard-*"):
            with suppress(FileNotFoundError):  # another process removes it
                total += file.stat().st_size
        return total

    def _files(self, pattern: str) -> list[Path]:
        try:
            return list(self.path.glob(pattern))
        except OSError as error:
            raise _failed(self.name, error) from error


class Memory:
    """Shards of this process."""

    name, path, read_only = "in memory", None, False

    def __init__(self) -> None:
        self._shards: dict[str, Mapping[str, torch.Tensor]] = {}
        self._lock = RLock()

    def lock(self) -> AbstractContextManager[object]:
        return self._lock

    def write(self, tensors: Mapping[str, torch.Tensor]) -> tuple[str, int]:
        shard = f"shard-{uuid.uuid4().hex}"
        self._shards[shard] = tensors
        return shard, sum(tensor.nbytes for tensor in tensors.values())

    def read(self, shard: str, size: int) -> Mapping[str, torch.Tensor]:
        try:
            return self._shards[shard]
        except KeyError as error:
            raise BrokenError("it is missing", whole=True) from error

    def remove(self, shard: str) -> None:
        self._shards.pop(shard, None)

    def sweep(self, known: Collection[str]) -> None:
        for shard in self._shards.keys() - set(known):
            self.remove(shard)

    def bytes(self) -> int:
        return sum(t.nbytes for shard in list(self._shards.values()) for t in shard.values())


def _flush(path: Path) -> None:
    """What was written is on the disk when this returns; of a folder, its list of files."""
    if path.is_dir() and os.name == "nt":
        return  # folders cannot be opened there, and need not be
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _failed(name: str, error: Exception) -> StoreError:
    return StoreError(
        f"The store {name} could not be read or written ({type(error).__name__}: {error}). What "
        "was stored before is unharmed. Free space on the disk, or correct its permissions or "
        "limits, and try again."
    )

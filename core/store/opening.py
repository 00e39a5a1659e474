"""Whether a folder is a store, may become one, or is something else."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import StoreError
from .files import INDEX, LOCK, WRITING, Folder


def folder_of(path: Path) -> Folder:
    """The folder of a store, made where it is missing; anything else is refused.

    Raises:
        StoreError: The path is something else, or cannot be read or made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        names = [child.name for child in path.iterdir() if not child.name.startswith(".")]
        files = Folder(path)
    except OSError as error:
        raise StoreError(
            f"{str(path)!r} cannot be a store ({type(error).__name__}: {error}). Give a folder, or "
            "one that can be made."
        ) from error
    if (path / INDEX).exists():  # asked last: a store in the making has its index first
        return files
    has_no_shards(files)
    if strangers := sorted(name for name in names if name not in (LOCK, WRITING)):
        raise StoreError(
            f"{files.name} is no store: it holds {strangers[0]!r}. Give an empty folder, or a "
            "new one."
        )
    if files.read_only:
        raise StoreError(f"{files.name} is read-only: no store can be made there.")
    return files


def has_no_shards(files: Folder) -> None:
    """A store in the making has none yet.

    Raises:
        StoreError: There are shards, so that the index that named them has been lost.
    """
    if any(files.path.glob("shard-*")):
        raise StoreError(
            f"The store {files.name} has lost what its {INDEX} held. Put that back, or delete the "
            "folder and index again."
        )


def compare(name: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """What a store was made with must be what it is opened with.

    Raises:
        StoreError: It names what differs.
    """
    differing = [key for key in sorted({*old, *new}) if old.get(key) != new.get(key)]
    if differing:
        told = "; ".join(f"{key} {old.get(key)!r}, not {new.get(key)!r}" for key in differing)
        raise StoreError(
            f"The store {name} was made with another {differing[0]}: {told}. Open it with what it "
            "was made with, or make another store and index again."
        )

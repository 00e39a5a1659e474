"""What a store holds: an entry is a key and tensors of as many rows as the text has tokens."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from ..errors import StoreError

Form = dict[str, list[object]]  # of each tensor by name: its dtype, and its shape without the rows


@dataclass(frozen=True, slots=True, eq=False)
class Entry:
    """What is stored under one key. The tensors of a store's entries differ in nothing but rows."""

    key: str  # a digest of what was read
    rows: int  # first dimension of every tensor: the passage's tokens, or sentences
    tensors: Mapping[str, torch.Tensor]  # (rows, ...) each


@dataclass(frozen=True, slots=True)
class Place:
    """Where an entry lies: rows of a shard, with the checksum of what should be there."""

    key: str
    shard: str
    size: int  # bytes of the shard
    start: int
    rows: int
    checksum: int


def checksum(key: str, tensors: Mapping[str, torch.Tensor]) -> int:
    """CRC-32 of key, names, dtypes, shapes and numbers: another entry's numbers do not pass."""
    total = zlib.crc32(key.encode())
    for name, tensor in sorted(tensors.items()):
        total = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), total)
        numbers = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
        total = zlib.crc32(numbers.data, total)
    return total


def form_of(entries: Iterable[Entry], form: Form | None) -> Form | None:
    """The form that all entries share with the store (None: an empty store, or no entries).

    Raises:
        StoreError: An entry is of another form, or its tensors do not have its rows.
    """
    for entry in entries:
        own: Form = {
            name: [str(tensor.dtype).removeprefix("torch."), list(tensor.shape[1:])]
            for name, tensor in sorted(entry.tensors.items())
        }
        rows = {tensor.shape[0] if tensor.ndim else None for tensor in entry.tensors.values()}
        if rows != {entry.rows}:
            raise StoreError(
                f"Entry {entry.key!r} is said to have {entry.rows} rows, but its tensors have the "
                f"shapes {[tuple(tensor.shape) for tensor in entry.tensors.values()]}. Give at "
                "least one tensor, and all with that first dimension."
            )
        form = form or own
        if own != form:
            raise StoreError(
                f"Entry {entry.key!r} holds {own}, but the entries of this store hold {form}. "
                "Store it with entries of its own kind, in another store."
            )
    return form


def stacked(entries: list[Entry]) -> dict[str, torch.Tensor]:
    """Their tensors one behind the other, copied: (all rows, ...) by name, on the CPU."""
    return {
        name: torch.cat([entry.tensors[name].detach().cpu() for entry in entries]).contiguous()
        for name in entries[0].tensors
    }


def places_of(
    entries: list[Entry], shard: str, size: int, tensors: Mapping[str, torch.Tensor]
) -> list[Place]:
    """Where each lies in the shard that was made of their `stacked` tensors."""
    places: list[Place] = []
    start = 0
    for entry in entries:
        total = checksum(entry.key, rows_of(tensors, start, entry.rows))
        places.append(Place(entry.key, shard, size, start, entry.rows, total))
        start += entry.rows
    return places


def rows_of(tensors: Mapping[str, torch.Tensor], start: int, rows: int) -> dict[str, torch.Tensor]:
    """Those rows of every tensor, as views."""
    return {name: tensor[start : start + rows] for name, tensor in sorted(tensors.items())}

"""Entries out of shards: each shard is mapped once, each entry compared with its checksum."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from threading import Lock

import torch

from ..errors import StoreError
from .entries import Entry, Place, checksum, rows_of
from .files import BrokenError, Files
from .index import Index

logger = logging.getLogger(__name__)

_OPEN = 128  # shards that stay mapped; views that callers hold keep theirs besides


@dataclass(frozen=True, slots=True, eq=False)
class _Shard:
    tensors: Mapping[str, torch.Tensor]  # (all rows, ...) each
    sound: set[tuple[int, int]] = field(default_factory=set)  # start and checksum: compared once


class Reader:
    """The shards that this process has open. Threads may share it."""

    def __init__(self, files: Files, index: Index) -> None:
        self._files, self._index = files, index
        self._shards: OrderedDict[str, _Shard] = OrderedDict()
        self._lock = Lock()

    def read(
        self, places: list[Place], broken: list[str] | None = None, *, anew: bool = False
    ) -> Iterator[Entry]:
        """Entries at those places, or wherever they have moved; `broken` gets the others' keys."""
        while places:
            failed: dict[Place, BrokenError] = {}
            for place in sorted(places, key=lambda place: (place.shard, place.start)):
                try:
                    yield self._entry(place, anew)
                except BrokenError as error:
                    failed[place] = error
            places = self._index.find([place.key for place in failed])
            lost = {place: failed[place] for place in places if place in failed}
            places = [place for place in places if place not in lost]
            if lost:
                self._drop(lost)
                if broken is not None:
                    broken += [place.key for place in lost]

    def _entry(self, place: Place, anew: bool) -> Entry:
        shard = self._shard(place.shard, place.size)
        tensors = rows_of(shard.tensors, place.start, place.rows)
        if anew or (place.start, place.checksum) not in shard.sound:
            if checksum(place.key, tensors) != place.checksum:
                raise BrokenError("its bytes do not fit its checksum")
            shard.sound.add((place.start, place.checksum))
        return Entry(place.key, place.rows, tensors)

    def _shard(self, name: str, size: int) -> _Shard:
        with self._lock:
            if found := self._shards.get(name):
                self._shards.move_to_end(name)
                return found
        shard = _Shard(self._files.read(name, size))
        with self._lock:
            shard = self._shards.setdefault(name, shard)
            while len(self._shards) > _OPEN:
                self._shards.popitem(last=False)
        return shard

    def _drop(self, lost: Mapping[Place, BrokenError]) -> None:
        for shard in {place.shard for place in lost}:
            reasons = {str(error): place for place, error in lost.items() if place.shard == shard}
            for reason, place in reasons.items():
                logger.warning(
                    "Entries of the store %s are damaged and count as missing (%s and perhaps "
                    "more of shard %r): %s.", self._files.name, place.key, shard, reason,
                )  # fmt: skip
        if not self._files.read_only:
            try:
                self._index.drop(lost)
                self._index.forget({place.shard for place, error in lost.items() if error.whole})
            except StoreError as error:  # a full disk is no reason not to answer
                logger.warning("They stay in the index for now. %s", error)

    def keep_only(self, shards: Collection[str]) -> None:
        """Let go of all others."""
        with self._lock:
            for name in self._shards.keys() - set(shards):
                del self._shards[name]

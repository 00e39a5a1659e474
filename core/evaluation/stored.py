"""Methods that read passages from a store, each item's passages in a store of its own in memory.

Passages are read once an item, in float16; other stores of the item are made of that one. Seconds
are those of the question alone: the passages count as read before.
"""

from __future__ import annotations

from typing import Any

import torch

from ..compressor import Compressor
from ..config import SpecPC
from ..prompt.encoder import PromptTokens
from ..prompt.messages import Prompt
from ..specpc.draft import DraftModel
from ..specpc.stored.layout import layout_of
from ..specpc.stored.passage_store import PassageStore
from ..store.codec import decode, encode
from ..store.entries import Entry
from ..store.shards import Shards
from ..types import DraftReading
from .shared import Case
from .survival import kept_spans
from .text_only import Shortened

OPTIONS = {"tier", "codec", "layers", "first_layer"}
EVERY: dict[str, Any] = {"tier": "cache", "codec": "float16", "layers": "all"}


def prepare(case: Case, store: dict[str, Any]) -> None:
    """Read an item's passages into a store with these options of `PassageStore.open`."""
    key, layers = tuple(sorted(store.items())), store.get("layers", "heads")
    if key not in case.stores:
        draft = case.bench.draft.draft
        if layers not in case.stores:
            options = {**EVERY, "layers": layers}
            case.stores[layers] = PassageStore.open(":memory:", draft, **options)
            case.stores[layers].add(case.item.passages)
        layout = layout_of(draft.model, **{**EVERY, "layers": layers, **store})
        case.stores[key] = _recoded(case.stores[layers], layout)


def shorten(options: SpecPC, store: dict[str, Any], case: Case, share: float) -> Shortened:
    """What SpecPC keeps with passages from the item's store."""
    prepare(case, store)
    key = tuple(sorted(store.items()))
    method = options.model_copy(update={"capacity": None, "ratio": share})
    draft = DraftModel(case.bench.draft.model, case.bench.draft.tokenizer, progress=False)
    draft.encoder, draft.store = case.bench.draft.encoder, _Once(case.stores[key], case, key)
    shorter, context = Compressor.of(draft).compress_prompt(case.prompt, method)
    kept = kept_spans(context, len(case.item.passages))
    return kept, [passage.text for passage in shorter.passages]


class _Once(PassageStore):
    """A store whose reading of an item is shared by all budgets."""

    def __init__(self, store: PassageStore, case: Case, key: object) -> None:
        super().__init__(store.shards, store.draft, store.layout, store.frame, store.vectors)
        self._beginning, self._case, self._key = store.beginning(), case, key

    def reading(
        self, prompt: Prompt, tokens: PromptTokens, method: SpecPC, remember: bool = False
    ) -> DraftReading:
        same = method.model_copy(update={"ratio": 1.0, "embedder": None})
        found = super().reading
        return self._case.once(
            ("stored", self._key, same), lambda: found(prompt, tokens, method, remember)
        )


def _recoded(whole: PassageStore, layout: Any) -> PassageStore:
    """The same passages as another store would hold them."""
    places = {
        "keys": [whole.layout.keys.index(place) for place in layout.keys],
        "values": [whole.layout.values.index(place) for place in layout.values],
    }
    shards = Shards.open(None, {"made": "of another"})
    found = PassageStore(shards, whole.draft, layout, whole.frame)
    entries = whole.shards.get(list(whole.shards.keys())).values()
    shards.put(_entry(entry, places, layout) for entry in entries)
    return found


def _entry(entry: Entry, places: dict[str, list[int]], layout: Any) -> Entry:
    tensors: dict[str, torch.Tensor] = {"bounds": entry.tensors["bounds"]}
    for kind, chosen in places.items():
        if chosen:
            parts = {"data": entry.tensors[f"{kind}.data"][:, chosen]}
            states = decode(parts, "float16", slice(None))
            packed = encode(states, layout.codec)
            tensors |= {f"{kind}.{name}": part for name, part in packed.items()}
    return Entry(entry.key, entry.rows, tensors)

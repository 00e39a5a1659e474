"""Passages as a store keeps them: each read alone behind the fixed beginning, and packed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import torch
from transformers import DynamicCache, PreTrainedModel

from ...kv_cache.layers import full_states
from ...kv_cache.prefill import passes_of
from ...store.codec import encode
from ...store.entries import Entry
from ..apart import read_blocks
from .frame import Frame
from .layout import Layout
from .reading import Beginning


def digest(text: str) -> str:
    """The name of a passage: the SHA-256 of its text."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def read_passages(
    model: PreTrainedModel,
    beginning: Beginning,
    layout: Layout,
    frame: Frame,
    texts: Sequence[str],
    piece: int,
) -> Iterator[Entry]:
    """Read texts apart, those of similar length side by side.

    Args:
        model: The draft.
        beginning: Of the fixed prompt.
        layout: Which keys and values are kept.
        frame: What stands around passages.
        texts: All different.
        piece: Most tokens that are read at once; a longer text is read in pieces, each of which
            begins anew.

    Yields:
        An entry for each text that has tokens, not in their order.
    """
    framed = {text: frame.passage(text) for text in texts}
    pieces = [
        (text, part)
        for text, (ids, _) in framed.items()
        for part in (torch.split(ids, piece) if len(ids) else ())
    ]
    done: dict[str, list[dict[str, torch.Tensor]]] = {}
    stop = layout.last_layer
    last = stop if stop < len(beginning.states) - 1 else None
    prefix = beginning.cache(model, 1)
    for rows in passes_of(model, [len(ids) for _, ids in pieces]):
        ids = torch.cat([pieces[row][1] for row in rows]).to(model.device)
        ends = torch.tensor([len(pieces[row][1]) for row in rows]).cumsum(0).tolist()
        blocks = list(zip([0, *ends[:-1]], ends, strict=True))
        caches, _ = read_blocks(model, ids, blocks, prefix, beginning.tokens, last, None)
        for row, cache in sorted(zip(rows, caches, strict=True), key=lambda each: each[0]):
            text, (_, bounds) = pieces[row][0], framed[pieces[row][0]]
            own = done.setdefault(text, [])
            own.append(_packed(cache, layout))
            if len(own) * piece >= len(bounds):
                parts = {n: torch.cat([each[n] for each in own]) for n in own[0]}
                yield Entry(digest(text), len(bounds), {"bounds": bounds, **parts})
                del done[text]


def _packed(cache: DynamicCache, layout: Layout) -> dict[str, torch.Tensor]:
    """One piece as the codec packs it."""
    states = full_states(cache)
    found: dict[str, torch.Tensor] = {}
    for kind, places, which in (("keys", layout.keys, 0), ("values", layout.values, 1)):
        if places:
            picked = torch.stack([states[layer][which][0, head] for layer, head in places], 1)
            packed = encode(picked.cpu(), layout.codec)
            found |= {f"{kind}.{name}": part for name, part in packed.items()}
    return found

"""Which keys and values of a draft a store holds, and what methods can do with them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from transformers import PreTrainedModel

from ...config import NEWEST_PRESET, SpecPC
from ...errors import ConfigError
from ...kv_cache.layers import require_full_attention
from ...store.codec import Codec
from ..head_weights import AUTO, CALIBRATED, HeadWeights, head_weights, settled
from .late_heads import LateHeads, late_heads

Tier = Literal["cache", "keys"]
Layers = Literal["heads", "all"]


@dataclass(frozen=True, slots=True)
class Layout:
    """Which keys and values of a draft a store holds.

    Args:
        keys: (layer, KV head) of each stored key, layers ascending.
        values: The same of each stored value; none where a question does not see the passages.
        heads: KV heads of a layer.
    """

    keys: tuple[tuple[int, int], ...]
    values: tuple[tuple[int, int], ...]
    heads: int
    codec: Codec

    def key_range(self, layer: int) -> slice:
        """The places of a layer's keys."""
        return _range(self.keys, layer)

    def value_range(self, layer: int) -> slice:
        """The places of a layer's values."""
        return _range(self.values, layer)

    @property
    def reaches_top(self) -> bool:
        """Whether the question sees the passages up to the last layer."""
        return bool(self.values) and self.values[-1] == self.keys[-1]

    def late(self, model: PreTrainedModel) -> LateHeads | None:
        """The heads in which a draft's question can be compared with what is stored."""
        heads = late_heads(model)
        return heads if heads is not None and {*heads.stored(model)} <= {*self.keys} else None

    @property
    def last_layer(self) -> int:
        """The last layer of which anything is stored."""
        return self.keys[-1][0]

    @property
    def whole(self) -> bool:
        """Whether it is the draft's whole cache, so that answers can be written from it."""
        return self.keys == self.values and self.keys[0][0] == 0


def _range(places: Sequence[tuple[int, int]], layer: int) -> slice:
    found = [place for place, (its, _) in enumerate(places) if its == layer]
    return slice(found[0], found[-1] + 1) if found else slice(0, 0)


def layout_of(
    model: PreTrainedModel, tier: Tier, codec: Codec, layers: Layers, first_layer: int = 0
) -> Layout:
    """What is kept of each token of passages.

    Args:
        model: The draft.
        tier: "cache" or "keys", see `PassageStore.open`.
        codec: How numbers are kept.
        layers: "heads" or "all".
        first_layer: The first layer in which a question sees the passages.

    Raises:
        ModelError: A layer is not plain full attention.
        ConfigError: tier="keys", and no weights of this draft's heads are known; or the first layer
            is none below the last one that counts.
    """
    require_full_attention(model)
    config = model.config.get_text_config()
    heads, count = config.num_key_value_heads, config.num_hidden_layers
    weights = _weights(model)
    last = count - 1 if weights is None or layers == "all" else weights.last_layer
    if tier == "keys":
        late = late_heads(model)
        if weights is None and late is None:
            raise ConfigError(
                'tier="keys" keeps the keys of heads that count, but none are known for this '
                'draft: run `draftsieve calibrate`, or use tier="cache".'
            )
        group = config.num_attention_heads // heads
        found = set() if late is None else set(late.stored(model))
        if weights is not None:
            found |= {(int(la), int(h) // group) for la, h in weights.heads.nonzero()}
        return Layout(tuple(sorted(found)), (), heads, codec)
    if not 0 <= first_layer < max(1, last):
        raise ConfigError(
            f"first_layer={first_layer}, but the last layer that counts is {last}: choose one from "
            f"0 to {max(0, last - 1)}."
        )
    known = late_heads(model)
    compared = set() if known is None else set(known.stored(model))
    keys = {(la, h) for la in range(first_layer, last + 1) for h in range(heads)} | compared
    needed = last + 1 if last == count - 1 else last  # of the last layer only queries and keys
    values = tuple((la, h) for la in range(first_layer, needed) for h in range(heads))
    return Layout(tuple(sorted(keys)), values, heads, codec)


def _weights(model: PreTrainedModel) -> HeadWeights | None:
    """The weights of a draft's heads, where some are known."""
    method = settled(SpecPC.preset(NEWEST_PRESET), model)
    return head_weights(model, CALIBRATED) if method.head_weights else None


def settled_for(
    method: SpecPC, model: PreTrainedModel, layout: Layout, embedder: Any | None
) -> tuple[SpecPC, str | None]:
    """A method as it is for stored passages, and what had to be left out of it.

    Args:
        method: As it was asked.
        model: The draft.
        layout: What is stored.
        embedder: Whose sentence vectors are stored; takes the place of one that is missing.

    Raises:
        ConfigError: The method reads passages together, or needs layers that are not stored.
    """
    found, note = settled(method, model), None
    if found.head_weights is None and method.head_weights == AUTO:
        found = found.model_copy(update={"passages_apart": True, "lookahead_tokens": 1})
    if not found.passages_apart:
        raise ConfigError(
            "A store holds passages that were read apart, but this method reads them together: "
            "set passages_apart=True and lookahead_tokens=1, or use a draft without a store."
        )
    whole = layout.reaches_top
    if found.likelihood_weight and not whole and layout.late(model) is not None:
        note = (
            f"likelihood_weight={found.likelihood_weight} weighs how well question and passages "
            "fit by late interaction: the store lacks the layers for the likelihood."
        )
    elif found.likelihood_weight and not whole:
        note = (
            f"likelihood_weight={found.likelihood_weight} has no effect: the store lacks the "
            'layers for it. Open a new one with layers="all" to have it.'
        )
        found = found.model_copy(update={"likelihood_weight": 0.0})
    if found.embedder is None and found.semantic_weight:
        found = found.model_copy(update={"embedder": embedder})
    if found.head_weights is None:
        if not whole:
            raise ConfigError(
                "The paper's rule reads all layers of the draft, and the store lacks some: open a "
                'new one with layers="all", or use head_weights.'
            )
        return found, note
    last = head_weights(model, found.head_weights).last_layer
    if last > layout.last_layer:
        raise ConfigError(
            f"These head weights read the draft up to layer {last}, the store holds it up to "
            f'layer {layout.last_layer}: open a new one with layers="all".'
        )
    return found, note

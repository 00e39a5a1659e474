"""Late interaction: a question meets stored keys of passages that neither it nor they have seen.

In a few KV heads the question's own keys are compared with those of the passages (cosine, each side
without its mean, which all keys of a head share); in a few others its queries look at them. Both
are taken before rotation, so that positions do not count. Of each unit, every token of the question
counts the best match (MaxSim: ColBERT, arXiv 2004.12832), the rarer among the passages the more.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn import functional
from transformers import PreTrainedModel

from ...errors import ConfigError
from ...models.attention_capture import AttentionCall, observing_until
from ...store.codec import decode
from ...store.entries import Entry
from .frame import Tail
from .late_heads import LateHeads
from .layout import Layout
from .reading import Beginning

BEHIND = 448  # tokens between the beginning and the question, where passages would stand


def places_of(heads: LateHeads, model: PreTrainedModel, layout: Layout) -> list[int]:
    """Where a store's layout has the keys of the heads.

    Raises:
        ConfigError: It lacks some.
    """
    needed = heads.stored(model)
    if missing := sorted(set(needed) - set(layout.keys)):
        raise ConfigError(
            "The store lacks keys that are compared, of (layer, KV head) "
            f'{", ".join(map(str, missing))}: open a new one with tier="keys", or with "cache" and '
            "first_layer=0."
        )
    return [layout.keys.index(place) for place in needed]


def passage_vectors(
    model: PreTrainedModel,
    heads: LateHeads,
    layout: Layout,
    entries: Sequence[Entry],
    begin: int,
    piece: int,
) -> list[torch.Tensor]:
    """What is compared of stored passages.

    Args:
        model: The draft.
        heads: Which heads.
        layout: Of the store.
        entries: The passages.
        begin: Tokens of the beginning, behind which each piece of the passage was read.
        piece: Most tokens of a piece.

    Returns:
        (tokens, heads * width) float32 of each; what is `alike` in front, of length one together.
    """
    places, names = places_of(heads, model, layout), entries[0].tensors if entries else ()
    parts = {
        name.removeprefix("keys."): torch.cat([each.tensors[name][:, places] for each in entries])
        for name in names
        if name.startswith("keys.")
    }
    if not parts:
        return []
    keys, rows = decode(parts, layout.codec, slice(None)), [each.rows for each in entries]
    positions = begin + torch.cat([torch.arange(size) % piece for size in rows])
    found = _joined(_unrotated(model, keys, positions), heads, heads.passage_mean)
    return list(torch.split(found, rows))


def question_vectors(
    model: PreTrainedModel, heads: LateHeads, beginning: Beginning, tail: Tail, behind: int
) -> torch.Tensor:
    """What is compared of a question, which the draft reads alone.

    Args:
        model: The draft.
        heads: Which heads.
        beginning: What the draft makes of the fixed beginning.
        tail: The question and what stands around it.
        behind: Tokens that are left between the two.

    Returns:
        (question, heads * width) float32, as `passage_vectors`; queries where heads look.
    """
    states = QuestionStates(heads, tail)
    positions = torch.arange(len(tail.ids)) + beginning.tokens + behind
    seen = beginning.tokens + len(tail.ids)
    with torch.no_grad(), observing_until(model, states, states.last_layer):
        model.get_decoder()(
            input_ids=tail.ids[None].to(model.device),
            attention_mask=torch.ones((1, seen), dtype=torch.int64, device=model.device),
            position_ids=positions[None].to(model.device),
            past_key_values=beginning.cache(model, 1),
            use_cache=True,
        )
    return states.vectors(model, positions)


class QuestionStates:
    """Attention callback of a pass over a question that keeps what is compared.

    Args:
        heads: Which heads.
        tail: The question and what stands around it, the newest rows of the pass.
    """

    def __init__(self, heads: LateHeads, tail: Tail) -> None:
        self.heads, self.tail = heads, tail
        self._wanted = [("key", *place) for place in heads.alike]
        self._wanted += [("query", layer, head) for layer, head, _ in heads.looking]
        self._found: dict[tuple[str, int, int], torch.Tensor] = {}
        self.last_layer = max(layer for _, layer, _ in self._wanted)

    def __call__(self, call: AttentionCall) -> None:
        for kind, layer, head in self._wanted:
            if layer == call.layer:
                states = call.key if kind == "key" else call.query
                rows = states[0, head, -len(self.tail.ids) :]
                self._found[kind, layer, head] = rows.float().cpu()

    def vectors(self, model: PreTrainedModel, positions: torch.Tensor) -> torch.Tensor:
        """(question, heads * width) float32, see `question_vectors`.

        Args:
            model: The draft.
            positions: (tail,) of the pass.
        """
        asked, heads = self.tail.question, self.heads
        states = torch.stack([self._found[place] for place in self._wanted], 1)[asked]
        return _joined(_unrotated(model, states, positions[asked]), heads, heads.question_mean)


def best_matches(heads: LateHeads, asked: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """MaxSim, before the question's tokens are added up.

    Args:
        heads: Which heads.
        asked: (question, heads * width) of `question_vectors`.
        tokens: (heads * width, units, longest) of `passage_vectors`; shorter units are filled up
            with any tokens of their own.

    Returns:
        (opinions, question, units) float32: of all that is `alike`, then of each head that looks.
    """
    shape = len(asked), *tokens.shape[1:]
    found = [(asked[:, part] @ tokens[part].flatten(1)).view(shape) for part in _parts(heads)]
    return torch.stack([each.amax(-1) for each in found])


def passages_fit(
    model: PreTrainedModel,
    heads: LateHeads,
    layout: Layout,
    beginning: Beginning,
    entries: Sequence[Entry | None],
    tail: Tail,
    asked: torch.Tensor,
    words: Callable[[torch.Tensor], list[str]],
    ids: Sequence[torch.Tensor],
    piece: int,
) -> torch.Tensor:
    """How well the passages of a prompt fit its question, beside each other.

    Args:
        model: The draft.
        heads: Which heads.
        layout: Of the store.
        beginning: What the draft makes of the fixed beginning.
        entries: What is stored of each passage; None for those without tokens.
        tail: The question and what stands around it.
        asked: What `question_vectors` gives.
        words: What tokens say, case folded.
        ids: (tokens,) int64 of each passage.
        piece: Most tokens of a piece of a passage.

    Returns:
        (passages,) float32, standard deviations from their mean; -inf for those without tokens.
    """
    found = torch.full((len(entries),), -torch.inf)
    full = [(at, entry) for at, entry in enumerate(entries) if entry is not None]
    if not full:
        return found
    stored = [entry for _, entry in full]
    vectors = passage_vectors(model, heads, layout, stored, beginning.tokens, piece)
    longest = max(map(len, vectors))
    tokens = torch.stack([filled(own, longest) for own in vectors]).permute(2, 0, 1)
    held = Counter(word for at, _ in full for word in set(words(ids[at])))
    said = [held[word] for word in words(tail.ids[tail.question])]
    scores = late_scores(heads, best_matches(heads, asked, tokens), rarity(said, len(full)))
    found[[at for at, _ in full]] = scores
    return found


def rarity(held: Sequence[int], passages: int) -> torch.Tensor:
    """(tokens,) float32: Lucene's inverse document frequency, as in `../bm25.py`.

    Args:
        held: How many passages hold each token.
        passages: How many there are.
    """
    return torch.tensor([math.log(1 + (passages - n + 0.5) / (n + 0.5)) for n in held])


def filled(tokens: torch.Tensor, longest: int) -> torch.Tensor:
    """As many tokens as wanted: the first one again and again, which changes no maximum."""
    return torch.cat([tokens, tokens[:1].expand(longest - len(tokens), -1)])


def late_scores(heads: LateHeads, matches: torch.Tensor, rarity: torch.Tensor) -> torch.Tensor:
    """What units are worth.

    Args:
        heads: Which heads.
        matches: (opinions, question, units) of `best_matches`.
        rarity: (question,) what each token of the question counts.

    Returns:
        (units,) float32, standard deviations from the mean.
    """
    total = standard((standard(matches[0]) * rarity[:, None]).sum(0))
    for (_, _, share), found in zip(heads.looking, matches[1:], strict=True):
        total = total + share * standard((found * rarity[:, None]).sum(0))
    return standard(total)


def standard(values: torch.Tensor) -> torch.Tensor:
    """Standard deviations from the mean along the last dimension; 0 where all are equal."""
    spread = values.std(-1, correction=0, keepdim=True)
    centred = values - values.mean(-1, keepdim=True)
    return torch.where(spread > 1e-6, centred / spread.clamp(min=1e-6), 0.0)


def _parts(heads: LateHeads) -> list[slice]:
    """The places of each opinion in the joined vectors."""
    count, width = heads.passage_mean.shape
    own = [slice(at * width, (at + 1) * width) for at in range(count, count + len(heads.looking))]
    return [slice(0, count * width), *own]


def _joined(states: torch.Tensor, heads: LateHeads, mean: torch.Tensor) -> torch.Tensor:
    """(tokens, heads * width) of (tokens, heads, width): `alike` centred, of length one."""
    alike, looking = states[:, : len(mean)] - mean, states[:, len(mean) :]
    alike = functional.normalize(alike, dim=-1) / len(mean) ** 0.5
    return torch.cat([alike.flatten(1), looking.flatten(1)], 1)


def _unrotated(
    model: PreTrainedModel, states: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    """(tokens, heads, width) as they were before position encoding."""
    decoder: Any = model.get_decoder()
    cos, sin = decoder.rotary_emb(
        torch.zeros(1, device=model.device), positions[None].to(model.device)
    )
    cos, sin = (part[0].float().cpu().unsqueeze(1) for part in (cos, sin))  # (tokens, 1, width)
    if cos.shape[-1] != states.shape[-1]:
        raise ConfigError(
            "This draft rotates only a part of its keys, which late interaction cannot undo: "
            "choose another draft."
        )
    half = states.shape[-1] // 2
    turned = torch.cat([-states[..., half:], states[..., :half]], -1)
    found: torch.Tensor = (states * cos - turned * sin) / (cos**2 + sin**2)
    return found

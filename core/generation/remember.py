"""Both models read a prompt's beginning once, for all questions that follow it."""

from __future__ import annotations

import torch

from ..errors import PromptError
from ..kv_cache.prefix import read_memory
from ..kv_cache.storage import Storage
from ..models.footprint import explain_out_of_memory
from ..prompt.encoder import PromptTokens
from ..prompt.messages import Prompt
from ..request import Memories
from ..types import Segment
from .pair import Pair


def remember(
    pair: Pair, prompt: Prompt, storage: Storage, known: Memories | None = None
) -> Memories:
    """Read a prompt up to its last passage, or what is new of that.

    Args:
        pair: The target, and the draft that reads too where there is one.
        prompt: Its question does not matter.
        storage: Of what is read, see `Storage`.
        known: What was read of a shorter beginning.

    Raises:
        PromptError: There is nothing to read, or more than the target's window holds.
        ModelError: A layer of a model is not plain full attention.
    """
    if not any(passage.text.strip() for passage in prompt.passages):
        raise PromptError("A session needs passages with text: there is nothing to read.")
    beginning = _beginning(pair.encoder.encode(prompt))
    if pair.context_window is not None and len(beginning) >= pair.context_window:
        raise PromptError(
            f"The passages take {len(beginning)} tokens, the target reads at most "
            f"{pair.context_window}: give fewer."
        )
    old = (None, None) if known is None else (known.target, known.draft)
    with explain_out_of_memory(f"reading {len(beginning):,} tokens", **pair.models):
        target = read_memory(pair.target, beginning, storage, old[0])
        draft = None
        if pair.draft is not None:
            beginning = _beginning(pair.draft.encoder.encode(prompt))
            draft = read_memory(pair.draft.model, beginning, storage, old[1])
    return Memories(target, draft)


def _beginning(tokens: PromptTokens) -> torch.Tensor:
    """Ids up to the last token of the last passage."""
    places = torch.nonzero(tokens.segment == int(Segment.PASSAGE))
    return tokens.ids[: int(places[-1]) + 1]

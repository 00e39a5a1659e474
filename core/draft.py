"""One pass of the draft model: attention scores of every prompt token, and its guessed answer."""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from .capture import observing, visible_keys
from .config import Pool, SpecPC
from .deadline import check_deadline
from .errors import ModelError
from .scoring import attention_probabilities, reduce_rows, row_weights
from .types import DraftReading


def read_draft(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    options: SpecPC,
    *,
    lookahead_tokens: int,
    attention_mask: torch.Tensor | None = None,
) -> list[DraftReading]:
    """Run the draft over prompts and score their tokens (paper Algorithm 2, lines 1-8).

    Only the attention rows of the last `window_size` queries and of the lookahead steps are
    computed, and they are reduced layer by layer: extra memory is O(window x tokens) of one layer.

    Args:
        model: The draft, any implementation of transformers' attention interface.
        input_ids: (batch, tokens) int64, left-padded where lengths differ.
        options: Window, reduction, starting layer and weighting.
        lookahead_tokens: Tokens generated greedily, at least 1; an end token stops its own row.
        attention_mask: (batch, tokens), 0 at padding; None means no padding.

    Returns:
        One reading per row; scores and ids of its real tokens only.

    Raises:
        ModelError: The starting layer does not exist, or no layer could be observed.
    """
    padding = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    padding = padding.to(model.device).bool()
    rows = _Rows(padding, options, starting_layer(model, options))
    with torch.no_grad(), observing(model, rows):
        guesses = _lookahead(model, input_ids.to(model.device), rows, lookahead_tokens)
    scores = rows.scores()
    lengths = padding.sum(1).tolist()
    return [
        DraftReading(scores[row, -length:].cpu(), guess)
        for row, (length, guess) in enumerate(zip(lengths, guesses, strict=True))
    ]


def starting_layer(model: PreTrainedModel, options: SpecPC) -> int:
    """The first layer that is read: the option, or min(8, layers // 2).

    Raises:
        ModelError: The draft has no such layer.
    """
    layers = model.config.get_text_config().num_hidden_layers
    first = min(8, layers // 2) if options.starting_layer is None else options.starting_layer
    if first >= layers:
        raise ModelError(
            f"starting_layer={first}, but the draft has only {layers} layers (0 to {layers - 1}). "
            "Choose a smaller one, or None for min(8, layers // 2)."
        )
    return first


def guess(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    tokens: int,
    attention_mask: torch.Tensor | None = None,
) -> list[torch.Tensor]:
    """The draft's greedy answer without any scores, for methods that need only that.

    Args:
        model: The draft.
        input_ids: (batch, tokens) int64, left-padded where lengths differ.
        tokens: Most tokens to guess; an end token stops its own row and is included.
        attention_mask: (batch, tokens), 0 at padding; None means no padding.

    Returns:
        One (guessed,) int64 tensor per row.
    """
    padding = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    state = _Seen(padding.to(model.device).bool())
    with torch.no_grad():
        return _lookahead(model, input_ids.to(model.device), state, tokens)


class _Seen:
    """What the draft has read so far."""

    def __init__(self, padding: torch.Tensor) -> None:
        self.padding = padding  # (batch, seen) bool, grows with the lookahead
        self.active = torch.ones_like(padding[:, 0])  # (batch,) bool, rows still looking ahead


class _Rows(_Seen):
    """Attention callback that reduces rows to one score per prompt token as layers go by."""

    def __init__(self, padding: torch.Tensor, options: SpecPC, first_layer: int) -> None:
        super().__init__(padding)
        self.prompt = padding.shape[1]
        self.first_layer = first_layer
        self.how: Pool = options.reduction
        window = min(options.window_size, options.capacity or self.prompt, self.prompt)
        lengths = padding.sum(1)
        self.weights = row_weights(lengths, window, options.weighted_query)  # (batch, window)
        self.total = torch.zeros(padding.shape, device=padding.device)  # (batch, prompt)
        self.called = False

    def __call__(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        mask: Any,
        value: torch.Tensor,
        **kwargs: Any,
    ) -> None:
        if module.layer_idx < self.first_layer:  # type: ignore[operator]
            return
        self.called = True
        prefill = self.padding.shape[1] == self.prompt
        weights = self.weights if prefill else self.active.float().unsqueeze(1)
        rows = weights.shape[1]
        view = visible_keys(module, key, mask, self.padding, rows, kwargs.get("sliding_window"))
        probabilities = attention_probabilities(
            query[:, :, -rows:],
            key,
            view.visible,
            kwargs.get("scaling") or query.shape[-1] ** -0.5,
            kwargs.get("softcap"),
            kwargs.get("s_aux"),
        )
        layer = reduce_rows(probabilities, weights.to(query.device), self.how)  # (batch, keys)
        self._merge(layer[:, : self.prompt - view.first].to(self.total.device), view.first)

    def _merge(self, layer: torch.Tensor, first: int) -> None:
        part = self.total[:, first : first + layer.shape[1]]
        part.copy_(torch.maximum(part, layer) if self.how == "max" else part + layer)

    def scores(self) -> torch.Tensor:
        """(batch, prompt) float32."""
        if not self.called:
            raise ModelError(
                "No attention layer of the draft could be observed: its architecture does not use "
                "transformers' attention interface. Choose another draft."
            )
        return self.total


def _lookahead(
    model: PreTrainedModel, input_ids: torch.Tensor, rows: _Seen, tokens: int
) -> list[torch.Tensor]:
    """Greedy draft answer; its last token is never fed. Returns one (la,) tensor per row."""
    ends = end_token_ids(model).to(input_ids.device)
    cache = DynamicCache(config=model.config) if tokens > 1 else None
    guesses: list[torch.Tensor] = []  # each (batch,)
    lengths = torch.full((input_ids.shape[0],), tokens, device=input_ids.device)
    feed = input_ids
    for step in range(tokens):
        check_deadline()
        positions = (rows.padding.long().cumsum(-1) - 1).clamp(min=0)[:, -feed.shape[1] :]
        logits = model(
            input_ids=feed,
            attention_mask=rows.padding.long(),
            position_ids=positions,
            past_key_values=cache,
            use_cache=cache is not None,
            logits_to_keep=1,
        ).logits
        guess = logits[:, -1].argmax(-1)  # (batch,)
        guesses.append(guess)
        ended = torch.isin(guess, ends) & rows.active
        lengths = torch.where(ended, step + 1, lengths)
        rows.active &= ~ended
        if not rows.active.any():
            break
        rows.padding = torch.cat([rows.padding, torch.ones_like(rows.padding[:, :1])], dim=1)
        feed = guess.unsqueeze(1)
    stacked = torch.stack(guesses, dim=1).cpu()  # (batch, steps)
    return [row[:length] for row, length in zip(stacked, lengths.tolist(), strict=True)]


def end_token_ids(model: PreTrainedModel) -> torch.Tensor:
    """(ends,) int64: the tokens that end a generation of this model; empty if it has none."""
    config = model.generation_config
    ends = None if config is None else config.eos_token_id
    return torch.tensor([] if ends is None else ends, dtype=torch.int64).reshape(-1)

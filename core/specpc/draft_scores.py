"""What the draft makes of prompts: attention scores of every token, and its guessed answer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel

from ..config import Reduction, SpecPC
from ..errors import ModelError
from ..kv_cache.greedy import Done, Watch, batches, each, look_ahead
from ..kv_cache.prefill import mask_left
from ..models.attention_capture import AttentionCall, observing, observing_until
from ..prompt.encoder import PromptTokens
from ..runtime.limits import check_deadline
from ..types import DraftReading
from .apart import read_apart
from .head_weights import HeadWeights, head_weights, merge_rows

NO_GUESS = torch.tensor([], dtype=torch.int64)


def read_draft(
    model: PreTrainedModel,
    prompts: Sequence[torch.Tensor] | torch.Tensor,
    options: SpecPC,
    *,
    lookahead_tokens: int | Sequence[int],
    windows: Sequence[int] | None = None,
    done: Done | None = None,
) -> list[DraftReading]:
    """Run the draft over prompts and score their tokens (paper Algorithm 2, lines 1-8).

    Only the attention rows of the last `window_size` queries and of the lookahead steps are
    computed, and they are reduced layer by layer: extra memory is O(window x tokens) of one layer.
    Prompts may differ in length: each gets what it gets alone.

    Args:
        model: The draft, any implementation of transformers' attention interface.
        prompts: (tokens,) int64 each, or (batch, tokens) for prompts of equal length.
        options: Window, reduction or learned weights of heads, starting layer and weighting.
        lookahead_tokens: Tokens generated greedily, at least 1, of all prompts or one number for
            each; an end token stops its own row.
        windows: The window of each prompt, in place of `options.window_size`.
        done: Told now and then how many more prompts are done.

    Returns:
        One reading per prompt.

    Raises:
        ModelError: The starting layer does not exist, no layer could be observed, or the learned
            weights of heads are missing or another draft's.
    """
    first, rows = starting_layer(model, options), list(prompts)
    limits = each(lookahead_tokens, len(rows))
    asking = list(windows or [options.window_size] * len(rows))
    found: dict[int, DraftReading] = {}
    for batch in batches(model, rows, limits):
        lengths = [rows[row].numel() for row in batch]
        window = [
            min(asking[row], options.capacity or length, length)
            for row, length in zip(batch, lengths, strict=True)
        ]
        scoring = _Scoring(model, lengths, window, options, first)
        watch = Watch(scoring.reading, scoring.stepping, scoring.step)
        guesses = look_ahead(model, [rows[r] for r in batch], [limits[r] for r in batch], watch)
        for row, scores, guessed in zip(batch, scoring.scores(), guesses, strict=True):
            found[row] = DraftReading(scores, guessed)
        if done is not None:
            done(len(batch))
    return [found[row] for row in range(len(rows))]


def read_scores(
    model: PreTrainedModel, prompt: PromptTokens, options: SpecPC, window: int
) -> DraftReading:
    """Score a prompt's tokens without guessing an answer; nothing is kept.

    Layers above the last one of which a head counts are not run, and of that one only queries and
    keys; with `passages_apart` passages do not see each other (see `apart.py`).

    Args:
        model: The draft.
        prompt: The prompt.
        options: Reduction or learned weights of heads, starting layer and weighting.
        window: Number of last tokens whose attention counts.

    Raises:
        ModelError: As for `read_draft`; or passages are to be read apart, and a layer is not plain
            full attention.
    """
    source, size = options.head_weights, len(prompt)
    heads = None if source is None else head_weights(model, source)
    window = min(window, options.capacity or size, size)
    weights = row_weights(torch.tensor([window]), window, options.weighted_query)
    seen = torch.ones((1, size), dtype=torch.bool, device=model.device)
    first = 0 if heads else starting_layer(model, options)
    rows = Rows(seen, weights.to(model.device), options, first, heads)
    last = model.config.get_text_config().num_hidden_layers - 1
    last = last if heads is None else heads.last_layer
    likelihood = None
    if options.passages_apart:
        likelihood = read_apart(model, prompt, rows, last, options.likelihood_weight > 0)
    else:
        check_deadline()
        ids = prompt.ids.to(model.device).unsqueeze(0)
        with torch.no_grad(), observing_until(model, rows, last):
            model.get_decoder()(input_ids=ids, use_cache=False)
    scores = rows.scores()[0].cpu()
    scores = scores if heads is None else heads.scores(scores)
    return DraftReading(scores, NO_GUESS, likelihood)


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


class _Scoring:
    """Scores of a batch: from the passes that read its prompts, and from its lookahead."""

    def __init__(
        self,
        model: PreTrainedModel,
        lengths: Sequence[int],
        windows: Sequence[int],
        options: SpecPC,
        first_layer: int,
    ) -> None:
        self.model, self.windows, self.options = model, windows, options
        source = options.head_weights
        self.heads = None if source is None else head_weights(model, source)
        self.lengths, self.first_layer = lengths, 0 if self.heads else first_layer
        padding = mask_left(lengths, model.device).bool()  # (batch, columns)
        nothing = torch.zeros(len(lengths), 1, device=padding.device)
        self.rows = Rows(padding, nothing, options, self.first_layer)  # of the lookahead

    @contextmanager
    def reading(self, rows: Sequence[int], mask: torch.Tensor) -> Iterator[None]:
        """Watch a pass over some prompts, (rows, columns) at the end of the batch's columns."""
        windows = torch.tensor([self.windows[row] for row in rows], device=mask.device)
        weights = row_weights(windows, int(windows.max()), self.options.weighted_query)
        watching = Rows(mask.bool(), weights, self.options, self.first_layer, self.heads)
        with observing(self.model, watching):
            yield
        total = self.rows.total
        total[list(rows), total.shape[1] - mask.shape[1] :] = watching.scores()

    @contextmanager
    def stepping(self) -> Iterator[None]:
        """Watch the lookahead; heads were weighed for the rows of prompts alone."""
        if self.heads is not None:
            yield
            return
        with observing(self.model, self.rows):
            yield

    def step(self, active: torch.Tensor, seen: torch.Tensor) -> None:
        """Tell the lookahead's rows who is (batch,) active and what is (batch, seen) no padding."""
        self.rows.weights, self.rows.padding = active.float().unsqueeze(1), seen

    def scores(self) -> list[torch.Tensor]:
        """(tokens,) float32 of each prompt."""
        total = self.rows.total.cpu()
        if self.heads is not None:
            total = self.heads.scores(total)
        return [row[-length:] for row, length in zip(total, self.lengths, strict=True)]


class Rows:
    """Attention callback that reduces rows to one score per prompt token as layers go by."""

    def __init__(
        self,
        padding: torch.Tensor,
        weights: torch.Tensor,
        options: SpecPC,
        first_layer: int,
        heads: HeadWeights | None = None,
    ) -> None:
        self.padding = padding  # (batch, seen) bool, False where the token is padding
        self.weights = weights  # (batch, rows) of the newest queries
        self.prompt = padding.shape[1]
        self.how, self.first_layer, self.heads = options.reduction, first_layer, heads
        self.total = torch.zeros(padding.shape, device=padding.device)  # (batch, prompt)
        self.called = False

    def __call__(self, call: AttentionCall) -> None:
        self.called = True
        if self.wants(call.layer):
            self.add(call.layer, *call.probabilities(self.padding, self.weights.shape[1]))

    def wants(self, layer: int) -> bool:
        """Whether anything of a layer counts."""
        if self.heads is not None:
            return bool((self.heads.heads[layer] != 0).any())
        return layer >= self.first_layer

    def add(self, layer: int, probabilities: torch.Tensor, first: int) -> None:
        """Take in a layer's (batch, heads, rows, keys), whose first key stands at `first`."""
        self.called = True
        weights = self.weights.to(probabilities.device)
        if self.heads is None:
            merged = reduce_rows(probabilities, weights, self.how)  # (batch, keys)
        else:
            own = self.heads.heads[layer].to(probabilities.device)  # (heads,)
            found = merge_rows(probabilities, weights, self.heads.rows)
            merged = torch.einsum("bhk,h->bk", found, own)
        seen = max(0, self.prompt - first)  # none where a window has left the prompt behind
        self._merge(merged[:, :seen].to(self.total.device), first)

    def _merge(self, layer: torch.Tensor, first: int) -> None:
        part = self.total[:, first : first + layer.shape[1]]
        adds = self.how == "mean" or self.heads is not None
        part.copy_(part + layer if adds else torch.maximum(part, layer))

    def scores(self) -> torch.Tensor:
        """(batch, prompt) float32."""
        if not self.called:
            raise ModelError(
                "No attention layer of the draft could be observed: its architecture does not use "
                "transformers' attention interface. Choose another draft."
            )
        return self.total


def row_weights(lengths: torch.Tensor, window: int, weighted: bool) -> torch.Tensor:
    """Weights of the last `window` query rows of left-padded prompts.

    The W = min(window, length) real rows of a prompt get j / (W - 1) from the oldest (0) to the
    newest (1) if weighted, else 1; rows that are padding get 0.

    Args:
        lengths: (batch,) real tokens a row.
        window: Number of rows read.
        weighted: SpecPC's `weighted_query`.

    Returns:
        (batch, window) float32.
    """
    real = lengths.clamp(max=window).unsqueeze(1)  # (batch, 1)
    place = torch.arange(window, device=lengths.device) - (window - real)  # (batch, window)
    weights = torch.where(real > 1, place / (real - 1).clamp(min=1), 1.0) if weighted else 1.0
    return (place >= 0).float() * weights


def reduce_rows(probabilities: torch.Tensor, weights: torch.Tensor, how: Reduction) -> torch.Tensor:
    """Merge heads and rows of one layer: (batch, heads, rows, keys) -> (batch, keys).

    "mean" is a plain sum, as in the authors' code: the number of terms is the same for all tokens.
    "mean-max" is the mean over heads, then the maximum over rows.
    """
    weighted = probabilities * weights[:, None, :, None]
    if how == "mean-max":
        return weighted.mean(1).amax(1)
    return weighted.amax(dim=(1, 2)) if how == "max" else weighted.sum(dim=(1, 2))

"""The one file that knows how transformers runs attention.

`observing` lets a callback see the queries, keys and mask of every attention layer while the
model runs with its own implementation (eager, sdpa, flex or flash); a callback may also compute a
layer's attention itself. Inside the context manager, transformers' registry hands out functions
that look whether the running thread or task watches this model and then go on as ever. Nothing on
the model changes, so that families which branch on the name of their implementation (sparse
attention) answer as they do unwatched, and other requests run undisturbed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from threading import Lock
from typing import Any, Protocol

import torch
from torch.nn import functional
from transformers import AttentionInterface, PreTrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel

from ..errors import ModelError
from ..runtime.limits import check_deadline


@dataclass(frozen=True, slots=True, eq=False)
class KeyView:
    """Which keys a layer showed: absolute positions first .. first + count - 1."""

    first: int
    visible: torch.Tensor  # (batch, 1 or heads, wanted rows, count) bool


@dataclass(frozen=True, slots=True, eq=False)
class AttentionCall:
    """One attention layer in one forward pass, as transformers calls it."""

    module: torch.nn.Module
    layer: int  # the module's layer index
    query: torch.Tensor  # (batch, heads, rows, head_dim), position encoding applied
    key: torch.Tensor  # (batch, kv_heads, keys, head_dim); sliding layers hold their newest keys
    value: torch.Tensor  # (batch, kv_heads, keys, value_dim)
    mask: Any  # bool or additive (batch, 1 or heads, rows, keys); anything else means causal
    scaling: float  # factor on the logits
    softcap: float | None  # Gemma-2's tanh bound on the logits
    sinks: torch.Tensor | None  # (heads,) learned logits that take part in the softmax (GPT-OSS)
    sliding_window: int | None  # None for full attention

    def visible(
        self, padding: torch.Tensor, rows: int | None = None, first: int | None = None
    ) -> KeyView:
        """What the newest queries may see, whatever form the mask has.

        Args:
            padding: (batch, seen) bool, False where the token is padding.
            rows: Number of newest queries asked about; None for all of this pass.
            first: Only the first so many of these; None for all.

        Raises:
            ModelError: The layer ran fewer queries than are asked about, or looks at keys that
                are no tokens.
        """
        rows = self._rows(rows)
        wanted = rows if first is None else first
        seen, count = padding.shape[1], self.key.shape[2]
        if count > seen:
            raise ModelError(
                f"Layer {self.layer} of this model looks at {count} keys after {seen} tokens: some "
                "stand for several tokens at once, so that nothing can be said of single ones. "
                "Choose another model."
            )
        if isinstance(self.mask, torch.Tensor) and self.mask.dim() == 4:
            part = self.mask[:, :, -rows:, :count][:, :, :wanted]
            if part.dtype != torch.bool:
                part = part > torch.finfo(part.dtype).min / 2
            return KeyView(seen - count, part)
        device = self.key.device
        places = torch.arange(seen - count, seen, device=device)
        queries = torch.arange(seen - rows, seen - rows + wanted, device=device).unsqueeze(1)
        causal = places <= queries  # (wanted, count)
        if self.sliding_window is not None:
            causal &= places > queries - self.sliding_window
        return KeyView(seen - count, causal & padding[:, None, None, seen - count :].to(device))

    def probabilities(
        self,
        padding: torch.Tensor,
        rows: int | None = None,
        first: int | None = None,
        before: int | None = None,
    ) -> tuple[torch.Tensor, int]:
        """What the newest queries look at.

        Args:
            padding: (batch, seen) bool, False where the token is padding.
            rows: Number of newest queries; None for all of this pass.
            first: Only the first so many of these; None for all.
            before: Only keys at absolute positions below this take part; None for all.

        Returns:
            (batch, heads, wanted rows, keys) float32 and the absolute position of the first key.

        Raises:
            ModelError: As for `visible`.
        """
        rows = self._rows(rows)
        view = self.visible(padding, rows, first)
        asking = self.query[:, :, -rows:][:, :, :first]
        visible = view.visible
        if before is not None:
            places = torch.arange(view.first, view.first + self.key.shape[2], device=visible.device)
            visible = visible & (places < before)
        found = attention_probabilities(
            asking, self.key, visible, self.scaling, self.softcap, self.sinks
        )
        return found, view.first

    def _rows(self, rows: int | None) -> int:
        held = self.query.shape[2]
        if rows is not None and rows > held:
            raise ModelError(
                f"Layer {self.layer} of this model ran {held} queries where the newest {rows} are "
                "to be observed: it leaves out queries that it does not need. Choose another model "
                "or a smaller window."
            )
        return held if rows is None else rows


def attention_probabilities(
    query: torch.Tensor,
    key: torch.Tensor,
    visible: torch.Tensor,
    scaling: float,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Softmax attention of a few query rows, in float32.

    Args:
        query: (batch, heads, rows, head_dim), position encoding applied.
        key: (batch, kv_heads, keys, head_dim); heads is a multiple of kv_heads.
        visible: (batch, 1 or heads, rows, keys) bool, True where a row may look.
        scaling: Factor on the logits, usually head_dim ** -0.5.
        softcap: Gemma-2's tanh bound on the logits.
        sinks: (heads,) learned logits that take part in the softmax and are then dropped (GPT-OSS).

    Returns:
        (batch, heads, rows, keys) float32; rows that see nothing are uniform.
    """
    batch, heads, rows, head_dim = query.shape
    kv_heads = key.shape[1]
    grouped = query.float().reshape(batch, kv_heads, heads // kv_heads * rows, head_dim)
    logits = (grouped @ key.float().transpose(-1, -2)).view(batch, heads, rows, -1) * scaling
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    logits.masked_fill_(~visible, torch.finfo(torch.float32).min)
    if sinks is None:
        return logits.softmax(-1)
    column = sinks.float().view(1, -1, 1, 1).expand(batch, heads, rows, 1)
    return torch.cat([logits, column], dim=-1).softmax(-1)[..., :-1]


def attention_output(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    visible: torch.Tensor,
    scaling: float,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """What attention gives a few query rows, each of which sees something.

    Args:
        query: As for `attention_probabilities`, and so are the others.
        value: (batch, kv_heads, keys, value_dim).

    Returns:
        (batch, rows, heads, value_dim) of the query's type.
    """
    if softcap is None and sinks is None:
        found = functional.scaled_dot_product_attention(
            query.float(), key, value, attn_mask=visible, scale=scaling, enable_gqa=True
        )
    else:
        seen = attention_probabilities(query, key, visible, scaling, softcap, sinks)
        found = weighted_values(seen, value)
    return found.transpose(1, 2).to(query.dtype)


def weighted_values(probabilities: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """(batch, heads, rows, value_dim): values, each head's by its probabilities."""
    batch, heads, rows, keys = probabilities.shape
    grouped = probabilities.reshape(batch, value.shape[1], -1, keys) @ value
    return grouped.view(batch, heads, rows, -1)


class AttentionCallback(Protocol):
    """Called once per attention layer and forward pass."""

    def __call__(self, call: AttentionCall, /) -> torch.Tensor | None:
        """Return None for the model's own attention, or the output that stands in for it.

        Returns:
            (batch, rows, heads, value_dim), or None.
        """


@dataclass(frozen=True, slots=True)
class _Watch:
    """Who watches, and the configurations by which the layers of its model are known."""

    callback: AttentionCallback
    configs: frozenset[int]


_WATCH: ContextVar[_Watch | None] = ContextVar("draftsieve_watch", default=None)
_LOCK = Lock()
_WATCHED: Counter[str] = Counter()  # implementation -> watchers inside right now
_OWN: dict[str, Callable[..., Any]] = {}  # implementation -> its function


@contextmanager
def observing(model: PreTrainedModel, callback: AttentionCallback) -> Iterator[None]:
    """Let `callback` see every attention layer of `model` inside the block.

    Args:
        model: Any transformers model whose attention goes through the attention interface.
        callback: Gets each layer's call.
    """
    found = (getattr(module, "config", None) for module in model.modules())
    configs = {id(c): c for c in found if isinstance(c, PreTrainedConfig)}
    wanted = {config._attn_implementation for config in configs.values()}
    names = {name if name in ALL_ATTENTION_FUNCTIONS else "eager" for name in wanted}
    with _LOCK:
        for name in names:
            _install(name)
    token = _WATCH.set(_Watch(callback, frozenset(configs)))
    try:
        yield
    finally:
        _WATCH.reset(token)
        with _LOCK:
            for name in names:
                _remove(name)


class _EnoughError(Exception):
    """The layers that were wanted have been seen; never leaves this file."""


@contextmanager
def observing_until(
    model: PreTrainedModel, callback: AttentionCallback | None, last: int
) -> Iterator[None]:
    """Let `callback` see the layers up to `last`, behind whose attention the block ends.

    What the block would do after the forward pass is skipped. Of the last layer only queries, keys
    and values are computed, nothing of the layers above.

    Args:
        model: As for `observing`.
        callback: As for `observing`; None where nothing but a cache is wanted.
        last: Index of the last layer that runs.
    """

    def watch(call: AttentionCall) -> torch.Tensor | None:
        found = None if callback is None else callback(call)
        if call.layer >= last:
            raise _EnoughError
        return found

    with suppress(_EnoughError), observing(model, watch):
        yield


def _install(name: str) -> None:
    _WATCHED[name] += 1
    if _WATCHED[name] > 1:
        return
    if name in ALL_ATTENTION_FUNCTIONS:
        _OWN[name] = ALL_ATTENTION_FUNCTIONS[name]
        AttentionInterface.register(name, partial(_attention, _OWN[name]))
    else:  # "eager", of which each model brings its own and names it when it asks
        vars(ALL_ATTENTION_FUNCTIONS)["get_interface"] = _get_interface


def _remove(name: str) -> None:
    _WATCHED[name] -= 1
    if _WATCHED[name] > 0:
        return
    if name in _OWN:
        AttentionInterface.register(name, _OWN.pop(name))
    else:
        vars(ALL_ATTENTION_FUNCTIONS).pop("get_interface", None)


def _get_interface(implementation: str, default: Callable[..., Any]) -> Callable[..., Any]:
    found = AttentionInterface.get_interface(ALL_ATTENTION_FUNCTIONS, implementation, default)
    return partial(_attention, default) if found is default else found


def _attention(
    own: Callable[..., Any],
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: Any,
    **kwargs: Any,
) -> Any:
    watch = _WATCH.get()
    if watch is not None and id(getattr(module, "config", None)) in watch.configs:
        check_deadline()
        scaling = kwargs.get("scaling")
        call = AttentionCall(
            module=module,
            layer=int(module.layer_idx),  # type: ignore[arg-type]
            query=query,
            key=key,
            value=value,
            mask=mask,
            scaling=query.shape[-1] ** -0.5 if scaling is None else float(scaling),
            softcap=kwargs.get("softcap"),
            sinks=kwargs.get("s_aux"),
            sliding_window=kwargs.get("sliding_window"),
        )
        if (out := watch.callback(call)) is not None:
            return out, None
    return own(module, query, key, value, mask, **kwargs)

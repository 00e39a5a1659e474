"""The one file that knows how transformers runs attention.

`observing` lets a callback see the queries, keys and mask of every attention layer while the
model runs with its own implementation (eager, sdpa, flex or flash); a callback may also compute a
layer's attention itself. It uses transformers' public registries; the model's configuration is
switched only inside the context manager and only the thread or task that entered it is observed,
so other requests on the same model run undisturbed.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from threading import Lock
from typing import Any, Protocol

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel

from ..errors import ModelError
from ..runtime.limits import check_deadline

NAME = "draftsieve_observed"


@dataclass(frozen=True, slots=True, eq=False)
class KeyView:
    """Which keys a layer showed: absolute positions first .. first + count - 1."""

    first: int
    visible: torch.Tensor  # (batch, 1, wanted rows, count) bool


@dataclass(frozen=True, slots=True, eq=False)
class AttentionCall:
    """One attention layer in one forward pass, as transformers calls it."""

    module: torch.nn.Module
    layer: int  # the module's layer index
    query: torch.Tensor  # (batch, heads, rows, head_dim), position encoding applied
    key: torch.Tensor  # (batch, kv_heads, keys, head_dim); sliding layers hold their newest keys
    value: torch.Tensor  # (batch, kv_heads, keys, value_dim)
    mask: Any  # bool or additive (batch, 1, rows, keys); anything else means causal attention
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
            ModelError: The layer ran fewer queries than are asked about.
        """
        rows = self._rows(rows)
        wanted = rows if first is None else first
        seen, count = padding.shape[1], self.key.shape[2]
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
            ModelError: The layer ran fewer queries than are asked about.
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
        visible: (batch, 1, rows, keys) bool, True where a row may look.
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
    logits = logits.masked_fill(~visible, torch.finfo(torch.float32).min)
    if sinks is None:
        return logits.softmax(-1)
    column = sinks.float().view(1, -1, 1, 1).expand(batch, heads, rows, 1)
    return torch.cat([logits, column], dim=-1).softmax(-1)[..., :-1]


class AttentionCallback(Protocol):
    """Called once per attention layer and forward pass."""

    def __call__(self, call: AttentionCall, /) -> torch.Tensor | None:
        """Return None for the model's own attention, or the output that stands in for it.

        Returns:
            (batch, rows, heads, value_dim), or None.
        """


_CALLBACK: ContextVar[AttentionCallback | None] = ContextVar("draftsieve_callback", default=None)
_LOCK = Lock()
_BASE: dict[int, str] = {}  # id of a config -> the implementation it asked for
_COUNT: dict[int, int] = {}  # id of a config -> observers inside right now


@contextmanager
def observing(model: PreTrainedModel, callback: AttentionCallback) -> Iterator[None]:
    """Let `callback` see every attention layer of `model` inside the block.

    Args:
        model: Any transformers model whose attention goes through the attention interface.
        callback: Gets each layer's call.
    """
    configs = _attention_configs(model)
    with _LOCK:
        _register()
        for config in configs:
            _switch_on(config)
    token = _CALLBACK.set(callback)
    try:
        yield
    finally:
        _CALLBACK.reset(token)
        with _LOCK:
            for config in configs:
                _switch_off(config)


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
        callback: As for `observing`, for looking only; None where nothing but a cache is wanted.
        last: Index of the last layer that runs.
    """

    def watch(call: AttentionCall) -> None:
        if callback is not None:
            callback(call)
        if call.layer >= last:
            raise _EnoughError

    with suppress(_EnoughError), observing(model, watch):
        yield


def own_implementation(config: PreTrainedConfig) -> str:
    """The attention implementation that a configuration asks for, observed at the moment or not."""
    current = config._attn_implementation
    return str(_BASE[id(config)] if current == NAME else current)


def _attention_configs(model: PreTrainedModel) -> list[PreTrainedConfig]:
    found = (getattr(module, "config", None) for module in model.modules())
    return list({id(c): c for c in found if isinstance(c, PreTrainedConfig)}.values())


def _register() -> None:
    if NAME not in ALL_ATTENTION_FUNCTIONS:
        AttentionInterface.register(NAME, _attention)
        AttentionMaskInterface.register(NAME, _mask)


def _switch_on(config: PreTrainedConfig) -> None:
    key = id(config)
    if _COUNT.get(key, 0) == 0:
        if key not in _BASE:
            weakref.finalize(config, _BASE.pop, key, None)
        # Stays known after the switch back: another thread may be in the middle of a forward pass.
        _BASE[key] = config._attn_implementation
        config._attn_implementation_internal = NAME
    _COUNT[key] = _COUNT.get(key, 0) + 1


def _switch_off(config: PreTrainedConfig) -> None:
    key = id(config)
    _COUNT[key] -= 1
    if _COUNT[key] == 0:
        config._attn_implementation_internal = _BASE[key]
        del _COUNT[key]


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: Any,
    **kwargs: Any,
) -> Any:
    check_deadline()
    if (callback := _CALLBACK.get()) is not None:
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
        if (out := callback(call)) is not None:
            return out, None
    eager = sys.modules[type(module).__module__].eager_attention_forward
    run = ALL_ATTENTION_FUNCTIONS.get_interface(_BASE[id(module.config)], eager)
    return run(module, query, key, value, mask, **kwargs)


def _mask(*args: Any, config: PreTrainedConfig, **kwargs: Any) -> Any:
    make: Callable[..., Any] = ALL_MASK_ATTENTION_FUNCTIONS[_BASE[id(config)]]
    return make(*args, config=config, **kwargs)

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
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from threading import Lock
from typing import Any, Protocol

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel

from ..runtime.deadline import check_deadline

NAME = "draftsieve_observed"


class AttentionCallback(Protocol):
    """Called once per attention layer and forward pass."""

    def __call__(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        mask: Any,
        value: torch.Tensor,
        **kwargs: Any,
    ) -> torch.Tensor | None:
        """Args: query (batch, heads, rows, dim), key and value (batch, kv_heads, keys, dim).

        Returns:
            None for the model's own attention, or what stands in for it: (batch, rows, heads, dim).
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
        callback: Gets each layer's module, query, key, mask, value and keyword arguments.
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
        out = callback(module, query, key, mask, value=value, **kwargs)
        if out is not None:
            return out, None
    eager = sys.modules[type(module).__module__].eager_attention_forward
    run = ALL_ATTENTION_FUNCTIONS.get_interface(_BASE[id(module.config)], eager)
    return run(module, query, key, value, mask, **kwargs)


def _mask(*args: Any, config: PreTrainedConfig, **kwargs: Any) -> Any:
    make: Callable[..., Any] = ALL_MASK_ATTENTION_FUNCTIONS[_BASE[id(config)]]
    return make(*args, config=config, **kwargs)


@dataclass(frozen=True, slots=True)
class KeyView:
    """Which keys a layer showed: absolute positions first .. first + count - 1."""

    first: int
    visible: torch.Tensor  # (batch, 1, wanted rows, count) bool


def visible_keys(
    module: torch.nn.Module,
    key: torch.Tensor,
    mask: Any,
    padding: torch.Tensor,
    rows: int,
    sliding_window: int | None,
    first: int | None = None,
) -> KeyView:
    """What the last `rows` queries of a pass may see, whatever form the mask has.

    Args:
        module: The attention layer.
        key: (batch, kv_heads, keys, dim); sliding layers hold only their newest keys.
        mask: What the layer was given: bool or additive (batch, 1, queries, keys), or anything
            else (None, a BlockMask, a 2-D mask), which stands for causal attention.
        padding: (batch, seen) bool, False where the token is padding.
        rows: Number of newest queries asked about.
        sliding_window: The layer's window, None for full attention.
        first: Only the first so many of these rows; None for all.
    """
    wanted = rows if first is None else first
    seen, count = padding.shape[1], key.shape[2]
    if isinstance(mask, torch.Tensor) and mask.dim() == 4:
        part = mask[:, :, -rows:, :count][:, :, :wanted]
        if part.dtype != torch.bool:
            part = part > torch.finfo(part.dtype).min / 2
        return KeyView(seen - count, part)
    places = torch.arange(seen - count, seen, device=key.device)
    queries = torch.arange(seen - rows, seen - rows + wanted, device=key.device).unsqueeze(1)
    causal = places <= queries  # (wanted, count)
    if sliding_window is not None:
        causal &= places > queries - sliding_window
    return KeyView(seen - count, causal & padding[:, None, None, seen - count :].to(key.device))

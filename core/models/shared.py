"""Models loaded once a process: what adapters made with the same options share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any, TypedDict, TypeVar, Unpack

import torch

from .devices import pick_device, pick_dtype
from .encoder import Encoder, load_encoder
from .loading import AnyQuantization, LoadedModel, load_model
from .names import resolve


class LoadOptions(TypedDict, total=False):
    """The keyword arguments of `load_model`."""

    gguf_file: str | None
    revision: str | None
    quantization: AnyQuantization | None
    device: str
    dtype: str | torch.dtype
    attn_implementation: str | None
    trust_remote_code: bool
    progress: bool


@dataclass(slots=True)
class _Entry:
    lock: Lock = field(default_factory=Lock)  # held while loading
    model: Any = None


T = TypeVar("T")
_LOADED: dict[tuple[str, ...], _Entry] = {}
_LOCK = Lock()  # of the table


def shared_model(name: str | Path, **options: Unpack[LoadOptions]) -> LoadedModel:
    """The model that was loaded with these options before in this process, or a fresh one.

    Threads that ask for the same model at once load it once. It is read only: requests of several
    users run on it at the same time. It stays until `clear_loaded_models`.

    Args:
        name: As for `load_model`; a folder is the same however its path is written.
        options: As for `load_model`; `progress` makes no other model.

    Raises:
        ModelNotFoundError: There is no such model, or it cannot be reached.
        ModelError: It exists but cannot be loaded.
        OutOfMemoryError: It does not fit.
    """
    return _once(_key(name, options), lambda: load_model(name, **options))


def shared_encoder(name: str | Path) -> Encoder:
    """`load_encoder`, once a process like `shared_model`."""
    return _once(("encoder", _place(resolve(name))), lambda: load_encoder(name))


def clear_loaded_models() -> None:
    """Forget all shared models; the memory is free once nobody uses them any more."""
    with _LOCK:
        _LOADED.clear()


def _key(name: str | Path, options: LoadOptions) -> tuple[str, ...]:
    source = resolve(name)
    place = pick_device(options.get("device", "auto"))
    same: dict[str, Any] = {
        **options,
        "device": place,
        "dtype": pick_dtype(options.get("dtype", "auto"), place),
    }
    same.pop("progress", None)
    said = (f"{option}={value!r}" for option, value in same.items() if value not in (None, False))
    return _place(source), *sorted(said)


def _place(source: str) -> str:
    """One spelling of a folder or file; a hub id as it is."""
    return str(Path(source).resolve()) if Path(source).exists() else source


def _once(key: tuple[str, ...], load: Callable[[], T]) -> T:
    with _LOCK:
        entry = _LOADED.setdefault(key, _Entry())
    with entry.lock:
        if entry.model is None:
            entry.model = load()
        found: T = entry.model
        return found

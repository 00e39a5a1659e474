"""transformers' progress bars, which are a process-wide switch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from threading import Lock
from typing import Any

from transformers.utils import logging as transformers_logging

_LOCK = Lock()


@contextmanager
def progress_bars(show: bool) -> Iterator[None]:
    """Show transformers' bars in the block, or not; afterwards all is as before."""
    with _LOCK:
        before = transformers_logging.is_progress_bar_enabled()
        gguf: Any = import_module("transformers.modeling_gguf_pytorch_utils")
        bar = gguf.tqdm  # its bar of unpacked weights does not ask the switch
        if not show:
            transformers_logging.disable_progress_bar()
            gguf.tqdm = partial(bar, disable=True)
        try:
            yield
        finally:
            gguf.tqdm = bar
            if before and not show:
                transformers_logging.enable_progress_bar()

"""How many bytes a model's weights take, whatever they are quantised with."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from transformers import PreTrainedModel


def footprint(model: PreTrainedModel) -> int:
    """Bytes of the weights as they are held, the scales of quantised ones included.

    Args:
        model: Any model; storage that several tensors share counts once.
    """
    found: dict[int, int] = {}
    for module in model.modules():
        for tensor in _tensors(module):
            storage = tensor.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


def _tensors(module: torch.nn.Module) -> Iterator[torch.Tensor]:
    """A module's own parameters and buffers, and what bitsandbytes holds beside them."""
    for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
        yield from _parts(tensor)
    for holder in (getattr(module, "weight", None), getattr(module, "state", None)):
        if type(holder).__module__.startswith("bitsandbytes"):
            yield from _held(holder)


def _held(state: Any) -> Iterator[torch.Tensor]:
    """Tensors among an object's attributes; quantised scales have a state of their own."""
    for value in vars(state).values():
        if isinstance(value, torch.Tensor):
            yield from _parts(value)
        elif type(value).__name__ == "QuantState":
            yield from _held(value)


def _parts(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The plain tensors that a tensor consists of (torchao's subclasses wrap several)."""
    if hasattr(tensor, "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:
            yield from _parts(getattr(tensor, name))
    elif not tensor.is_meta:
        yield tensor

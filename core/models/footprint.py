"""How many bytes a model's weights take, whatever they are quantised with."""

from __future__ import annotations

from collections.abc import Iterator
from traceback import format_exception
from typing import Any

import torch
from transformers import PreTrainedModel

from ..errors import OutOfMemoryError


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


class explain_out_of_memory:  # noqa: N801, reads as a verb in `with`
    """Turn an allocation failure into an `OutOfMemoryError` that names the models' sizes.

    What the failed calls held (caches, activations) is freed when the error is raised, even where
    the error is kept: its cause stays without its traceback, whose text becomes a note.

    Args:
        work: What is done in the block, with its sizes, for the message.
        models: The models at work by their roles.
    """

    def __init__(self, work: str = "", **models: PreTrainedModel | None) -> None:
        self.work, self.models = work, models

    def __enter__(self) -> None:
        """Begin the block."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: object
    ) -> None:
        """Raise the explained error in place of an allocation failure."""
        if error is None or not is_out_of_memory(error):
            return
        work = self.work or getattr(error, "work", "")
        sizes = ", ".join(
            f"{role} {footprint(model) / 1e6:.0f} MB"
            for role, model in self.models.items()
            if model is not None
        )
        what = f" while {work}" if work else ""
        weights = f"; the weights take: {sizes}" if sizes else ""
        explained = OutOfMemoryError(
            f"Out of memory{what}{weights}. Use a smaller capacity, fewer or shorter prompts at "
            "once, Quantization(bits=4), or put the draft on another device.",
            work,
        )
        explained.add_note("".join(format_exception(error)))
        del trace  # this frame is part of the new traceback and must not hold the old one
        _forget_frames(error)
        raise explained from error


def _forget_frames(error: BaseException) -> None:
    """Free what the calls held that an error and those before it went through."""
    chain: BaseException | None = error
    seen: set[int] = set()
    while chain is not None and id(chain) not in seen:
        seen.add(id(chain))
        chain.__traceback__ = None
        chain = chain.__cause__ or chain.__context__
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory could not be had, whatever its type."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(
        sign in text
        for sign in ("can't allocate memory", "not enough memory", "out of memory", "alloc_failed")
    )

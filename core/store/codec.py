"""Keys and values of stored passages as few bytes.

float16: as the model made them. int8: a scale for each vector (one token, one head). int4: vectors
are first rotated (Hadamard, so that no channel stands out; arXiv 2404.00456; widths that are no
power of two are not), then four bits a number with a scale and a zero point for each group of 32.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache
from typing import Literal

import torch

Codec = Literal["float16", "int8", "int4"]
_GROUP = 32  # numbers of four bits that share a scale
_TINY = torch.finfo(torch.float16).tiny


def encode(states: torch.Tensor, codec: Codec) -> dict[str, torch.Tensor]:
    """Pack vectors.

    Args:
        states: (tokens, heads, width) floating point; an even width for int4.
        codec: See above.

    Returns:
        Tensors with tokens first, heads second: "data", and what else `decode` needs.
    """
    if codec == "float16":
        limit = torch.finfo(torch.float16).max
        return {"data": states.float().clamp(-limit, limit).half()}
    exact = states.float()
    if codec == "int8":
        scale = (exact.abs().amax(-1, keepdim=True) / 127).clamp(min=_TINY).half()
        return {"data": (exact / scale).round().clamp(-127, 127).to(torch.int8), "scale": scale}
    width = exact.shape[-1]
    groups = _grouped(_rotated(exact), width // math.gcd(width, _GROUP))
    low, high = groups.aminmax(dim=-1, keepdim=True)
    zero, scale = low.half(), ((high - low) / 15).clamp(min=_TINY).half()
    steps = ((groups - zero) / scale).round().clamp(0, 15).to(torch.uint8).flatten(-2)
    packed = steps[..., 0::2] | steps[..., 1::2] << 4
    return {"data": packed, "scale": scale.squeeze(-1), "zero": zero.squeeze(-1)}


def decode(
    parts: Mapping[str, torch.Tensor],
    codec: Codec,
    heads: slice,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Some heads of what `encode` has packed.

    Args:
        parts: What `encode` gave.
        codec: The same.
        heads: Which ones.
        out: (tokens, heads, width) float32 of any strides that takes them; None for a new tensor.

    Returns:
        (tokens, heads, width) float32.
    """
    data = parts["data"][:, heads]
    if codec == "int8":
        return torch.mul(data, parts["scale"][:, heads].float(), out=out)
    found = data.float() if codec == "float16" else _from_nibbles(parts, heads)
    return found if out is None else out.copy_(found)


def _from_nibbles(parts: Mapping[str, torch.Tensor], heads: slice) -> torch.Tensor:
    data, scale = parts["data"][:, heads], parts["scale"][:, heads].float()
    steps = torch.stack([data & 15, data >> 4], dim=-1).flatten(-2)
    groups = _grouped(steps.float(), scale.shape[-1])
    zero = parts["zero"][:, heads].float()
    return _rotated((groups * scale.unsqueeze(-1) + zero.unsqueeze(-1)).flatten(-2))


def _grouped(states: torch.Tensor, groups: int) -> torch.Tensor:
    """(..., width) as (..., groups, width / groups)."""
    return states.reshape(*states.shape[:-1], groups, -1)


def _rotated(states: torch.Tensor) -> torch.Tensor:
    """The Hadamard rotation of the last dimension, which undoes itself; none of other widths."""
    width = states.shape[-1]
    if width & (width - 1):
        return states
    found: torch.Tensor = states @ _hadamard(width).to(states.device)
    return found


@cache
def _hadamard(width: int) -> torch.Tensor:
    """(width, width) orthogonal and symmetric."""
    found = torch.ones(1, 1)
    while found.shape[0] < width:
        found = torch.cat([torch.cat([found, found], 1), torch.cat([found, -found], 1)])
    rotation: torch.Tensor = found / width**0.5
    return rotation

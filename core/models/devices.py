"""Where a model runs, and in which type."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..errors import ModelError

# Parameters from which a model is read in bfloat16 where the processor multiplies it. An estimate:
# below, converting between types costs about what it saves (examples/benchmarks/dtype_cpu.py).
SMALLEST = 50_000_000
_HALF = (torch.bfloat16, torch.float16)


def pick_device(device: str) -> str:
    """ "auto" is CUDA where present, else CPU; anything else is checked and returned."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise ModelError(f"{device!r} is no device; try 'auto', 'cpu' or 'cuda'.") from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise ModelError(f"device={device!r}, but this torch sees no CUDA device; try 'auto'.")
    return device


def pick_dtype(dtype: str | torch.dtype, device: str) -> str | torch.dtype:
    """The type that is meant; "auto" stays where it takes the model to tell (see `auto_dtype`)."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        told = torch.device(device).type == "cpu" and not multiplies_bfloat16()
        return torch.float32 if told else "auto"
    found = getattr(torch, dtype, None)
    if not isinstance(found, torch.dtype):
        raise ModelError(f"{dtype!r} is no dtype; try 'auto', 'float32' or 'bfloat16'.")
    return found


def multiplies_bfloat16(capabilities: Mapping[str, Any] | None = None) -> bool:
    """Whether a processor multiplies bfloat16 itself (AMX or AVX512_BF16).

    Args:
        capabilities: What it can do, as `torch.cpu.get_capabilities` says; None for this one.
    """
    able = getattr(torch.cpu, "get_capabilities", dict)() if capabilities is None else capabilities
    return bool(able.get("amx_bf16") or able.get("avx512_bf16"))


def auto_dtype(stored: torch.dtype | None, parameters: int) -> torch.dtype:
    """The type that "auto" means on a CPU that multiplies bfloat16; on others it means float32.

    Args:
        stored: Type of the checkpoint; None where it does not say.
        parameters: Of the model.

    Returns:
        bfloat16 for large models stored in half precision; else float32, which changes nothing in
        any checkpoint.
    """
    worth = stored in _HALF and parameters >= SMALLEST
    return torch.bfloat16 if worth else torch.float32

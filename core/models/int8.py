"""Linear layers in int8 on a CPU: the fastest way for a draft to read, by plain torch.

Weights have one scale an output channel, activations one a token, found as they come
(W8A8 with dynamic per-token scales, as in LLM.int8's vector-wise part, arXiv 2208.07339). Products
are summed in int32 by the processor's int8 instructions (VNNI, AMX).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..errors import ModelError

MOST = 127
_ROWS = 512  # tokens at a time: what is between the products stays small


class Int8Linear(nn.Module):
    """What `nn.Linear` computes, by products of int8.

    Args:
        linear: The layer, with weights of any floating type.
    """

    weight: torch.Tensor  # (inputs, outputs) int8
    scale: torch.Tensor  # (outputs,) float32
    bias: torch.Tensor | None

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        whole, scale = quantise(linear.weight.detach().float())
        self.register_buffer("weight", whole.t())
        self.register_buffer("scale", scale.squeeze(1))
        bias = None if linear.bias is None else linear.bias.detach().float()
        self.register_buffer("bias", bias)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """(..., inputs) to (..., outputs), in the type of the values."""
        rows = values.reshape(-1, self.in_features)
        found = torch.empty(len(rows), self.out_features)
        for part, into in zip(torch.split(rows, _ROWS), torch.split(found, _ROWS), strict=True):
            whole, scale = quantise(part.float())
            into.copy_(torch._int_mm(whole, self.weight)).mul_(scale).mul_(self.scale)
            if self.bias is not None:
                into.add_(self.bias)
        return found.to(values.dtype).reshape(*values.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """Its sizes, for printing the model."""
        return f"in_features={self.in_features}, out_features={self.out_features}"


def quantise(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows, width) float32 as int8, and the (rows, 1) float32 scale of each row."""
    scale = rows.abs().amax(1, keepdim=True) / MOST  # faster than a norm
    scale.clamp_(min=torch.finfo(torch.float32).tiny)
    return (rows / scale).round_().to(torch.int8), scale


def to_int8(model: PreTrainedModel) -> None:
    """Put int8 layers in the place of all linear ones but the head, which predicts tokens.

    Raises:
        ModelError: The model is not on a CPU, or its processor's int8 products are not exact.
    """
    if model.device.type != "cpu":
        raise ModelError(
            f'Quantization(backend="torch") is for CPUs, but the model is on {model.device}: '
            'give device="cpu", or leave the backend to bitsandbytes.'
        )
    require_exact_products()
    head = model.get_output_embeddings()
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear and child is not head:
                setattr(module, name, Int8Linear(child))
    model.register_state_dict_pre_hook(_refuse)


def require_exact_products() -> None:
    """Make sure that sums of int8 products do not saturate, as they do on some processors.

    Raises:
        ModelError: They do.
    """
    size = 64
    left = torch.full((size, size), MOST, dtype=torch.int8)
    right = torch.full((size, size), -MOST, dtype=torch.int8)
    if not bool((torch._int_mm(left, right) == -size * MOST * MOST).all()):
        raise ModelError(
            "This processor's int8 products are not exact (it has neither VNNI nor AMX), so "
            'Quantization(backend="torch") would spoil the model: load it without.'
        )


def _refuse(*_: Any) -> None:
    raise ModelError(
        "A model whose layers were quantised to int8 while loading cannot be saved: save the "
        "checkpoint that was loaded, and quantise it when loading."
    )

"""Starts the target from a trained draft: a wider and deeper model that computes the same.

Run `python -m examples.train_builtin.grow --source .work/draft --out .work/target`, then train the
target with `--resume`. The new half of the hidden state is written to, but at first not read; new
heads, neurons and layers are read, but at first write only to the new half. So the target begins
with the draft's answers and spends its own, more expensive steps on becoming better.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from .model import SHAPES, LeanLlama, Shape

NEW_LAYERS = (2, 5)  # positions of the target's layers that the draft does not have


def _halves(norm: Tensor, width: int) -> Tensor:
    """Norm weights: the mean square is now taken over more, nearly empty channels."""
    scale = (norm.numel() / width) ** 0.5
    return torch.cat((norm * scale, torch.ones(width - norm.numel())))


def _place(matrix: Tensor, old: Tensor, row: int = 0) -> None:
    """Put an old input matrix into the rows from `row`; it does not read new channels."""
    rows, columns = old.shape
    matrix[row : row + rows, :columns] = old
    matrix[row : row + rows, columns:] = 0


def _place_output(matrix: Tensor, old: Tensor) -> None:
    """Put an old output matrix; new heads or neurons do not write old channels."""
    rows, columns = old.shape
    matrix[:rows, :columns] = old
    matrix[:rows, columns:] = 0


def _grow_layer(new: dict[str, Tensor], old: dict[str, Tensor], small: Shape, big: Shape) -> None:
    width = small.head_size
    sizes = [small.heads * width, small.kv_heads * width, small.kv_heads * width]
    starts = (0, big.heads * width, (big.heads + big.kv_heads) * width)
    for part, start in zip(torch.split(old["qkv.weight"], sizes), starts, strict=True):
        _place(new["qkv.weight"], part, start)
    gate, up = old["gate_up.weight"].chunk(2)
    _place(new["gate_up.weight"], gate)
    _place(new["gate_up.weight"], up, big.ffn)
    _place_output(new["out.weight"], old["out.weight"])
    _place_output(new["down.weight"], old["down.weight"])
    for norm in ("norm1", "norm2"):
        new[norm].copy_(_halves(old[norm], big.hidden))


def grow(source: dict[str, Tensor], small: Shape, big: Shape, seed: int = 1) -> dict[str, Tensor]:
    """The state of a `big` model that gives nearly the logits of the `small` one."""
    torch.manual_seed(seed)
    state = {name: tensor.clone() for name, tensor in LeanLlama(big).state_dict().items()}
    state["embedding.weight"][:, : small.hidden] = source["embedding.weight"]
    state["norm"] = _halves(source["norm"], big.hidden)
    old_number = 0
    for number in range(big.layers):
        mark = f"blocks.{number}."
        new = {name.removeprefix(mark): t for name, t in state.items() if name.startswith(mark)}
        if number in NEW_LAYERS:
            for name in ("out.weight", "down.weight"):
                new[name][: small.hidden] = 0
            continue
        mark = f"blocks.{old_number}."
        old = {name.removeprefix(mark): t for name, t in source.items() if name.startswith(mark)}
        _grow_layer(new, old, small, big)
        old_number += 1
    return state


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--source", type=Path, default=Path(".work/draft"))
    parser.add_argument("--out", type=Path, default=Path(".work/target"))
    options = parser.parse_args()
    saved = torch.load(options.source / "checkpoint.pt", map_location="cpu")
    state = grow(saved["model"], SHAPES["draft"], SHAPES["target"])
    counters = {
        "phase": saved["counters"]["phase"],
        "inherited_tokens": saved["counters"]["tokens"],
    }
    options.out.mkdir(parents=True, exist_ok=True)
    torch.save({"model": state, "counters": counters}, options.out / "checkpoint.pt")


if __name__ == "__main__":
    main()

"""Makes a checkpoint out of an exported model, to continue its training with fresh optimisers.

Run `python -m examples.train_builtin.import_weights --model draft --source core/builtin/draft
--out .work/draft`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from .model import SHAPES, Shape


def lean_weights(weights: dict[str, Tensor], shape: Shape) -> dict[str, Tensor]:
    """The state of `LeanLlama` from that of `LlamaForCausalLM`, in float32."""
    weights = {name: tensor.float() for name, tensor in weights.items()}
    state = {
        "embedding.weight": weights["model.embed_tokens.weight"],
        "norm": weights["model.norm.weight"],
    }
    for number in range(shape.layers):
        old, new = f"model.layers.{number}.", f"blocks.{number}."
        attention = [weights[f"{old}self_attn.{name}_proj.weight"] for name in "qkv"]
        state |= {
            f"{new}norm1": weights[f"{old}input_layernorm.weight"],
            f"{new}norm2": weights[f"{old}post_attention_layernorm.weight"],
            f"{new}qkv.weight": torch.cat(attention),
            f"{new}out.weight": weights[f"{old}self_attn.o_proj.weight"],
            f"{new}gate_up.weight": torch.cat(
                [weights[f"{old}mlp.{name}_proj.weight"] for name in ("gate", "up")]
            ),
            f"{new}down.weight": weights[f"{old}mlp.down_proj.weight"],
        }
    return state


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=sorted(SHAPES), required=True)
    parser.add_argument("--source", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    state = lean_weights(load_file(options.source / "model.safetensors"), SHAPES[options.model])
    options.out.mkdir(parents=True, exist_ok=True)
    torch.save({"model": state, "counters": {}}, options.out / "checkpoint.pt")


if __name__ == "__main__":
    main()

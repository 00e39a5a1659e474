"""Writes a trained model as transformers' `LlamaForCausalLM`.

Run `python -m examples.train_builtin.export --model draft --source .work/draft
--out core/builtin/draft`.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from .model import NORM_EPS, ROPE_BASE, SHAPES, Block, LeanLlama, Shape


def llama_weights(model: LeanLlama) -> dict[str, Tensor]:
    """The state dict of `LlamaForCausalLM`."""
    shape = model.shape
    kv = shape.kv_heads * shape.head_size
    weights = {"model.embed_tokens.weight": model.embedding.weight, "model.norm.weight": model.norm}
    for number, block in enumerate(model.blocks):
        assert isinstance(block, Block)
        q, k, v = torch.split(block.qkv.weight, [shape.hidden, kv, kv])
        gate, up = block.gate_up.weight.chunk(2)
        parts = {
            "self_attn.q_proj": q,
            "self_attn.k_proj": k,
            "self_attn.v_proj": v,
            "self_attn.o_proj": block.out.weight,
            "mlp.gate_proj": gate,
            "mlp.up_proj": up,
            "mlp.down_proj": block.down.weight,
            "input_layernorm": block.norm1,
            "post_attention_layernorm": block.norm2,
        }
        weights |= {f"model.layers.{number}.{name}.weight": part for name, part in parts.items()}
    return {name: tensor.detach().clone().contiguous() for name, tensor in weights.items()}


def llama_config(shape: Shape, longest: int) -> dict[str, object]:
    """What `config.json` says."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.ffn,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_size,
        "hidden_act": "silu",
        "max_position_embeddings": longest,
        "rms_norm_eps": NORM_EPS,
        "rope_parameters": {"rope_type": "default", "rope_theta": ROPE_BASE},
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": None,
        "eos_token_id": 3,
        "pad_token_id": 0,
        "dtype": "bfloat16",
    }


def export(model: LeanLlama, tokenizer: Path, out: Path, longest: int) -> None:
    """Write a folder that transformers loads; each file appears whole or not at all."""
    from safetensors.torch import save_file

    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as name:
        folder = Path(name)
        weights = {key: value.bfloat16() for key, value in llama_weights(model).items()}
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        _write_json(folder / "config.json", llama_config(model.shape, longest))
        ends = {"eos_token_id": 3, "pad_token_id": 0, "do_sample": False}
        _write_json(folder / "generation_config.json", ends)
        for path in tokenizer.iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        for path in folder.iterdir():
            path.chmod(0o644)
            os.replace(path, out / path.name)


def _write_json(path: Path, content: Mapping[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=sorted(SHAPES), required=True)
    parser.add_argument("--source", type=Path, required=True, help="folder with checkpoint.pt")
    parser.add_argument("--tokenizer", type=Path, default=Path(".work/tokenizer"))
    parser.add_argument("--longest", type=int, default=4608, help="longest prompt and answer")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    model = LeanLlama(SHAPES[options.model])
    state = torch.load(options.source / "checkpoint.pt", map_location="cpu")
    model.load_state_dict(state["model"])
    export(model, options.tokenizer, options.out, options.longest)


if __name__ == "__main__":
    main()

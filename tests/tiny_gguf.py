"""A tiny Llama written as a GGUF file, the way llama.cpp's converter does it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import torch
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from .tokenizer_styles import CORPUS

SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<reserved>")
DEFAULT_SYSTEM = "You are a made-up assistant named Tiny."
TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\\n" + DEFAULT_SYSTEM + "<|im_end|>\\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
_NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with digits apart, as SmolLM2's, with a template that adds a system text."""
    backend = Tokenizer(BPE())
    steps = pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence(list(steps))
    backend.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=500,
        special_tokens=[AddedToken(name, special=True, normalized=False) for name in SPECIALS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([*CORPUS, "a    b\n\n\n\nc   "], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=TEMPLATE,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
    )


@cache
def model() -> LlamaForCausalLM:
    """Two layers, four heads, two of keys and values, shared embeddings."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer()),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config).eval()


def write(
    path: Path,
    kind: str = "F32",
    *,
    architecture: str = "llama",
    fields: Mapping[str, Any] | None = None,
    control: Mapping[int, str] | None = None,
    theta: float = 5000.0,
    rope_factors: torch.Tensor | None = None,
) -> Path:
    """Write the model and its tokenizer.

    Args:
        path: The file.
        kind: Type of the matrices, such as "F32", "F16", "Q8_0", "Q4_1".
        architecture: What the file calls itself.
        fields: More unsigned integers.
        control: Other names for control tokens, by id.
        theta: Base of the rotations.
        rope_factors: (8,) what each of them is slowed down by.
    """
    config = model().config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(theta)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    for name, value in (fields or {}).items():
        writer.add_uint32(name, value)
    _write_tokenizer(writer, control or {})
    if rope_factors is not None:
        writer.add_tensor("rope_freqs.weight", rope_factors.float().numpy())
    for name, weights in model().state_dict().items():
        if name != "lm_head.weight":
            _write_tensor(writer, name, weights, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _write_tokenizer(writer: gguf.GGUFWriter, control: Mapping[int, str]) -> None:
    spec = json.loads(tokenizer().backend_tokenizer.to_str())["model"]
    names = sorted(spec["vocab"], key=spec["vocab"].get)
    names = [control.get(i, name) for i, name in enumerate(names)]
    special = (*SPECIALS, *control.values())
    kinds = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(names)
    writer.add_token_types([kinds[0] if name in special else kinds[1] for name in names])
    writer.add_token_merges([" ".join(pair) for pair in spec["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_chat_template(TEMPLATE)


def _write_tensor(writer: gguf.GGUFWriter, name: str, weights: torch.Tensor, kind: str) -> None:
    found = {"model.embed_tokens.weight": "token_embd", "model.norm.weight": "output_norm"}
    if name in found:
        short = found[name]
    else:
        _, _, layer, inner = name.removesuffix(".weight").split(".", 3)
        short = f"blk.{layer}.{_NAMES[inner]}"
        heads = {"attn_q": 4, "attn_k": 2}.get(_NAMES[inner])
        if heads:  # llama.cpp rotates neighbours, transformers the two halves
            halves = weights.reshape(heads, 2, -1, weights.shape[1])
            weights = halves.swapaxes(1, 2).reshape(weights.shape)
    stored = gguf.GGMLQuantizationType[kind if weights.dim() == 2 else "F32"]
    data = gguf.quantize(weights.float().numpy(), stored)
    writer.add_tensor(f"{short}.weight", data, raw_dtype=stored)

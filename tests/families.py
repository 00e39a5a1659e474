"""Tiny random models of every supported family, built from configs."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from functools import cache
from itertools import count
from typing import Any

import torch
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers import models as zoo
from transformers.masking_utils import eager_mask

COMMON: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
    "tie_word_embeddings": False,
}


def _without(values: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key != name}


_SLIDING = ["sliding_attention", "full_attention"] * 2
_SHARED = {
    **COMMON,
    "num_hidden_layers": 6,
    "num_kv_shared_layers": 2,
    "sliding_window": 24,
    "layer_types": [*_SLIDING, *_SLIDING[:2]],
    "vocab_size_per_layer_input": 128,
    "hidden_size_per_layer_input": 8,
}
_CONFIGS: dict[str, Any] = {
    "llama": lambda: zoo.llama.LlamaConfig(**COMMON),
    "mistral": lambda: zoo.mistral.MistralConfig(**COMMON, sliding_window=24),
    "qwen2": lambda: zoo.qwen2.Qwen2Config(**_without(COMMON, "head_dim")),
    "qwen3": lambda: zoo.qwen3.Qwen3Config(
        **COMMON, use_sliding_window=True, sliding_window=24, layer_types=_SLIDING
    ),
    "phi3": lambda: zoo.phi3.Phi3Config(**_without(COMMON, "head_dim"), sliding_window=24),
    "gemma2": lambda: zoo.gemma2.Gemma2Config(
        **COMMON,
        sliding_window=24,
        layer_types=_SLIDING,
        attn_logit_softcapping=2.0,
        query_pre_attn_scalar=24,
    ),
    "gemma3": lambda: zoo.gemma3.Gemma3TextConfig(
        **COMMON, sliding_window=24, layer_types=_SLIDING, query_pre_attn_scalar=24
    ),
    # the last two layers look at the keys and values of the two before
    "gemma3n": lambda: zoo.gemma3n.Gemma3nTextConfig(**_SHARED, laurel_rank=8),
    "gemma4": lambda: zoo.gemma4.Gemma4TextConfig(
        **_SHARED, global_head_dim=32, final_logit_softcapping=5.0
    ),
    "gpt_oss": lambda: zoo.gpt_oss.GptOssConfig(
        **COMMON,
        sliding_window=24,
        layer_types=_SLIDING,
        num_local_experts=2,
        num_experts_per_tok=1,
    ),
}
NAMES = tuple(_CONFIGS)
_INDEXED = {
    **_without(COMMON, "head_dim"),
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "first_k_dense_replace": 4,
    "index_topk": 8,
    "index_head_dim": 16,
    "index_n_heads": 16,  # with few, many keys score 0 and the choice among them is arbitrary
}
_CONFIGS |= {  # each query chooses the few keys it looks at
    "deepseek_v32": lambda: zoo.deepseek_v32.DeepseekV32Config(**_INDEXED),
    "glm_moe_dsa": lambda: zoo.glm_moe_dsa.GlmMoeDsaConfig(**_INDEXED),
    "minimax_m3": lambda: zoo.minimax_m3_vl.MiniMaxM3VLTextConfig(
        **COMMON,
        layer_types=["full_attention", "minimax_m3_sparse"] * 2,
        rotary_dim=8,
        dense_intermediate_size=48,
        shared_intermediate_size=48,
        num_local_experts=2,
        num_experts_per_tok=1,
        index_n_heads=2,
        index_head_dim=16,
        index_block_size=4,
        index_topk_blocks=3,
    ),
}
SPARSE_CASES = [
    (name, implementation)
    for name in _CONFIGS
    if name not in NAMES
    for implementation in ("eager", "sdpa")
]
_NUMBERS = count()
CASES = [
    (name, implementation)
    for name in NAMES
    for implementation in ("eager", "sdpa")
    # transformers refuses sdpa for soft caps and learned sinks
    if implementation == "eager" or name not in ("gemma2", "gpt_oss")
]


def without_windows() -> PreTrainedConfig:
    """Two layers with keys of their own, two that look at the second's."""
    sizes = {**_SHARED, "num_hidden_layers": 4, "layer_types": ["full_attention"] * 4}
    return zoo.gemma4.Gemma4TextConfig(**sizes, global_head_dim=16)


def with_compressed_keys() -> PreTrainedConfig:
    """Layers that also look at keys which stand for several tokens each."""
    return zoo.deepseek_v4.DeepseekV4Config(
        **{**COMMON, "num_key_value_heads": 1},
        q_lora_rank=16,
        o_lora_rank=8,
        o_groups=2,
        moe_intermediate_size=16,
        n_routed_experts=4,
        num_experts_per_tok=2,
        hc_mult=2,
        sliding_window=24,
        index_topk=8,
        index_head_dim=16,
        index_n_heads=2,
    )


@cache
def build(
    name: str, implementation: str, vocab_size: int = COMMON["vocab_size"]
) -> PreTrainedModel:
    """A float32 model; all implementations of a family share the same weights."""
    config = _CONFIGS[name]()
    config.vocab_size = vocab_size
    return build_from(config, implementation)


def build_from(config: PreTrainedConfig, implementation: str) -> PreTrainedModel:
    """A float32 model of any configuration with the vocabulary of `ids`."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=implementation)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():  # sharper attention than the usual initialisation gives
        if parameter.dim() > 1:
            spread = 1.6 / parameter.shape[-1] ** 0.5
            parameter.data.normal_(0.0, spread, generator=generator)
        elif parameter.shape[0] == COMMON["num_attention_heads"]:
            parameter.data.normal_(0.0, 1.0, generator=generator)  # GPT-OSS's sinks
    model.generation_config.eos_token_id = None
    return model.float().eval()


def without_sliding(name: str, vocab_size: int) -> PreTrainedModel:
    """The family with full attention in every layer."""
    config = _CONFIGS[name]()
    config.vocab_size = vocab_size
    if getattr(config, "layer_types", None):
        config.layer_types = ["full_attention"] * config.num_hidden_layers
    else:
        config.sliding_window = None
    return build_from(config, "eager")


def fresh(name: str, implementation: str) -> PreTrainedModel:
    """A model of `build` that a test may change."""
    return deepcopy(build(name, implementation))


def with_attention(model: PreTrainedModel, attention: Callable[..., Any]) -> PreTrainedModel:
    """A copy of a model whose layers call a function of transformers' attention interface."""
    name = f"reference_{next(_NUMBERS)}"
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, eager_mask)
    changed = deepcopy(model)
    changed.set_attn_implementation(name)
    return changed


def ids(length: int, seed: int = 0) -> torch.Tensor:
    """(1, length) random token ids."""
    return torch.randint(3, 128, (1, length), generator=torch.Generator().manual_seed(seed))

"""The deterministic tiny checkpoints behind tests/parity, and tie-aware comparison of selections.

Weights come from splitmix64 counters, so the recorded numbers belong to exactly these models:
seed = FNV-1a-64 of "<model>/<tensor>", uniform with the tensor's mean and standard deviation.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

PARITY = Path(__file__).parent / "parity"
_QK_STD = 1.6
# hidden, layers, heads, kv heads, ffn, head_dim
_DIMS = {"llama-target": (128, 4, 8, 4, 256, 16), "llama-draft": (64, 2, 4, 2, 128, 16)}


def prompt(length: int) -> torch.Tensor:
    """(1, length) int64 token ids of a recorded prompt."""
    return torch.from_numpy(np.load(PARITY / "prompts.npz")[f"p{length}"]).long().unsqueeze(0)


@cache
def model(name: str) -> PreTrainedModel:
    """A recorded checkpoint in float32 with sdpa attention."""
    hidden, layers, heads, kv_heads, ffn, head_dim = _DIMS[name]
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=ffn,
        head_dim=head_dim,
        max_position_embeddings=8192,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        attn_implementation="sdpa",
    )
    built = LlamaForCausalLM(config).float().eval()
    weights = {key: _weight(name, key, tuple(old.shape)) for key, old in built.state_dict().items()}
    built.load_state_dict(weights)
    built.generation_config.eos_token_id = None
    return built


def _weight(name: str, tensor: str, shape: tuple[int, ...]) -> torch.Tensor:
    mean, std = _mean_std(tensor, shape)
    count = int(np.prod(shape))
    golden = np.uint64(0x9E3779B97F4A7C15)
    with np.errstate(over="ignore"):
        state = np.uint64(_fnv1a(f"{name}/{tensor}"))
        z = state + (np.arange(count, dtype=np.uint64) + np.uint64(1)) * golden
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    uniform = (z >> np.uint64(11)).astype(np.float64) * 2.0**-53
    values = mean + std * np.sqrt(12.0) * (uniform - 0.5)
    return torch.from_numpy(values.astype(np.float32).reshape(shape))


def _fnv1a(text: str) -> int:
    value = 0xCBF29CE484222325
    for byte in text.encode():
        value = ((value ^ byte) * 0x100000001B3) & 0xFFFFFFFFFFFFFFFF
    return value


def _mean_std(tensor: str, shape: tuple[int, ...]) -> tuple[float, float]:
    leaf = tensor.split(".")[-2]
    if "norm" in leaf:
        return 1.0, 0.1
    if leaf == "embed_tokens":
        return 0.0, 1.0
    gain = {"lm_head": 2.0, "q_proj": _QK_STD, "k_proj": _QK_STD}.get(leaf, 1.0)
    return 0.0, gain / float(np.sqrt(shape[1]))


def selection_bounds(
    pooled: np.ndarray, window: int, capacity: int, neighbors: int, rtol: float = 1e-5
) -> tuple[set[int], set[int]]:
    """Positions that every / that some order inside ties would keep (SEMANTICS, "How to compare").

    Pooling copies one value over a plateau; inside a tie group any order is right, and so is any
    order of the neighbours at -d and +d.
    """
    count = len(pooled)
    if capacity >= count:
        return set(range(count)), set(range(count))
    newest = set(range(count - window, count))
    offsets = np.arange(-((neighbors - 1) // 2), neighbors // 2 + 1)
    must, may = set(newest), set(newest)
    taken = 0
    for group in _tie_groups(pooled, rtol):
        spread = np.clip(group[:, None] + offsets, 0, count - 1)
        grown = may | set(spread.ravel().tolist())
        if taken + len(group) <= capacity and len(grown) <= capacity:
            must, may = set(grown), grown
        elif len(group) > 1:
            return must, grown
        else:
            return _by_distance(int(group[0]), offsets, may, capacity, count)
        taken += len(group)
        if taken >= capacity or len(may) >= capacity:
            break
    return must, may


def _tie_groups(pooled: np.ndarray, rtol: float) -> list[np.ndarray]:
    order = np.argsort(-pooled, kind="stable")
    values = pooled[order]
    breaks = np.nonzero(values[:-1] - values[1:] > rtol * np.abs(values[:-1]))[0] + 1
    return np.split(order, breaks)


def _by_distance(
    centre: int, offsets: np.ndarray, taken: set[int], capacity: int, count: int
) -> tuple[set[int], set[int]]:
    must = set(taken)
    for distance in np.unique(np.abs(offsets)):
        ring = offsets[np.abs(offsets) == distance]
        grown = must | {int(np.clip(centre + o, 0, count - 1)) for o in ring}
        if len(grown) > capacity:
            return must, grown
        must = grown
    return must, must

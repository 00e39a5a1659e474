"""Whether bfloat16 pays on this processor: seconds and bytes of a model's weights in either type.

Random models of several sizes read a prompt and go on token by token, in float32 and in bfloat16,
repeats interleaved. Prints what the processor can do and a Markdown table of medians; the last
column says what `dtype="auto"` takes for a checkpoint of such a size that is stored in bfloat16.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from statistics import median

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from draftsieve.core.models.devices import auto_dtype, multiplies_bfloat16
from draftsieve.core.models.footprint import footprint

TYPES = (torch.float32, torch.bfloat16)
# hidden size x layers; the last two have about the shapes of SmolLM2-135M and of Qwen3-0.6B
SIZES = ((256, 8), (384, 16), (576, 30), (1024, 28))


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table."""
    options = _options(argv)
    able = multiplies_bfloat16()
    print(
        f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads, "
        f"bfloat16 {'in' if able else 'not in'} hardware"
    )
    print("| parameters | tokens | float32 s | bfloat16 s | ratio | float32 ms a token |", end="")
    print(" bfloat16 ms a token | ratio | float32 MB | bfloat16 MB | auto |")
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for hidden, layers in options.sizes:
        models = {dtype: build(hidden, layers, dtype) for dtype in TYPES}
        parameters = models[torch.float32].num_parameters()
        megabytes = [f"{footprint(model) / 1e6:.0f}" for model in models.values()]
        choice = auto_dtype(torch.bfloat16, parameters) if able else torch.float32
        for tokens in options.lengths:
            reading, going = measure(models, tokens, options.repeats)
            cells = [f"{parameters / 1e6:.0f} M", str(tokens)]
            for times, unit in ((reading, 1.0), (going, 1000.0)):
                plain, half = (median(times[dtype]) * unit for dtype in TYPES)
                cells += [f"{plain:.3g}", f"{half:.3g}", f"{plain / half:.2f}"]
            print("|", " | ".join([*cells, *megabytes, str(choice).removeprefix("torch.")]), "|")
    return 0


def build(hidden: int, layers: int, dtype: torch.dtype) -> PreTrainedModel:
    """A random Llama; the same weights in both types, up to rounding."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3 // 64 * 64,
        num_hidden_layers=layers,
        num_attention_heads=max(1, hidden // 64),
        num_key_value_heads=max(1, hidden // 192),
        vocab_size=49_152 if hidden > 256 else 4096,
        tie_word_embeddings=True,
        max_position_embeddings=8192,
    )
    return LlamaForCausalLM(config).eval().to(dtype)


def measure(
    models: dict[torch.dtype, PreTrainedModel], tokens: int, repeats: int, steps: int = 8
) -> tuple[dict[torch.dtype, list[float]], dict[torch.dtype, list[float]]]:
    """Seconds of reading a prompt, and of a token behind it, by type; one round more warms up."""
    reading: dict[torch.dtype, list[float]] = {dtype: [] for dtype in models}
    going: dict[torch.dtype, list[float]] = {dtype: [] for dtype in models}
    ids = torch.randint(3, 4000, (1, tokens), generator=torch.Generator().manual_seed(0))
    for _ in range(repeats + 1):
        for dtype, model in models.items():
            cache = DynamicCache(config=model.config)
            with torch.no_grad():
                began = time.perf_counter()
                model(ids, past_key_values=cache, logits_to_keep=1)
                read = time.perf_counter()
                for _ in range(steps):
                    model(ids[:, :1], past_key_values=cache)
            reading[dtype].append(read - began)
            going[dtype].append((time.perf_counter() - read) / steps)
    for times in (*reading.values(), *going.values()):
        del times[0]
    return reading, going


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 1024], help="tokens")
    parser.add_argument(
        "--sizes", type=_size, nargs="+", default=SIZES, metavar="HIDDENxLAYERS", help="of models"
    )
    parser.add_argument("--repeats", type=int, default=5)
    return parser.parse_args(argv)


def _size(text: str) -> tuple[int, int]:
    hidden, layers = text.split("x")
    return int(hidden), int(layers)


if __name__ == "__main__":
    raise SystemExit(main())

"""What eviction saves: KV bytes while the prompt is read and after, and decoding time.

Runs full and evicted caches in one go, repeats interleaved, on a random model of a chosen shape
(the default has 8 layers, 16 heads, 8 KV heads, about 110M parameters). Bytes are exact tensor
sizes; tensors other than keys and values are not counted, but on CUDA a column has what the
allocator saw of everything besides the weights in prefill. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from draftsieve import Generation, SpecKV
from draftsieve.core.generation.decode import next_tokens
from draftsieve.core.kv_cache.layers import EvictedLayer, cache_bytes
from draftsieve.core.kv_cache.prefill import Start, pad_left
from draftsieve.core.speckv.evict import evict


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table."""
    options = _options(argv)
    model = build(options)
    size = model.num_parameters() / 1e6
    print(f"{size:.0f}M random parameters, {torch.get_num_threads()} threads")
    cuda = "| allocated peak in prefill " if options.device.startswith("cuda") else ""
    print(
        f"| N | C | batch | KV after | KV peak in prefill {cuda}| decode ms/token | full | ratio |"
    )
    print("|---" * (9 if cuda else 8) + "|")
    for length in options.lengths:
        for share in options.shares:
            for batch in options.batches:
                print(row(model, length, length // share, batch, options), flush=True)
    return 0


def build(options: argparse.Namespace) -> PreTrainedModel:
    """A random Llama that never ends an answer by itself."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=options.hidden,
        intermediate_size=options.hidden * 3,
        num_hidden_layers=options.layers,
        num_attention_heads=16,
        num_key_value_heads=8,
        max_position_embeddings=32768,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config).eval().to(options.device)
    return model.to(torch.float32 if options.device == "cpu" else torch.bfloat16)


def row(
    model: PreTrainedModel, length: int, capacity: int, batch: int, options: argparse.Namespace
) -> str:
    """One line: the same prompts with a full and with an evicted cache."""
    prompts = list(torch.randint(0, 4096, (batch, length)))
    guesses = list(torch.randint(0, 4096, (batch, options.lookahead)))
    times: dict[str, list[float]] = {"full": [], "evicted": []}
    sizes: dict[str, int] = {}
    peaks: dict[str, int] = {}
    allocated: dict[str, int] = {}
    for _ in range(options.repeats):
        for name in times:
            before = _reset_peak(options.device)
            if name == "full":
                start = read(model, prompts)
                peaks[name] = cache_bytes(start.cache)
            else:
                with recorded_peak() as peak:
                    start = evict(model, prompts, guesses, SpecKV(), [capacity] * batch).start
                peaks[name] = peak.most
            if before is not None:
                allocated[name] = torch.cuda.max_memory_allocated() - before
            sizes[name] = cache_bytes(start.cache)
            times[name].append(decode(model, prompts, start, options.new_tokens))
            del start  # not to be counted with the next one
    full, evicted = median(times["full"]), median(times["evicted"])
    spread = (max(times["evicted"]) - min(times["evicted"])) / evicted
    device = f"| {_mb(allocated['evicted'])} of {_mb(allocated['full'])} " if allocated else ""
    return (
        f"| {length} | {capacity} | {batch} | {_mb(sizes['evicted'])} of {_mb(sizes['full'])} "
        f"| {_mb(peaks['evicted'])} of {_mb(peaks['full'])} {device}"
        f"| {1000 * evicted:.1f} ± {50 * spread:.0f} % | {1000 * full:.1f} "
        f"| {full / evicted:.2f} |"
    )


def _reset_peak(device: str) -> int | None:
    """Bytes allocated now, from which on the allocator's peak counts; None but on CUDA."""
    if not device.startswith("cuda"):
        return None
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


@dataclass
class Peak:
    """Largest sum of what layers keep and the full keys and values of the layer at work."""

    kept: int = 0
    most: int = 0


@contextmanager
def recorded_peak() -> Iterator[Peak]:
    """Watch every layer's eviction; the layer's full tensors and its copies exist side by side."""
    peak, keep = Peak(), EvictedLayer.keep

    def watched(
        layer: EvictedLayer, keys: torch.Tensor, values: torch.Tensor, *rest: torch.Tensor | int
    ) -> None:
        keep(layer, keys, values, *rest)
        peak.kept += layer.keys.nbytes + layer.values.nbytes
        peak.most = max(peak.most, peak.kept + keys.nbytes + values.nbytes)

    EvictedLayer.keep = watched
    try:
        yield peak
    finally:
        EvictedLayer.keep = keep


def read(model: PreTrainedModel, prompts: list[torch.Tensor]) -> Start:
    """Prefill all but the last token into a full cache."""
    ids, mask = pad_left(prompts, model.device)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model.get_decoder()(input_ids=ids[:, :-1], past_key_values=cache, use_cache=True)
    positions = torch.full((len(prompts), 1), ids.shape[1] - 1, device=model.device)
    return Start(cache, ids[:, -1:], mask, positions)


def decode(model: PreTrainedModel, prompts: list[torch.Tensor], start: Start, count: int) -> float:
    """Seconds per step."""
    steps = next_tokens(model, prompts, Generation(max_new_tokens=count + 1), start)
    next(steps)
    began = time.perf_counter()
    for _ in range(count):
        next(steps)
    return (time.perf_counter() - began) / count


def _mb(size: int) -> str:
    return f"{size / 1e6:.1f} MB"


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096, 8192])
    parser.add_argument("--shares", type=int, nargs="+", default=[4, 8, 16], help="C = N / share")
    parser.add_argument("--batches", type=int, nargs="+", default=[1])
    parser.add_argument("--lookahead", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quick", action="store_true", help="a smoke test: small and once")
    options = parser.parse_args(argv)
    if options.quick:
        options.lengths, options.shares, options.batches = [256], [4], [1, 2]
        options.new_tokens, options.lookahead, options.repeats = 2, 4, 1
        options.hidden, options.layers = 128, 2
    return options


if __name__ == "__main__":
    raise SystemExit(main())

"""From which length vertical-slash sparse prefill pays.

Reads prompts with SpecKV dense and sparse in one go, repeats interleaved, on a random model of a
chosen shape and on the bundled target (whose positions were not trained that far: its times count,
its answers would not). The sparse side is forced, also where the automatic rule of
`core/speckv/sparse_prefill.py` would read dense; the last column says what the rule would do.
Prints a Markdown table of medians and half spreads, and for each model and pair of sizes the length
from which sparse was faster. On CUDA FlexAttention is compared too, on one layer's attention alone.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from statistics import median

import torch
from sparse_flex import flex_sparse_attention
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from draftsieve import SpecKV
from draftsieve.core.models.loading import load_model
from draftsieve.core.speckv import sparse_prefill
from draftsieve.core.speckv.evict import evict
from draftsieve.core.speckv.sparse_prefill import is_worth, sparse_attention


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table."""
    options = _options(argv)
    print(f"{options.device}, {options.dtype}, {torch.get_num_threads()} threads")
    print("| model | N | vertical | window | dense s | sparse s | dense / sparse | automatic |")
    print("|---|---|---|---|---|---|---|---|")
    faster: dict[tuple[str, int, int], list[tuple[int, float]]] = {}
    for name in options.models:
        model = build(options) if name == "random" else bundled(options)
        for vertical, window in options.sizes:
            for length in options.lengths:
                if length <= vertical + window:
                    continue
                ratio = row(name, model, length, vertical, window, options)
                faster.setdefault((name, vertical, window), []).append((length, ratio))
    for (name, vertical, window), ratios in faster.items():
        print(f"{name}, vertical {vertical}, window {window}: {verdict(ratios)}")
    if options.device == "cuda":
        compare_flex(options)
    return 0


def build(options: argparse.Namespace) -> PreTrainedModel:
    """A random Llama."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=options.hidden,
        intermediate_size=options.hidden * 3,
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        num_key_value_heads=options.kv_heads,
        max_position_embeddings=131072,
        bos_token_id=None,
        eos_token_id=None,
    )
    dtype = getattr(torch, options.dtype)
    return LlamaForCausalLM(config).eval().to(options.device, dtype)


def bundled(options: argparse.Namespace) -> PreTrainedModel:
    """The target that comes with the package."""
    return load_model("builtin:target", device=options.device, dtype=options.dtype).model


def row(
    name: str,
    model: PreTrainedModel,
    length: int,
    vertical: int,
    window: int,
    options: argparse.Namespace,
) -> float:
    """Print one line; returns dense seconds over sparse seconds."""
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(4, 4096, (length + options.lookahead,), generator=generator)
    prompt, guess = ids[:length], ids[length:]
    sizes = {"prefill_vertical_size": vertical, "prefill_window_size": window}
    methods = {"dense": SpecKV(), "sparse": SpecKV.model_validate(sizes)}

    def read(method: SpecKV) -> None:
        evict(model, [prompt], [guess], method, [min(512, length // 2)])

    with forced():
        calls = {side: _bind(read, method) for side, method in methods.items()}
        times = interleaved(calls, options)
    dense, sparse = median(times["dense"]), median(times["sparse"])
    rule = is_worth(length + options.lookahead, vertical, window, options.device)
    print(
        f"| {name} | {length} | {vertical} | {window} | {_seconds(times['dense'])} "
        f"| {_seconds(times['sparse'])} | {dense / sparse:.2f} | {'sparse' if rule else 'dense'} |",
        flush=True,
    )
    return dense / sparse


def _bind(call: Callable[[SpecKV], None], method: SpecKV) -> Callable[[], None]:
    return lambda: call(method)


@contextmanager
def forced() -> Iterator[None]:
    """Read sparsely even where it costs."""
    before = sparse_prefill.SHORTEST, sparse_prefill.WORTH
    sparse_prefill.SHORTEST = dict.fromkeys(before[0], 0)
    sparse_prefill.WORTH = float("inf")
    try:
        yield
    finally:
        sparse_prefill.SHORTEST, sparse_prefill.WORTH = before


def interleaved(
    calls: dict[str, Callable[[], None]], options: argparse.Namespace
) -> dict[str, list[float]]:
    """Seconds of each call, one warm-up each, then in turn."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(options.repeats + 1):
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            if options.device == "cuda":
                torch.cuda.synchronize()
            if repeat > 0:
                times[name].append(time.perf_counter() - began)
    return times


def verdict(ratios: Sequence[tuple[int, float]]) -> str:
    """The shortest length from which sparse was faster at every length tried."""
    pays = None
    for length, ratio in reversed(ratios):
        if ratio <= 1.0:
            break
        pays = length
    return f"pays from {pays} tokens" if pays is not None else "does not pay at these lengths"


def compare_flex(options: argparse.Namespace) -> None:
    """One layer's attention: gathered columns against FlexAttention (both checked to agree)."""
    print("| N | vertical | window | gathered s | flex s | gathered / flex |")
    print("|---|---|---|---|---|---|")
    dim = options.hidden // options.heads
    for vertical, window in options.sizes:
        for length in options.lengths:
            if length <= vertical + window:
                continue
            torch.manual_seed(length)
            query, key, value = (
                torch.randn(heads, length, dim, device="cuda", dtype=getattr(torch, options.dtype))
                for heads in (options.heads, options.kv_heads, options.kv_heads)
            )
            columns = torch.rand(options.kv_heads, length, device="cuda").topk(vertical).indices
            args = query, key, value, columns.sort(-1).values, window, dim**-0.5
            torch.testing.assert_close(
                sparse_attention(*args), flex_sparse_attention(*args), rtol=2e-2, atol=3e-2
            )
            calls = {
                "gathered": _bind_args(sparse_attention, args),
                "flex": _bind_args(flex_sparse_attention, args),
            }
            times = interleaved(calls, options)
            gain = median(times["gathered"]) / median(times["flex"])
            print(
                f"| {length} | {vertical} | {window} | {_seconds(times['gathered'])} "
                f"| {_seconds(times['flex'])} | {gain:.2f} |",
                flush=True,
            )


def _bind_args(call: Callable[..., object], args: tuple[object, ...]) -> Callable[[], None]:
    def run() -> None:
        call(*args)

    return run


def _seconds(times: Sequence[float]) -> str:
    """Median and half the spread between the slowest and the fastest, in percent."""
    middle = median(times)
    return f"{middle:.3f} ± {50 * (max(times) - min(times)) / middle:.0f} %"


def _pair(text: str) -> tuple[int, int]:
    vertical, window = text.split(":")
    return int(vertical), int(window)


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 4096, 8192, 16384])
    parser.add_argument(
        "--sizes",
        type=_pair,
        nargs="+",
        default=[(512, 256), (1024, 512), (2048, 2048)],
        metavar="VERTICAL:WINDOW",
    )
    parser.add_argument("--models", nargs="+", choices=["random", "builtin"], default=None)
    parser.add_argument("--lookahead", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quick", action="store_true", help="two short lengths, three repeats")
    options = parser.parse_args(argv)
    options.models = options.models or ["random", "builtin"]
    if options.quick:
        options.lengths, options.sizes, options.repeats = [256, 512], [(64, 64)], 3
        options.hidden, options.heads, options.kv_heads = 128, 4, 2
    return options


if __name__ == "__main__":
    raise SystemExit(main())

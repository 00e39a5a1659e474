"""What a draft's reading takes, beside a plain forward pass of the same model in float32.

    python examples/benchmarks/draft_reading.py --draft smollm2-135m --tokens 1800

Passages of about 110 tokens are made of words without meaning; only time is measured here. Ways
take turns, so that what else the machine does falls on all of them; ratios are of medians, with
the quartiles of each way's seconds.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable

import torch

from draftsieve import Compressor, Prompt, Quantization, SpecPC
from draftsieve.core.prompt.encoder import PromptTokens
from draftsieve.core.specpc.head_weights import settled

WORDS = ["river", "water", "mill", "bridge", "stone", "cold", "old", "grey", "past", "under"]
INT8 = Quantization(bits=8, backend="torch")
HEADS = SpecPC.preset("2026-12", semantic_weight=0.0)
WAYS = {
    "paper's rule": SpecPC(),
    "preset 2026-11": SpecPC.preset("2026-11"),
    "few heads, together": HEADS.model_copy(
        update={"passages_apart": False, "likelihood_weight": 0.0}
    ),
    "few heads, apart": HEADS.model_copy(update={"likelihood_weight": 0.0}),
    "preset 2026-12": HEADS,
}


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draft", default="smollm2-135m")
    parser.add_argument("--tokens", type=int, default=1800)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    plain = Compressor.load(options.draft, dtype="float32", device="cpu", progress=False)
    small = Compressor.load(
        options.draft, dtype="float32", device="cpu", quantization=INT8, progress=False
    )
    prompt = make_prompt(plain, options.tokens)
    tokens = plain.encoder.encode(prompt)
    runs: dict[str, Callable[[], object]] = {"plain forward pass": lambda: forward(plain, tokens)}
    for name, method in WAYS.items():
        runs[name] = reading(plain, tokens, method)
    for name in ("few heads, apart", "preset 2026-12"):
        runs[f"{name}, int8"] = reading(small, tokens, WAYS[name])
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(options.repeats + 1):
        for name, run in runs.items():
            began = time.perf_counter()
            run()
            if number:  # the first round warms up
                seconds[name].append(time.perf_counter() - began)
    whole = statistics.median(seconds["plain forward pass"])
    print(f"{len(tokens)} tokens, {options.threads} threads, {options.repeats} repeats")
    print(f"{'way':28} {'median s':>9} {'quartiles':>15} {'ratio':>6}")
    for name, found in seconds.items():
        low, middle, high = statistics.quantiles(found, n=4)
        print(f"{name:28} {middle:9.2f} {low:7.2f} {high:7.2f} {middle / whole:6.2f}")


def forward(compressor: Compressor, tokens: PromptTokens) -> torch.Tensor:
    """What transformers computes for a prompt: all layers, logits of the last token."""
    with torch.no_grad():
        found: torch.Tensor = compressor.model(
            input_ids=tokens.ids.unsqueeze(0), use_cache=False, logits_to_keep=1
        ).logits
    return found


def reading(compressor: Compressor, tokens: PromptTokens, method: SpecPC) -> Callable[[], object]:
    """The draft's part of a compression."""
    method = settled(method, compressor.model)
    return lambda: compressor.draft.read([tokens], method, [method.lookahead_tokens or 1])


def make_prompt(compressor: Compressor, tokens: int) -> Prompt:
    """A question over so many tokens of passages."""
    rng = random.Random(0)
    passages: list[str] = []
    while sum(map(compressor.count_tokens, passages)) < tokens:
        sentences = (" ".join(rng.choices(WORDS, k=14)).capitalize() + "." for _ in range(7))
        passages.append(" ".join(sentences))
    return Prompt.from_question("What does the river carry past the mill?", passages)


if __name__ == "__main__":
    main()

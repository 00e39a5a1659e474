"""Decoding and serving with a full and with an evicted cache, at several batch sizes, in one run.

Whole requests go through `Engine.answer_many`: the draft's guess and the target's reading count for
requests a second, and every batch decodes the same number of tokens with both caches. "Decode" is
the time of one step, which gives each row of the batch a token. Runs with full and evicted caches
alternate, so that a busy moment of the machine hits both; cells are medians with the fastest and
slowest run; a single request goes before each row's runs, unmeasured. The bundled pair is small and
its prompts short; random weights have the shape of a usual pair: "random" (about 5M and 100M
parameters in float32 by default) and "large" (about 320M in bfloat16), with prompts of any length.
Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import torch
from compression_cost import Text, python_reference, take
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from draftsieve import Answer, Engine, Generation, SpecKV
from draftsieve.core.models.devices import pick_device


@dataclass(frozen=True, slots=True)
class Run:
    """One timed batch."""

    seconds: float
    answers: tuple[Answer, ...]

    @property
    def step(self) -> float:
        """Milliseconds of a decoding step; the first token belongs to the reading."""
        first = self.answers[0]
        return 1000 * first.timings["decode"] / max(1, first.usage.completion_tokens - 1)

    @property
    def rate(self) -> float:
        """Requests a second."""
        return len(self.answers) / self.seconds


def main(argv: Sequence[str] | None = None) -> int:
    """Time all pairs, lengths and batches, and print the table."""
    options = _options(argv)
    text = python_reference()
    bundled = Engine.load("builtin:target", "builtin:draft", device=options.device, progress=False)
    assert bundled.tokenizer is not None  # `load` always brings one
    assert bundled.draft is not None
    for model in (bundled.target, bundled.draft):  # both caches decode as many tokens
        model.generation_config.eos_token_id = None
    print(f"{options.device}, {torch.get_num_threads()} threads, {options.new_tokens} new tokens,")
    print(f"scorer {options.scorer}, {options.lookahead} tokens of lookahead, keeping 1 of every")
    print(f"{options.share} passage tokens, {options.repeats} alternating repeats.\n")
    print(
        "| pair | prompt | kept | batch | KV a row | decode ms a step: full | evicted | gain |"
        " requests/s: full | evicted | gain |"
    )
    print("|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|")
    for name in options.pairs:
        engine, lengths = bundled, options.lengths
        if name == "random":
            engine, lengths = random_pair(bundled.tokenizer, options), options.random_lengths
        elif name == "large":
            shape = argparse.Namespace(**vars(options))
            shape.hidden, shape.layers = options.large_hidden, options.large_layers
            engine = random_pair(bundled.tokenizer, shape, torch.bfloat16)
            lengths = options.large_lengths
        label = f"{name} {engine.target.num_parameters() / 1e6:.0f}M"
        for length in lengths:
            for batch in options.batches:
                print(row(label, engine, text, length, batch, options), flush=True)
    return 0


def random_pair(
    tokenizer: PreTrainedTokenizerBase,
    options: argparse.Namespace,
    dtype: torch.dtype | None = None,
) -> Engine:
    """A draft and a target that never end an answer; what they say means nothing."""
    torch.manual_seed(0)
    kind = dtype or (torch.float32 if options.device == "cpu" else torch.bfloat16)
    draft, target = (
        LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=hidden,
                intermediate_size=hidden * 3,
                num_hidden_layers=layers,
                num_attention_heads=hidden // 64,
                num_key_value_heads=max(1, hidden // 128),
                max_position_embeddings=65536,
                tie_word_embeddings=True,
                bos_token_id=None,
                eos_token_id=None,
            )
        ).to(options.device, kind)
        for hidden, layers in ((options.hidden * 3 // 8, 4), (options.hidden, options.layers))
    )
    return Engine(target, tokenizer, draft_model=draft, name="random", progress=False)


def row(
    name: str,
    engine: Engine,
    text: Text,
    length: int,
    batch: int,
    options: argparse.Namespace,
) -> str:
    """One line: the same requests with a full and with an evicted cache."""
    questions = [text.questions[place] for place in range(batch)]
    contexts = [
        take(_from(text.paragraphs, place), length, engine.count_tokens) for place in range(batch)
    ]
    method = SpecKV(
        ratio=1 / options.share, scorer=options.scorer, lookahead_tokens=options.lookahead
    )
    full: list[Run] = []
    evicted: list[Run] = []
    for chosen in (None, method):  # warms up
        timed(engine, questions[:1], contexts[:1], chosen, options)
    for _ in range(options.repeats):
        for runs, chosen in ((full, None), (evicted, method)):
            runs.append(timed(engine, questions, contexts, chosen, options))
    usage = evicted[0].answers[0].usage
    entries = usage.cache_entries or usage.prompt_tokens
    kept = evicted[0].answers[0].cache_bytes or 0
    whole = usage.prompt_tokens * entry_bytes(engine.target)
    cells = [
        name,
        f"{usage.prompt_tokens:,}",
        f"{entries:,}",
        str(batch),
        f"{kept / 1e6:.1f} of {whole / 1e6:.1f} MB",
        _spread([run.step for run in full]),
        _spread([run.step for run in evicted]),
        _gain([run.step for run in full], [run.step for run in evicted]),
        _spread([run.rate for run in full]),
        _spread([run.rate for run in evicted]),
        _gain([run.rate for run in evicted], [run.rate for run in full]),
    ]
    return f"| {' | '.join(cells)} |"


def timed(
    engine: Engine,
    questions: Sequence[str],
    contexts: Sequence[Sequence[str]],
    method: SpecKV | None,
    options: argparse.Namespace,
) -> Run:
    """Answer a batch once."""
    generation = Generation(max_new_tokens=options.new_tokens)
    began = time.perf_counter()
    answers = engine.answer_many(questions, contexts, method=method, generation=generation)
    return Run(time.perf_counter() - began, tuple(answers))


def entry_bytes(model: PreTrainedModel) -> int:
    """Bytes of one token's keys and values in all layers and heads."""
    config = model.config.get_text_config()
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    numbers = 2 * config.num_hidden_layers * config.num_key_value_heads * width
    return numbers * torch.finfo(model.dtype).bits // 8


def _from(paragraphs: Sequence[str], place: int) -> Sequence[str]:
    """The text from another paragraph on, so that the rows of a batch differ."""
    start = place % len(paragraphs)
    return [*paragraphs[start:], *paragraphs[:start]]


def _spread(values: Sequence[float]) -> str:
    return f"{median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def _gain(larger: Sequence[float], smaller: Sequence[float]) -> str:
    """Ratios of the runs that stood side by side."""
    ratios = sorted(first / second for first, second in zip(larger, smaller, strict=True))
    return f"{median(ratios):.2f}x ({ratios[0]:.2f} to {ratios[-1]:.2f})"


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    known = ["bundled", "random", "large"]
    parser.add_argument("--pairs", nargs="+", choices=known, default=known[:2])
    parser.add_argument("--lengths", type=int, nargs="+", default=[1500], help="bundled pair")
    parser.add_argument("--random-lengths", type=int, nargs="+", default=[2048])
    parser.add_argument("--large-lengths", type=int, nargs="+", default=[1024])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--share", type=int, default=8, help="keep 1 of so many passage tokens")
    parser.add_argument("--scorer", default="speckv", help="snapkv and others need no draft")
    parser.add_argument("--lookahead", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--layers", type=int, default=14)
    parser.add_argument("--large-hidden", type=int, default=1024)
    parser.add_argument("--large-layers", type=int, default=24)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--quick", action="store_true", help="a smoke test: small and once")
    options = parser.parse_args(argv)
    options.device = pick_device(options.device)
    if options.quick:
        options.lengths, options.random_lengths, options.batches = [300], [300], [1, 2]
        options.new_tokens, options.lookahead, options.repeats = 4, 2, 1
        options.hidden, options.layers = 256, 2
        options.large_lengths, options.large_hidden, options.large_layers = [300], 256, 2
    return options


if __name__ == "__main__":
    raise SystemExit(main())

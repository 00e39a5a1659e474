"""What a pass costs a model of 0.3 to 1B parameters, what drafting takes beside it, store sizes."""

from __future__ import annotations

import argparse
import time
from statistics import median

import torch
from drafting_cases import handbook_store, make_cases
from drafting_ways import simulate
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from draftsieve import Engine
from draftsieve.core.generation.speculative.drafters.aded import AdedDrafter
from draftsieve.core.generation.speculative.drafters.lookup import LookupDrafter
from draftsieve.core.generation.speculative.drafters.store import TrigramStore
from draftsieve.core.generation.speculative.drafters.tree import Drafter, TokenTree, UnionDrafter
from draftsieve.core.generation.speculative.tree_attention import TreeReader
from draftsieve.core.kv_cache.prefill import from_scratch

SIZES = (0, 4, 8, 16, 32, 64)


def cost(engine: Engine, options: argparse.Namespace) -> None:
    """Print the three tables."""
    model = random_model(options.layers, options.device)
    seconds = pass_seconds(model, repeats=3 if options.device == "cpu" else 20)
    size, plain = model.num_parameters() / 1e6, median(seconds[0])
    print(f"| nodes, {size:.0f}M random parameters, bf16 | ms a pass | against plain |")
    print("|---|---:|---:|")
    for nodes, own in seconds.items():
        noise = f"({1000 * min(own):.1f} to {1000 * max(own):.1f})"
        print(f"| {nodes} | {1000 * median(own):.1f} {noise} | {median(own) / plain:.2f} |")
    print("\n| drafter | us a pass | us a token | share of a plain pass |\n|---|---:|---:|---:|")
    for name, (a_pass, a_token) in draft_seconds(engine, options.items).items():
        print(f"| {name} | {1e6 * a_pass:.0f} | {1e6 * a_token:.0f} | {a_pass / plain:.2%} |")
    print("\n| store | pairs held | size | learnt in |\n|---|---:|---:|---:|")
    for pairs in (1 << 18, 1 << 20):
        print(_store_row(pairs, options.learnt))
    print(flush=True)


def random_model(layers: int, device: str) -> PreTrainedModel:
    """A Llama as wide as models of 0.3 to 0.6B parameters, in bfloat16."""
    config = LlamaConfig(
        vocab_size=16384,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=8,
        max_position_embeddings=8192,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).to(torch.bfloat16).eval().to(device)


def pass_seconds(model: PreTrainedModel, repeats: int) -> dict[int, list[float]]:
    """Seconds of passes behind 500 tokens by nodes, sizes taking turns."""
    start = from_scratch(model, [torch.randint(0, 4096, (500,))])
    with torch.no_grad():
        model(input_ids=start.feed, past_key_values=start.cache, use_cache=True, logits_to_keep=1)
    reader = TreeReader(model, start.cache, start.mask)
    seconds: dict[int, list[float]] = {size: [] for size in SIZES}
    for repeat in range(repeats + 1):  # the first one warms up
        for nodes, own in seconds.items():
            tree = TokenTree.from_paths([[n, n + 1, n + 2, n + 3] for n in range(16)], nodes)
            began = time.perf_counter()
            reader.read([5, *tree.tokens], [-1, *(parent + 1 for parent in tree.parents)])
            if model.device.type == "cuda":
                torch.cuda.synchronize()
            if repeat:
                own.append(time.perf_counter() - began)
            reader.keep([0])
    return seconds


def draft_seconds(engine: Engine, items: int) -> dict[str, tuple[float, float]]:
    """Median seconds a pass and a token of the drafters without a model, on reference answers."""
    store, spent = handbook_store(engine), dict[str, list[tuple[float, float]]]()
    for case in make_cases(engine, items):
        prompt = case.ids.tolist()
        cheap = [LookupDrafter(prompt), AdedDrafter(store, prompt, search="best_first")]
        drafters: dict[str, Drafter] = {
            "lookup": LookupDrafter(prompt),
            "aded (puct)": AdedDrafter(store, prompt),
            "aded (best first)": AdedDrafter(store, prompt, search="best_first"),
            "lookup and aded, as in auto": UnionDrafter(cheap),
        }
        for name, drafter in drafters.items():
            tally = simulate(drafter, case)
            each = (tally.seconds / tally.forwards, tally.seconds / tally.tokens)
            spent.setdefault(name, []).append(each)
    return {
        name: (median(own[0] for own in rows), median(own[1] for own in rows))
        for name, rows in spent.items()
    }


def _store_row(pairs: int, tokens: int) -> str:
    """A store that has learnt random tokens, as frequent as words of a text (Zipf)."""
    frequent = 1.0 / torch.arange(1, 16385)
    chance = torch.Generator().manual_seed(0)
    text = torch.multinomial(frequent, tokens, True, generator=chance).tolist()
    store, began = TrigramStore(pairs), time.perf_counter()
    store.learn(text)
    seconds = time.perf_counter() - began
    return (
        f"| room for {pairs:,} pairs, {tokens:,} tokens learnt | {len(store):,} "
        f"| {store.bytes / 1e6:.0f} MB "
        f"| {seconds:.1f} s |"
    )

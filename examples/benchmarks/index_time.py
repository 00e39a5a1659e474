"""What it takes to read passages when they are indexed, and what a question takes then.

    python examples/benchmarks/index_time.py --draft smollm2-135m --embedder FOLDER
    python examples/benchmarks/index_time.py --draft builtin:draft --tokens 1000 2000
    python examples/benchmarks/index_time.py --only scale --passages 100000

Passages of about 110 tokens are made of words without meaning; only time and bytes are measured
here, answers kept are measured by `draftsieve eval`. Ways take turns, so that what else the machine
does falls on all of them; seconds are medians, with quartiles. "scale" fills a store with made-up
numbers in place of what a draft has read, asks about passages of it, and lets several processes
read while one writes.
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from draftsieve import Compressor, PassageStore, SpecPC
from draftsieve.core.models.embedder import cosines, load_embedder
from draftsieve.core.specpc.bm25 import bm25
from draftsieve.core.specpc.stored.indexing import digest
from draftsieve.core.specpc.units import unit_spans
from draftsieve.core.store.entries import Entry

QUESTION = "What does the river carry past the old mill before the bridge is reached?"
STORES: dict[str, dict[str, Any]] = {
    "int8": {"codec": "int8"},
    "int4": {"codec": "int4"},
    "int8, upper layers": {"codec": "int8", "first_layer": "middle"},
    "int4, upper layers": {"codec": "int4", "first_layer": "middle"},
    "int8, all layers": {"codec": "int8", "layers": "all"},
    "keys": {"tier": "keys", "codec": "int8"},
}
WORDS = ["river", "water", "mill", "bridge", "stone", "cold", "old", "grey", "past", "under"]


def main() -> None:
    """Measure and print tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draft", default="smollm2-135m")
    parser.add_argument("--embedder", help="folder of a sentence encoder, such as all-MiniLM-L6-v2")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1000, 1900, 4000, 8000])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--passages", type=int, default=100_000, help="of the filled store")
    parser.add_argument("--only", nargs="+", choices=["build", "question", "scale"])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    draft = Compressor.load(options.draft, dtype="float32", device="cpu", progress=False)
    print(f"{options.draft}, float32, {options.threads} threads, {options.repeats} repeats")
    with tempfile.TemporaryDirectory() as folder:
        for name, part in {"build": build, "question": question, "scale": scale}.items():
            if not options.only or name in options.only:
                part(draft, options, Path(folder) / name)


def build(draft: Compressor, options: argparse.Namespace, folder: Path) -> None:
    """Tokens a second while indexing, beside plain forward passes over the same passages."""
    texts = passages(draft, 10_000)
    tokens = sum(map(draft.count_tokens, texts))
    began = time.perf_counter()
    for text in texts:
        with torch.no_grad():
            ids = torch.tensor([draft.encoder.encode_text(text)])
            draft.model(input_ids=ids, use_cache=False, logits_to_keep=1)
    plain = tokens / (time.perf_counter() - began)
    print(f"\nindexing {len(texts)} passages of {tokens:,} tokens; plain forward passes, one for")
    print(f"each passage: {plain:,.0f} tokens a second\n")
    print(f"{'store':22} {'tokens/s':>9} {'of plain':>9} {'bytes a token':>14}")
    for name, own in STORES.items():
        if (store := opened(draft, folder / name, own, None)) is None:
            continue
        began = time.perf_counter()
        store.add(texts)
        rate, stats = tokens / (time.perf_counter() - began), store.stats()
        print(f"{name:22} {rate:9,.0f} {rate / plain:9.2f} {stats.bytes / stats.rows:14,.0f}")
        store.close()


def question(draft: Compressor, options: argparse.Namespace, folder: Path) -> None:
    """Seconds from a question and its passages to the shorter passages, a quarter of the tokens."""
    newest = SpecPC.preset("2026-12", semantic_weight=0.0, ratio=0.25)
    few = newest.model_copy(update={"likelihood_passages": 8})
    for size in options.tokens:
        texts = passages(draft, size)
        now: dict[str, Callable[[], object]] = {
            "reading now": lambda t=texts: draft.compress(QUESTION, t, newest),
            "reading now, heads alone": lambda t=texts: draft.compress(
                QUESTION, t, newest.model_copy(update={"likelihood_weight": 0.0})
            ),
            "BM25": lambda t=texts: bm25(QUESTION, sentences(t)),
        }
        for name, own in STORES.items():
            store = opened(draft, folder / f"{size} {name}", own, options.embedder)
            if store is None:
                continue
            store.add(texts)
            reader = Compressor(draft.model, draft.tokenizer, store=store, progress=False)
            method = few if own.get("layers") else newest
            now[f"store, {name}"] = lambda r=reader, t=texts, m=method: r.compress(QUESTION, t, m)
            if options.embedder and name in ("int8", "int8, upper layers", "keys"):
                both = SpecPC.preset("2026-12", ratio=0.25, embedder=store.vectors.embedder)
                now[f"store, {name}, vectors"] = lambda r=reader, t=texts, m=both: r.compress(
                    fresh_question(), t, m
                )
        if options.embedder:
            encoder = load_embedder(options.embedder)
            now["MiniLM, sentences known"] = lambda t=texts, e=encoder: cosines(
                e, fresh_question(), sentences(t)
            )
            now["MiniLM, reading now"] = lambda t=texts, e=encoder: e.embed_documents(sentences(t))
        show(now, options.repeats, sum(map(draft.count_tokens, texts)), len(texts))


def fresh_question() -> str:
    """A question that nobody has embedded yet."""
    return f"{QUESTION} Or {random.random()}?"


def show(ways: dict[str, Callable[[], object]], repeats: int, tokens: int, count: int) -> None:
    """Run ways in turns, and print their medians."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(repeats + 1):
        for name, run in ways.items():
            began = time.perf_counter()
            run()
            if number:  # the first round warms up
                seconds[name].append(time.perf_counter() - began)
    whole = statistics.median(seconds["reading now"])
    print(f"\na question over {count} passages of {tokens:,} tokens\n")
    print(f"{'way':30} {'median ms':>10} {'quartiles':>15} {'of reading now':>15}")
    for name, found in seconds.items():
        low, middle, high = statistics.quantiles(found, n=4)
        spread = f"{1000 * low:,.0f} {1000 * high:,.0f}"
        print(f"{name:30} {1000 * middle:10,.1f} {spread:>15} {middle / whole:15.3f}")


def scale(draft: Compressor, options: argparse.Namespace, folder: Path) -> None:
    """A store of many passages: open, look up, compress; then readers beside a writer."""
    store = opened(draft, folder, {"tier": "keys", "codec": "int8"}, None)
    if store is None:
        store = opened(draft, folder, {"codec": "int8"}, None)
    assert store is not None
    count, texts = options.passages, passages(draft, 1900)
    began = time.perf_counter()
    for first in range(0, count, 1000):
        store.shards.put(made_up(store, first, min(1000, count - first)))
    store.add(texts)
    filled, stats = time.perf_counter() - began, store.stats()
    store.close()
    print(
        f"\n{stats.entries:,} passages, {stats.rows:,} tokens, {stats.bytes / 1e9:.2f} GB, filled "
    )
    print(f"in {filled:.0f} s with made-up numbers")
    began = time.perf_counter()
    store = PassageStore.open(folder, draft)
    print(f"open: {1000 * (time.perf_counter() - began):.0f} ms")
    names = [[name(random.randrange(count)) for _ in range(20)] for _ in range(200)]
    took = []
    for some in names:
        began = time.perf_counter()
        assert len(store.shards.get(some)) == len(set(some))
        took.append(1000 * (time.perf_counter() - began))
    print(
        f"look up 20 passages: median {statistics.median(took):.2f} ms, slowest {max(took):.0f} ms"
    )
    reader = Compressor(draft.model, draft.tokenizer, store=store, progress=False)
    method = SpecPC.preset("2026-12", semantic_weight=0.0, ratio=0.25)
    took = []
    for _ in range(10):
        began = time.perf_counter()
        reader.compress(QUESTION, texts, method)
        took.append(1000 * (time.perf_counter() - began))
    print(f"compress {len(texts)} passages: median {statistics.median(took):.0f} ms")
    together(store, folder, count)


def together(store: PassageStore, folder: Path, count: int, readers: int = 8) -> None:
    """Processes that look up and check every number, beside one that adds, discards, compacts."""
    about = store.shards.made_with(folder)
    context = multiprocessing.get_context("spawn")
    found: Any = context.Queue()
    work = [
        context.Process(target=look_up, args=(folder, about, count, seed, found))
        for seed in range(readers)
    ]
    for process in work:
        process.start()
    began, added = time.perf_counter(), 0
    while any(process.is_alive() for process in work):
        added += store.shards.put(made_up(store, count + added, 200))
        store.shards.discard([name(count + added - 1)])
    seconds = time.perf_counter() - began
    rows = [found.get() for _ in work]
    for process in work:
        process.join()
    lookups, wrong = sum(row[0] for row in rows), sum(row[1] for row in rows)
    print(
        f"{readers} readers beside a writer, {seconds:.0f} s: {lookups:,} passages looked up, "
        f"{wrong} with wrong numbers; {added:,} passages added meanwhile"
    )


def look_up(folder: Path, about: dict[str, Any], count: int, seed: int, found: Any) -> None:
    """One reader: looks passages up for ten seconds, and compares what it gets."""
    from draftsieve.core.store.shards import Shards

    rng, lookups, wrong = random.Random(seed), 0, 0
    with Shards.open(folder, about) as shards:
        until = time.perf_counter() + 10
        while time.perf_counter() < until:
            numbers = [rng.randrange(count) for _ in range(20)]
            entries = shards.get([name(number) for number in numbers])
            lookups += len(entries)
            for number in numbers:
                entry = entries.get(name(number))
                first = next(iter(entry.tensors.values())) if entry is not None else None
                wrong += first is None or int(first.flatten()[0]) != number % 100
    found.put((lookups, wrong))


def made_up(store: PassageStore, first: int, count: int) -> Iterator[Entry]:
    """Entries of the store's form whose first number tells which they are."""
    entry = next(iter(store.read([f"{' '.join(WORDS)}. {first}"])))
    for number in range(first, first + count):
        tensors = {key: value.clone() for key, value in entry.tensors.items()}
        next(iter(sorted(tensors.items())))[1].flatten()[0] = number % 100
        yield Entry(name(number), entry.rows, tensors)


def name(number: int) -> str:
    """The key of a made-up passage."""
    return digest(f"made up {number}")


def opened(
    draft: Compressor, folder: Path, own: dict[str, Any], embedder: str | None
) -> PassageStore | None:
    """A new store; None where the draft has no weights of heads that the tier needs."""
    layers = draft.model.config.get_text_config().num_hidden_layers
    middle = {"first_layer": layers * 14 // 30} if own.get("first_layer") else {}
    try:
        return PassageStore.open(folder, draft, embedder=embedder, **{**own, **middle})
    except ValueError as error:
        print(f"{folder.name}: {error}")
        return None


def passages(draft: Compressor, tokens: int) -> list[str]:
    """Texts of so many tokens together, about 110 each."""
    rng, found, size = random.Random(0), [], 0
    while size < tokens:
        lines = (" ".join(rng.choices(WORDS, k=14)).capitalize() + "." for _ in range(7))
        found.append(" ".join(lines))
        size += draft.count_tokens(found[-1])
    return found


def sentences(texts: list[str]) -> list[str]:
    """Every sentence of the texts."""
    return [text[a:b] for text in texts for a, b in unit_spans(text, "sentence")]


if __name__ == "__main__":
    main()

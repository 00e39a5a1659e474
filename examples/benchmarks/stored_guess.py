"""What reading passages apart does to the draft's guess, and known repairs of it.

    python examples/benchmarks/stored_guess.py --data FOLDER --out guesses.jsonl --questions 36

The draft answers each question from its passages read together and from a store, greedily; the
first questions are also answered by a target (the same model) whose cache SpecKV evicts behind the
guesses. Repairs, for models with plain rotary embeddings: passages stand behind each other, their
stored keys turned by the difference of positions; the first tokens of every passage are read again
with sight of everything before (arXiv 2410.15332). What has been measured is not measured again.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from draftsieve import SpecKV
from draftsieve.core.evaluation.intervals import bootstrap_mean, paired_difference
from draftsieve.core.evaluation.likelihood import divergence, read_answer
from draftsieve.core.evaluation.metrics import score_answer, word_f1
from draftsieve.core.evaluation.realtext.suites import real_suite
from draftsieve.core.evaluation.shared import Bench, Case
from draftsieve.core.evaluation.stored import prepare
from draftsieve.core.kv_cache.greedy import greedy
from draftsieve.core.kv_cache.layers import StoppableCache, full_states
from draftsieve.core.kv_cache.prefill import Start, read_prompts
from draftsieve.core.models.loading import load_model
from draftsieve.core.prompt.messages import DEFAULT_SYSTEM
from draftsieve.core.speckv.evict import evict, token_capacity
from draftsieve.core.specpc.stored.guessing import working_cache
from draftsieve.core.specpc.stored.indexing import digest
from draftsieve.core.specpc.stored.passage_store import PassageStore
from draftsieve.core.specpc.stored.reading import joined

INT8 = {"codec": "int8", "layers": "all"}
TOGETHER, STORED, MOVED = "together", "stored, int8", "moved"
METHOD = SpecKV(ratio=0.125)


def main() -> None:
    """Measure what is missing and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with the sets' files")
    parser.add_argument("--out", type=Path, required=True, help="what was measured, a line each")
    parser.add_argument("--draft", default="smollm2-135m")
    parser.add_argument("--contexts", default="bm25")
    parser.add_argument("--length", type=int, default=1000)
    parser.add_argument("--questions", type=int, default=36)
    parser.add_argument("--evicted", type=int, default=10, help="questions with a target")
    parser.add_argument("--tokens", type=int, default=32, help="of a guess")
    parser.add_argument("--seed", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=1e9, help="begin no question after them")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    ends = time.perf_counter() + 60 * options.minutes
    loaded = load_model(options.draft, dtype="float32", device="cpu")
    bench = Bench(loaded, loaded, max_new_tokens=options.tokens)
    suite = real_suite(
        options.data, ("nq",), contexts=(options.contexts,), questions=options.questions
    )
    counter, system = bench.draft.count_tokens, DEFAULT_SYSTEM
    items = list(suite.items(options.length, counter, seed=options.seed, system=system))
    lines = options.out.read_text(encoding="utf-8").splitlines() if options.out.is_file() else []
    found = {record["id"]: record for record in map(json.loads, lines)}
    for place, item in enumerate(items):
        if item.id in found or time.perf_counter() > ends:
            continue
        found[item.id] = measure(bench.open(item), options.tokens, place < options.evicted)
        with options.out.open("a", encoding="utf-8") as out:
            out.write(json.dumps(found[item.id]) + "\n")
        print(place + 1, item.id, flush=True)
    print("\n".join(tables([found[item.id] for item in items if item.id in found])))


def measure(case: Case, tokens: int, evicted: bool) -> dict[str, Any]:
    """Everything about one question."""
    prepare(case, INT8)
    exact, small = case.stores["whole"], case.stores[tuple(sorted(INT8.items()))]
    model = exact.draft.model
    began = time.perf_counter()
    start = read_start(model, case.tokens.ids)
    together = greedy(model, case.tokens.ids, tokens, deepcopy(start))
    ways: dict[str, Callable[[], torch.Tensor]] = {
        "stored, float16": lambda: guessed(exact, case, tokens, moved=False),
        STORED: lambda: guessed(small, case, tokens, moved=False),
        MOVED: lambda: guessed(small, case, tokens),
        "moved, 4 again": lambda: guessed(small, case, tokens, again=4),
        "moved, 16 again": lambda: guessed(small, case, tokens, again=16),
    }
    guesses, seconds = {TOGETHER: together}, {TOGETHER: time.perf_counter() - began}
    small.beginning()
    for way, make in ways.items():
        began = time.perf_counter()
        guesses[way] = make()
        seconds[way] = time.perf_counter() - began
    texts = {way: exact.draft.text(ids) for way, ids in guesses.items()}
    scores = {way: score_answer(case.item, text) for way, text in texts.items()}
    record: dict[str, Any] = {
        "id": case.item.id,
        "tokens": len(case.tokens),
        "passages": len(case.item.passages),
        "texts": texts,
        "f1": {way: score.f1 for way, score in scores.items()},
        "contained": {way: score.recall for way, score in scores.items()},
        "like together": {way: word_f1(text, texts[TOGETHER]) for way, text in texts.items()},
        "seconds": seconds,
    }
    if evicted:
        record |= strayed(case, start, guesses)
    return record


def read_start(model: Any, ids: torch.Tensor) -> Start:
    """A prompt that has been read but for its last token."""
    cache = read_prompts(model, [ids[:-1]]).cache
    assert cache is not None  # it was asked for
    places = torch.arange(len(ids))[None, -1:]
    return Start(cache, ids[None, -1:], torch.ones((1, len(ids)), dtype=torch.int64), places)


def guessed(
    store: PassageStore, case: Case, tokens: int, moved: bool = True, again: int = 0
) -> torch.Tensor:
    """The guess from stored passages: where they were read or behind each other, some read again.

    Args:
        store: Holds the item's passages, in all layers.
        case: The item.
        tokens: Most tokens.
        moved: Whether each passage's positions go on from the one before.
        again: Tokens at the beginning of each passage that are read with sight of all before.
    """
    model, begin, frame = store.draft.model, store.beginning(), store.frame
    texts = [text for text in case.item.passages if text.strip()]
    held = store.shards.get([digest(text) for text in texts])
    cache, first = begin.cache(model, 1), begin.tokens
    with torch.no_grad():
        for text in texts:
            ids = frame.passage(text)[0]
            kept = joined([held[digest(text)]])
            stored = full_states(working_cache(model, begin, store.layout, kept))
            some = min(again, len(ids))
            if some:
                read_on(model, cache, ids[:some], first)
            append(model, cache, stored, begin.tokens + some, moved * (first - begin.tokens))
            first += len(ids)
    tail, size = frame.tail(case.prompt.question).ids, cache.get_seq_length()
    if not moved:
        first = begin.tokens + max(len(frame.passage(text)[0]) for text in texts)
    mask = torch.ones((1, size + len(tail)), dtype=torch.int64)
    places = torch.arange(first, first + len(tail))[None]
    return greedy(model, tail, tokens, Start(cache, tail[None], mask, places))


def read_on(model: Any, cache: StoppableCache, ids: torch.Tensor, first: int) -> None:
    """Read tokens behind a cache."""
    model.get_decoder()(
        input_ids=ids[None],
        attention_mask=torch.ones((1, first + len(ids)), dtype=torch.int64),
        position_ids=torch.arange(first, first + len(ids))[None],
        past_key_values=cache,
        use_cache=True,
    )


def append(model: Any, cache: StoppableCache, states: Any, start: int, by: int) -> None:
    """Put keys and values from a column on behind a cache, keys turned by so many positions."""
    rotary = model.get_decoder().rotary_emb
    assert rotary.rope_type == "default"  # plain rotary embeddings compose
    cos, sin = rotary(states[0][0], torch.tensor([[by]]))  # (1, 1, width)
    for layer, (keys, values) in enumerate(states):
        if start < keys.shape[2]:
            part = keys[:, :, start:]
            cache.update(apply_rotary_pos_emb(part, part, cos, sin)[1], values[:, :, start:], layer)


def strayed(case: Case, full: Start, guesses: dict[str, torch.Tensor]) -> dict[str, Any]:
    """How far the target strays from its full cache, over its own and the reference answer."""
    target, tokens = case.bench.target, case.tokens
    protected = tokens.protected
    capacity = token_capacity(METHOD, len(tokens), int(protected.sum()))
    said = torch.tensor(case.bench.encoder.encode_text(" " + case.item.answers[0]))
    answers = {"own": guesses[TOGETHER], "reference": said}
    whole = {name: read_answer(target, deepcopy(full), ids) for name, ids in answers.items()}
    found: dict[str, Any] = {name: {} for name in (*answers, "likelihood")}
    found["likelihood"]["full cache"] = whole["reference"].log_likelihood
    none = guesses[TOGETHER][:0]
    lookaheads = {
        "question alone": none,
        **{way: guesses[way] for way in (TOGETHER, STORED, MOVED)},
    }
    for way, lookahead in lookaheads.items():
        done = evict(target, [tokens.ids], [lookahead], METHOD, [capacity], [protected]).start
        for name, ids in answers.items():
            read = read_answer(target, replace(done, cache=deepcopy(done.cache)), ids)
            found[name][way] = divergence(whole[name], read)
            if name == "reference":
                found["likelihood"][way] = read.log_likelihood
    return {"evicted": found}


def tables(records: list[dict[str, Any]]) -> Iterator[str]:
    """Means with 95 % intervals, differences paired."""
    yield f"\n{len(records)} questions, {mean([r['tokens'] for r in records], 0)} tokens\n"
    yield (
        "| guess | F1 | minus together | minus stored | contained | like together | says nothing "
        "| seconds |"
    )
    yield "|---|---|---|---|---|---|---|---|"
    for way in records[0]["f1"]:
        f1 = {other: [100 * r["f1"][other] for r in records] for other in (way, TOGETHER, STORED)}
        cells = [mean(f1[way])]
        for other in (TOGETHER, STORED):
            cells.append("" if way == other else difference(f1[way], f1[other]))
        cells += [mean([100 * r["contained"][way] for r in records])]
        cells += [mean([100 * r["like together"][way] for r in records], 0)]
        empty = sum(r["texts"][way].strip()[-1:] in ("", ":") for r in records)
        cells += [f"{empty} of {len(records)}"]
        middle = sorted(r["seconds"][way] for r in records)[len(records) // 2]
        yield f"| {way} | {' | '.join(cells)} | {middle:.2f} |"
    some = [r["evicted"] for r in records if "evicted" in r]
    if not some:
        return
    yield f"\nA target's cache at an eighth behind the guesses, {len(some)} questions\n"
    yield "| lookahead | KL, own | minus together | KL, reference | minus together | likelihood |"
    yield "|---|---|---|---|---|---|"
    for way in some[0]["likelihood"]:
        cells = []
        for name in ("own", "reference"):
            own = [r[name].get(way, 0.0) for r in some]
            cells.append(mean(own, 3))
            base = [r[name][TOGETHER] for r in some]
            cells.append("" if way == TOGETHER else difference(own, base, 3))
        yield f"| {way} | {' | '.join(cells)} | {mean([r['likelihood'][way] for r in some], 2)} |"


def mean(values: list[float], digits: int = 1) -> str:
    """With its interval."""
    middle, low, high = bootstrap_mean(values)
    return f"{middle:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def difference(own: list[float], base: list[float], digits: int = 1) -> str:
    """Paired, with its interval."""
    middle, low, high = paired_difference(own, base)
    return f"{middle:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"


if __name__ == "__main__":
    main()

"""What drafting saves: tokens a forward pass, wall clock, and what the drafts themselves cost.

Four parts, each a Markdown table: `replay` makes the bundled target say fixed reference answers
(quotations, lists of all values, JSON of facts about the handbook), so that acceptance does not
hang on what a small model can say; `generate` lets the bundled pair answer the same requests for
as long as the references are, leaving out loops; `cost` measures a random model of 0.3B
parameters; `learning` asks about one document set 500 times. Repeats are interleaved.
transformers' prompt lookup and assisted generation (same draft) run on the same prompts.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Any, get_args

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
)

from draftsieve import Engine, Prompt
from draftsieve.core.config import DraftKind
from draftsieve.core.decode import from_scratch
from draftsieve.core.drafters.aded import AdedDrafter
from draftsieve.core.drafters.store import TrigramStore
from draftsieve.core.drafters.tree import TokenTree
from draftsieve.core.drafting import Drafters, DraftPlan
from draftsieve.core.tree_reader import TreeReader
from draftsieve.core.verify import Speculation, Tally, verified_tokens
from draftsieve.retrievers.folder import read_folder

HANDBOOK = Path(__file__).parent.parent / "data" / "handbook"
PARTS = ("replay", "generate", "cost", "learning")
KINDS: tuple[DraftKind, ...] = get_args(DraftKind)
LEAST_DISTINCT = 0.8  # share of different 4-grams below which an answer counts as a loop
COLUMNS = "| {} | tokens a forward | ms an answer | against plain | drafting us a token |"
SYSTEM = "Answer from the passages."


@dataclass(frozen=True, slots=True)
class Case:
    """A request with the answer that a perfect model gives."""

    ids: torch.Tensor  # (tokens,) int64, the prompt
    reference: tuple[int, ...]


def main(argv: Sequence[str] | None = None) -> int:
    """Print the tables of the chosen parts."""
    options = _options(argv)
    if options.quick:
        options.items, options.repeats, options.requests, options.layers = 3, 1, 30, 2
        options.learnt = 20_000
    torch.set_num_threads(options.threads)
    engine = Engine.load("builtin:target", "builtin:draft", device=options.device, progress=False)
    assert engine.draft is not None
    engine.target.generation_config.eos_token_id = None  # answers end by length alone
    engine.draft.generation_config.eos_token_id = None
    print(f"{options.device}, {options.threads} threads, median of {options.repeats}\n")
    if "replay" in options.parts:
        replay(engine, options)
    if "generate" in options.parts:
        generate(engine, options)
    if "cost" in options.parts:
        cost(engine, options)
    if "learning" in options.parts:
        learning(engine, options)
    return 0


# -- requests -----------------------------------------------------------------------------------


def make_cases(engine: Engine, count: int, seed: int = 0) -> list[Case]:
    """Requests about handbook passages whose reference answers have 50 to 200 tokens."""
    chance, passages = random.Random(seed), [p.text for p in read_folder(HANDBOOK)]
    encoder = engine._need_pipeline().encoder
    cases: list[Case] = []
    while len(cases) < count:
        texts = chance.sample(passages, 3)
        ask = (_quotation, _values, _json)[len(cases) % 3]
        question, answer = ask(chance, texts)
        reference = engine.encode_text(answer)[:200]
        if len(reference) >= 50:
            prompt = Prompt.from_question(question, texts, system=SYSTEM)
            cases.append(Case(encoder.encode(prompt).ids, tuple(reference)))
    return cases


def _quotation(chance: random.Random, texts: Sequence[str]) -> tuple[str, str]:
    place = chance.randrange(len(texts))
    return f"Quote passage {place + 1}.", texts[place]


def _values(chance: random.Random, texts: Sequence[str]) -> tuple[str, str]:
    found = re.findall(r"\S*\d\S*|(?:[A-Z]\w+ )+[A-Z]\w+", " ".join(texts))
    return "List all names and numbers of the passages.", ", ".join(dict.fromkeys(found))


def _json(chance: random.Random, texts: Sequence[str]) -> tuple[str, str]:
    facts = [
        {"passage": place, "fact": sentence.strip()}
        for place, text in enumerate(texts, start=1)
        for sentence in re.split(r"(?<=[.!?])\s+", text)[1:3]
    ]
    return "Give the facts of the passages as JSON.", json.dumps(facts)


# -- measuring ----------------------------------------------------------------------------------


@dataclass(slots=True)
class Run:
    """One answer decoded in one way."""

    tokens: tuple[int, ...]
    forwards: int  # behind the one that read the prompt
    seconds: float
    drafting: float = 0.0  # seconds spent on drafts


@contextmanager
def counted_forwards(model: PreTrainedModel) -> Iterator[list[int]]:
    """Count a model's forward passes."""
    count = [0]

    def add(*_: Any, **__: Any) -> None:
        count[0] += 1

    hook = model.register_forward_pre_hook(add)
    try:
        yield count
    finally:
        hook.remove()


def measured(model: PreTrainedModel, work: Callable[[], tuple[Sequence[int], float]]) -> Run:
    """Time a decoding and count its passes."""
    with counted_forwards(model) as count:
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        tokens, drafting = work()
        seconds = time.perf_counter() - began
    return Run(tuple(tokens), count[0] - 1, seconds, drafting)


def ours(
    engine: Engine,
    drafters: Drafters,
    case: Case,
    kind: DraftKind | None,
    said: Sequence[int] | None = None,
) -> tuple[list[int], float]:
    """Our loop; `said` forces an answer, None is greedy. Without a kind, nothing is drafted."""
    length, place = len(case.reference), [0]

    def choose(logits: torch.Tensor) -> int:
        place[0] += 1
        return int(logits.argmax()) if said is None else said[place[0] - 1]

    tally = Tally()
    speculation = Speculation(Nothing(), tally)
    if kind is not None:
        pipeline = engine._need_pipeline()
        plan = DraftPlan(
            kind,
            case.ids,
            case.ids,
            None,
            lambda: _guess(pipeline.need_compressor().model, case),
            tally,
        )
        speculation = drafters.start(plan) or speculation
    start = from_scratch(engine.target, [case.ids])
    with torch.no_grad():
        logits = engine.target(
            input_ids=start.feed, past_key_values=start.cache, use_cache=True, logits_to_keep=1
        ).logits[0, -1]
    first = choose(logits)
    reader = TreeReader(engine.target, start.cache, start.mask)
    rest = verified_tokens(reader, choose, speculation, case.ids.tolist(), first, length - 1)
    return [first, *rest], tally.seconds


def _guess(draft: PreTrainedModel, case: Case) -> torch.Tensor:
    ids = case.ids.unsqueeze(0).to(draft.device)
    with torch.no_grad():
        out = draft.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=len(case.reference),
            do_sample=False,
            pad_token_id=0,
        )
    return out[0, ids.shape[1] :].cpu()


class Nothing:
    """Drafts nothing: plain decoding in the same loop."""

    def propose(self, context: Sequence[int]) -> TokenTree:
        """Nothing."""
        return TokenTree()

    def observe(self, accepted: Sequence[int]) -> None:
        """Nothing."""


class Forced(LogitsProcessor):  # type: ignore[misc]
    """Makes transformers' generate say an answer."""

    def __init__(self, prompt: int, said: Sequence[int]) -> None:
        self.prompt, self.said = prompt, said

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        place = min(input_ids.shape[1] - self.prompt, len(self.said) - 1)
        forced = torch.full_like(scores, float("-inf"))
        forced[:, self.said[place]] = 0.0
        return forced


def theirs(
    engine: Engine, case: Case, said: Sequence[int] | None, options: dict[str, Any]
) -> tuple[list[int], float]:
    """transformers' generate."""
    how = dict(options)
    ids = case.ids.unsqueeze(0).to(engine.target.device)
    if said is not None:
        how["logits_processor"] = LogitsProcessorList([Forced(ids.shape[1], said)])
    out = engine.target.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=len(case.reference),
        do_sample=False,
        pad_token_id=0,
        **how,
    )
    return out[0, ids.shape[1] :].tolist(), 0.0


def compare(
    engine: Engine, cases: Sequence[Case], options: argparse.Namespace, forced: bool
) -> dict[str, list[Run]]:
    """Every way on every case; of the repeats the one with the median time counts.

    Each way has an own store in each repeat, so that none has seen an answer before.
    """
    ways: dict[str, DraftKind | dict[str, Any] | None] = {"plain": None}
    ways |= {kind: kind for kind in KINDS}
    ways |= {"HF plain": {}, "HF prompt lookup": {"prompt_lookup_num_tokens": 10}}
    if not forced:  # its draft would be forced too
        ways["HF assisted"] = {"assistant_model": engine.draft}
    tokenizer = engine._need_pipeline().tokenizer
    drafters = {
        (name, repeat): Drafters(tokenizer, engine.draft, True)
        for name in ways
        for repeat in range(options.repeats)
    }
    runs: dict[str, list[Run]] = {name: [] for name in ways}
    for case in cases:
        said = case.reference if forced else None
        tries: dict[str, list[Run]] = {name: [] for name in ways}
        for repeat in range(options.repeats):
            for name, way in ways.items():
                if isinstance(way, dict):
                    work = partial(theirs, engine, case, said, way)
                else:
                    work = partial(ours, engine, drafters[name, repeat], case, way, said)
                tries[name].append(measured(engine.target, work))
        for name, own in tries.items():
            runs[name].append(sorted(own, key=lambda run: run.seconds)[len(own) // 2])
    return runs


def show(title: str, runs: dict[str, list[Run]]) -> None:
    """Means of tokens a forward, medians of times; ± is half the middle half's width."""
    print(COLUMNS.format(title), "|---|---|---|---|---|", sep="\n")
    for name, own in runs.items():
        tokens = sum(len(run.tokens) for run in own)
        per_forward = (tokens - len(own)) / max(1, sum(run.forwards for run in own))
        pairs = zip(runs["plain"], own, strict=True)
        ratios = sorted(plain.seconds / run.seconds for plain, run in pairs)
        spread = (ratios[3 * len(ratios) // 4] - ratios[len(ratios) // 4]) / 2
        print(
            f"| {name} | {per_forward:.2f} | {1000 * median(r.seconds for r in own):.0f} "
            f"| {median(ratios):.2f} ± {spread:.2f} "
            f"| {1e6 * sum(r.drafting for r in own) / tokens:.0f} |"
        )
    print()


# -- parts --------------------------------------------------------------------------------------


def replay(engine: Engine, options: argparse.Namespace) -> None:
    """Fixed reference answers."""
    cases = make_cases(engine, options.items)
    runs = compare(engine, cases, options, forced=True)
    for name, own in runs.items():
        wrong = sum(r.tokens != c.reference for r, c in zip(own, cases, strict=True))
        assert not wrong, f"{name} changed {wrong} answers"
    show(f"replay of {len(cases)} reference answers", runs)


def generate(engine: Engine, options: argparse.Namespace) -> None:
    """What the bundled pair says itself."""
    cases = make_cases(engine, options.items)
    runs = compare(engine, cases, options, forced=False)
    distinct = [distinct_share(run.tokens) for run in runs["plain"]]
    used = [place for place, share in enumerate(distinct) if share >= LEAST_DISTINCT]
    for name, own in runs.items():
        same = sum(a.tokens == b.tokens for a, b in zip(own, runs["plain"], strict=True))
        if same < len(own):
            print(f"{name}: {len(own) - same} of {len(own)} answers differ from plain (ties)")
    print(f"{len(cases) - len(used)} of {len(cases)} answers are loops and left out\n")
    if used:
        kept = {name: [own[place] for place in used] for name, own in runs.items()}
        show(f"{len(used)} generated answers", kept)


def distinct_share(tokens: Sequence[int]) -> float:
    """Different 4-grams as a share of all."""
    grams = [tuple(tokens[place : place + 4]) for place in range(len(tokens) - 3)]
    return len(set(grams)) / max(1, len(grams))


def cost(engine: Engine, options: argparse.Namespace) -> None:
    """A pass of a 0.3B-shaped model by nodes, and what each drafter takes beside it."""
    config = LlamaConfig(
        vocab_size=16384,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=options.layers,
        num_attention_heads=16,
        num_key_value_heads=8,
        max_position_embeddings=8192,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval().to(options.device)
    model = model.to(torch.float32 if options.device == "cpu" else torch.bfloat16)
    ids = torch.randint(0, 4096, (1000,))
    start = from_scratch(model, [ids])
    with torch.no_grad():
        model(input_ids=start.feed, past_key_values=start.cache, use_cache=True, logits_to_keep=1)
    reader = TreeReader(model, start.cache, start.mask)
    seconds: dict[int, list[float]] = {size: [] for size in (0, 4, 8, 16, 32, 64)}
    for _ in range(max(3, 3 * options.repeats)):
        for nodes, own in seconds.items():
            tree = TokenTree.from_paths([[n, n + 1, n + 2, n + 3] for n in range(16)], nodes)
            began = time.perf_counter()
            reader.read([5, *tree.tokens], [-1, *(parent + 1 for parent in tree.parents)])
            if options.device != "cpu":
                torch.cuda.synchronize()
            own.append(time.perf_counter() - began)
            reader.keep([0])
    plain = median(seconds[0])
    size = model.num_parameters() / 1e6
    print(f"| nodes ({size:.0f}M random parameters) | ms a pass | against plain |\n|---|---|---|")
    for nodes, own in seconds.items():
        print(f"| {nodes} | {1000 * median(own):.1f} | {median(own) / plain:.2f} |")
    print("\n| drafter | us a pass | share of a plain pass |\n|---|---|---|")
    for name, spent in _draft_seconds(engine, options).items():
        print(f"| {name} | {1e6 * spent:.0f} | {spent / plain:.2%} |")
    print()


def _draft_seconds(engine: Engine, options: argparse.Namespace) -> dict[str, float]:
    """Median seconds a pass of the drafters without a model, on replayed answers."""
    store = handbook_store(engine)
    spent: dict[str, list[float]] = {}
    searches = {"aded (puct)": "puct", "aded (best first)": "best_first"}
    for case in make_cases(engine, options.items):
        drafters = {
            name: Speculation(AdedDrafter(store, case.ids.tolist(), search=search), Tally())  # type: ignore[arg-type]
            for name, search in searches.items()
        }
        shared = Drafters(engine._need_pipeline().tokenizer, None, True, store)
        for kind in ("lookup", "auto"):
            plan = DraftPlan(kind, case.ids, case.ids, None, torch.empty, Tally())  # type: ignore[arg-type]
            speculation = shared.start(plan)
            assert speculation is not None
            drafters[kind] = speculation
        for name, speculation in drafters.items():
            tally = simulate(speculation, case)
            spent.setdefault(name, []).append(tally.seconds / max(1, tally.forwards))
    return {name: median(own) for name, own in spent.items()}


def learning(engine: Engine, options: argparse.Namespace) -> None:
    """Acceptance of an empty and of a built store over many requests about one document set."""
    cases = make_cases(engine, options.requests, seed=1)
    curves: dict[str, list[float]] = {}
    for name, store in (("empty", TrigramStore()), ("built", handbook_store(engine))):
        curves[name] = []
        for case in cases:
            speculation = Speculation(AdedDrafter(store, case.ids.tolist()), Tally())
            tally = simulate(speculation, case)
            curves[name].append(tally.tokens / max(1, tally.forwards))
    step = max(1, len(cases) // 10)
    print("| requests | empty store: tokens a forward | built from the documents |\n|---|---|---|")
    for first in range(0, len(cases), step):
        own = [mean(curve[first : first + step]) for curve in curves.values()]
        last = min(first + step, len(cases))
        print(f"| {first + 1} to {last} | {own[0]:.2f} | {own[1]:.2f} |")
    if options.plot:
        _plot(curves, options.plot)
    began = time.perf_counter()
    store, chance = TrigramStore(), torch.Generator().manual_seed(0)
    frequent = 1.0 / torch.arange(1, 16385)  # Zipf
    store.learn(torch.multinomial(frequent, options.learnt, True, generator=chance).tolist())
    print(
        f"\nA store after {options.learnt:,} Zipf tokens: {len(store):,} pairs, "
        f"{store.bytes / 1e6:.0f} MB, learnt in {time.perf_counter() - began:.0f} s"
    )


def handbook_store(engine: Engine) -> TrigramStore:
    """What `draftsieve drafts build` makes of the handbook."""
    store = TrigramStore()
    for passage in read_folder(HANDBOOK):
        store.learn(engine.encode_text(passage.text))
    return store


class Oracle:
    """Reads trees without a model; whoever chooses knows the answer."""

    def room(self) -> int:
        """No limit."""
        return 1 << 30

    def read(self, tokens: Sequence[int], parents: Sequence[int]) -> torch.Tensor:
        """Nothing worth a look."""
        return torch.zeros(len(tokens), 1)

    def keep(self, path: Sequence[int]) -> None:
        """Nothing to keep."""


def simulate(speculation: Speculation, case: Case) -> Tally:
    """What a drafter does on a reference answer."""
    rest = iter(case.reference[1:])
    steps = verified_tokens(
        Oracle(),  # type: ignore[arg-type]
        lambda _: next(rest),
        speculation,
        case.ids.tolist(),
        case.reference[0],
        len(case.reference) - 1,
    )
    assert len(list(steps)) == len(case.reference) - 1
    return speculation.tally


def _plot(curves: dict[str, list[float]], file: Path) -> None:
    """Means over 25 requests; needs matplotlib."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots()
    for name, curve in curves.items():
        window = [mean(curve[max(0, end - 25) : end]) for end in range(1, len(curve) + 1)]
        axes.plot(range(1, len(curve) + 1), window, label=f"{name} store")
    axes.set(xlabel="requests about one document set", ylabel="tokens a forward pass (mean of 25)")
    axes.legend()
    figure.savefig(file)


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--items", type=int, default=100)
    parser.add_argument("--requests", type=int, default=500, help="of the learning curve")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--layers", type=int, default=20, help="of the 0.3B-shaped model")
    parser.add_argument("--learnt", type=int, default=1_000_000, help="tokens of the large store")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--plot", type=Path, help="write the learning curve as an image")
    parser.add_argument("--quick", action="store_true", help="few items: a test of this script")
    return parser.parse_args(argv)


if __name__ == "__main__":
    raise SystemExit(main())

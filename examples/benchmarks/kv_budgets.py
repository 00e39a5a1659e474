"""When uneven KV budgets pay: bytes, decoding time and closeness to the full cache.

Compares even, adaptive (heads share a layer's entries), pyramid (lower layers keep more) and both
at the same total of entries, in one run with repeats interleaved: on the bundled pair with
questions about the handbook, and on a random model (the default has 16 layers, 16 heads, 8 KV
heads, about 0.2B parameters), where only time and bytes count. Prints a Markdown table and a
verdict.

Bytes are those of all keys and values when decoding starts. Decoding times are medians of the
repeats with half their range. Closeness is the mean KL divergence, full cache to evicted, of the
next token over the full cache's own greedy answer: how much of the answer eviction disturbs.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, median

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from draftsieve import Generation, Passage, Prompt, SpecKV
from draftsieve.core.generation.decode import next_tokens
from draftsieve.core.kv_cache.greedy import guess
from draftsieve.core.kv_cache.layers import attending, cache_bytes
from draftsieve.core.kv_cache.prefill import Start
from draftsieve.core.models.loading import load_model
from draftsieve.core.prompt.encoder import PromptEncoder
from draftsieve.core.speckv.evict import evict
from draftsieve.retrievers.folder import read_folder

DATA = Path(__file__).parent.parent / "data"


@dataclass(frozen=True)
class Reading:
    """One prompt, the draft's guess and what must stay."""

    ids: torch.Tensor  # (tokens,)
    lookahead: torch.Tensor  # (guessed,)
    protected: torch.Tensor | None = None  # (tokens,) bool


@dataclass
class Cell:
    """One kind of budget at one length and capacity."""

    size: int = 0  # bytes
    lengths: tuple[int, int] = (0, 0)  # entries of the shortest and the longest head
    seconds: list[float] = field(default_factory=list)  # of a decoding step, one a repeat
    divergence: list[float] = field(default_factory=list)  # one a prompt

    @property
    def noise(self) -> float:
        """Half the range of the repeats, in seconds."""
        return (max(self.seconds) - min(self.seconds)) / 2


Table = dict[tuple[int, int], dict[str, Cell]]  # (length, share) -> kind of budget -> cell


def main(argv: Sequence[str] | None = None) -> int:
    """Print the tables and the verdicts."""
    options = _options(argv)
    print(f"{options.device}, {options.dtype}, {torch.get_num_threads()} threads")
    if "bundled" in options.models:
        target = load_model("builtin:target", device=options.device, dtype=options.dtype)
        draft = load_model("builtin:draft", device=options.device, dtype=options.dtype)
        encoder = PromptEncoder(target.tokenizer)
        table = measure(
            target.model,
            options.bundled_lengths,
            lambda length: handbook(encoder, draft.model, length, options),
            options,
        )
        report("bundled target", table, closeness=True)
    if "random" in options.models:
        model = build(options)
        name = f"random, {model.num_parameters() / 1e6:.0f}M parameters"
        table = measure(model, options.lengths, lambda n: arbitrary(n, options), options)
        report(name, table, closeness=False)
    return 0


# ---------------------------------------------------------------- models and prompts


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
    model = LlamaForCausalLM(config).eval()
    return model.to(options.device, getattr(torch, options.dtype))


def arbitrary(length: int, options: argparse.Namespace) -> list[Reading]:
    """One prompt of random tokens: attention spreads as the random model happens to."""
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(4, 4096, (length + options.lookahead,), generator=generator)
    return [Reading(ids[:length], ids[length:])]


def handbook(
    encoder: PromptEncoder, draft: PreTrainedModel, length: int, options: argparse.Namespace
) -> list[Reading]:
    """Questions about the handbook, each with its passage and others, up to `length` tokens."""
    passages = read_folder(DATA / "handbook")
    lines = (DATA / "handbook_questions.jsonl").read_text(encoding="utf-8").splitlines()
    step = max(1, len(lines) // options.prompts)
    found = []
    for entry in [json.loads(line) for line in lines[::step]][: options.prompts]:
        mine = [p for p in passages if entry["answer"] in p.text][:1]
        rest = [p for p in passages if p not in mine]
        found.append(_reading(encoder, draft, entry["question"], mine, rest, length, options))
    return found


def _reading(
    encoder: PromptEncoder,
    draft: PreTrainedModel,
    question: str,
    mine: Sequence[Passage],
    rest: Sequence[Passage],
    length: int,
    options: argparse.Namespace,
) -> Reading:
    """The passage with the answer in the middle of as many others as fit."""
    tokens = encoder.encode(Prompt.from_question(question, mine))
    for count in range(1, len(rest) + 1):
        half = count // 2
        texts = [*rest[:half], *mine, *rest[half:count]]
        longer = encoder.encode(Prompt.from_question(question, texts))
        if len(longer) > length:
            break
        tokens = longer
    lookahead = guess(draft, tokens.ids.unsqueeze(0), options.lookahead)[0].cpu()
    return Reading(tokens.ids, lookahead, tokens.protected)


# ---------------------------------------------------------------- measuring


def measure(
    model: PreTrainedModel,
    lengths: Sequence[int],
    prompts: Callable[[int], list[Reading]],
    options: argparse.Namespace,
) -> Table:
    """Every kind of budget at every length and share."""
    table: Table = {}
    for length in lengths:
        readings = prompts(length)
        for share in options.shares:
            cells = {name: Cell() for name in ("full", *kinds(options))}
            for place, reading in enumerate(readings):
                starts = _starts(model, reading, share, cells, options)
                _compare(model, reading, starts, cells, options)
                if place == 0:
                    _time(model, reading, starts, cells, options)
            table[length, share] = cells
    return table


def kinds(options: argparse.Namespace) -> dict[str, SpecKV]:
    """The compared budgets; the capacity is given per prompt."""
    adaptive = {"head_budgets": "adaptive", "head_floor": options.floor}
    pyramid = {"layer_budgets": "pyramid", "pyramid_slope": options.slope}
    changes = {
        "even": {},
        "adaptive": adaptive,
        "pyramid": pyramid,
        "both": {**adaptive, **pyramid},
    }
    return {name: SpecKV.model_validate(values) for name, values in changes.items()}


def _starts(
    model: PreTrainedModel,
    reading: Reading,
    share: int,
    cells: dict[str, Cell],
    options: argparse.Namespace,
) -> dict[str, Start]:
    """A cache of each kind; protected tokens come on top of the share."""
    fixed = 0 if reading.protected is None else int(reading.protected[:-1].sum())
    candidates = reading.ids.numel() - 1 - fixed
    capacity = fixed + max(1, candidates // share)
    starts = {"full": _read(model, reading.ids)}
    protected = None if reading.protected is None else [reading.protected]
    for name, method in kinds(options).items():
        done = evict(model, [reading.ids], [reading.lookahead], method, [capacity], protected)
        starts[name] = done.start
        entries = [len(head) for layer in done.entries(0) for head in layer]
        cells[name].lengths = min(entries), max(entries)
    cells["full"].lengths = reading.ids.numel() - 1, reading.ids.numel() - 1
    for name, start in starts.items():
        cells[name].size = cache_bytes(start.cache)
    return starts


def _read(model: PreTrainedModel, ids: torch.Tensor) -> Start:
    """Prefill all but the last token into a full cache."""
    cache = DynamicCache(config=model.config)
    row = ids.unsqueeze(0).to(model.device)
    with torch.no_grad():
        model.get_decoder()(input_ids=row[:, :-1], past_key_values=cache, use_cache=True)
    positions = torch.full((1, 1), row.shape[1] - 1, device=model.device)
    return Start(cache, row[:, -1:], torch.ones_like(row), positions)


def _compare(
    model: PreTrainedModel,
    reading: Reading,
    starts: dict[str, Start],
    cells: dict[str, Cell],
    options: argparse.Namespace,
) -> None:
    """Divergence from the full cache along its own answer; the caches end as they began."""
    count = options.new_tokens
    steps = next_tokens(model, [reading.ids], Generation(max_new_tokens=count), starts["full"])
    answer = torch.tensor([[token for (token,) in steps]], device=model.device)
    starts["full"].cache.crop(-count)
    found = {}
    for name, start in starts.items():
        fed = torch.cat([start.feed, answer[:, :-1]], dim=1)
        later = torch.arange(count, device=model.device)
        with torch.no_grad(), attending(model, start.cache):
            logits = model(
                input_ids=fed,
                attention_mask=torch.cat([start.mask, torch.ones_like(answer[:, :-1])], dim=1),
                position_ids=start.positions + later,
                past_key_values=start.cache,
                use_cache=True,
            ).logits[0]
        start.cache.crop(-count)
        found[name] = logits.float().log_softmax(-1)  # (count, vocabulary)
    for name, logs in found.items():
        full = found["full"]
        cells[name].divergence.append(float((full.exp() * (full - logs)).sum(-1).mean()))


def _time(
    model: PreTrainedModel,
    reading: Reading,
    starts: dict[str, Start],
    cells: dict[str, Cell],
    options: argparse.Namespace,
) -> None:
    """Seconds of a decoding step, the first one left out; kinds in turn, one warm-up each."""
    count = options.new_tokens
    for repeat in range(options.repeats + 1):
        for name, start in starts.items():
            steps = next_tokens(model, [reading.ids], Generation(max_new_tokens=count + 1), start)
            next(steps)
            began = time.perf_counter()
            for _ in range(count):
                next(steps)
            if repeat > 0:
                cells[name].seconds.append((time.perf_counter() - began) / count)
            start.cache.crop(-count - 1)


# ---------------------------------------------------------------- what it says


def report(name: str, table: Table, closeness: bool) -> None:
    """The table of one model, and when uneven budgets paid."""
    print(f"\n## {name}\n")
    print("| N | C (about) | budgets | KV | entries a head | decode ms/token | of even | KL |")
    print("|---|---|---|---|---|---|---|---|")
    for (length, share), cells in table.items():
        for kind, cell in cells.items():
            ratio = median(cell.seconds) / median(cells["even"].seconds)
            near = f"{mean(cell.divergence):.4f}" if closeness else "-"
            print(
                f"| {length} | N/{share} | {kind} | {cell.size / 1e6:.2f} MB "
                f"| {cell.lengths[0]}-{cell.lengths[1]} "
                f"| {1000 * median(cell.seconds):.2f} ± {1000 * cell.noise:.2f} "
                f"| {ratio:.2f} | {near} |"
            )
    print()
    for kind in ("adaptive", "pyramid", "both"):
        print(f"{kind}: {_time_verdict(table, kind)}")
        if closeness:
            print(f"{kind}: {_closeness_verdict(table, kind)}")


def _time_verdict(table: Table, kind: str) -> str:
    """Against even budgets of the same bytes; within the noise of either is the same."""
    slower, faster, ratios = [], [], []
    for (length, share), cells in table.items():
        mine, even = cells[kind], cells["even"]
        gap = median(mine.seconds) - median(even.seconds)
        ratios.append(median(mine.seconds) / median(even.seconds))
        if abs(gap) > max(mine.noise, even.noise):
            (slower if gap > 0 else faster).append(f"N={length} C=N/{share}")
    parts = [f"decoding takes {median(ratios):.2f} of even's time (median)"]
    parts += [f"slower beyond noise at {', '.join(slower)}"] if slower else []
    parts += [f"faster beyond noise at {', '.join(faster)}"] if faster else []
    return "; ".join(parts) + "."


def _closeness_verdict(table: Table, kind: str) -> str:
    """Where it is closer to the full cache, and what even budgets need to be as close."""
    pays = []
    for (length, share), cells in table.items():
        mine, even = cells[kind].divergence, cells["even"].divergence
        wins = sum(a < b for a, b in zip(mine, even, strict=True))
        if mean(mine) >= mean(even):
            continue
        enough = [
            other["even"].size / cells[kind].size
            for (its, _), other in table.items()
            if its == length and mean(other["even"].divergence) <= mean(mine)
        ]
        need = f"even needs {min(enough):.1f} times the bytes" if enough else "no even one tried is"
        pays.append(f"N={length} C=N/{share} ({wins} of {len(mine)} prompts; {need})")
    if not pays:
        return "does not pay: nowhere closer to the full cache than even budgets."
    return f"pays, closer to the full cache, at {'; '.join(pays)}."


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["bundled", "random"])
    parser.add_argument("--bundled-lengths", type=int, nargs="+", default=[512, 1024, 2048])
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096, 8192])
    parser.add_argument("--shares", type=int, nargs="+", default=[4, 8, 16], help="C = N / share")
    parser.add_argument("--prompts", type=int, default=12, help="of the bundled pair, per length")
    parser.add_argument("--lookahead", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--floor", type=float, default=0.2, help="SpecKV(head_floor=...)")
    parser.add_argument("--slope", type=float, default=0.5, help="SpecKV(pyramid_slope=...)")
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument(
        "--quick", action="store_true", help="a minute at most; figures mean nothing"
    )
    options = parser.parse_args(argv)
    if options.quick:
        options.bundled_lengths, options.lengths, options.shares = [512], [512], [4, 8]
        options.prompts, options.lookahead, options.new_tokens, options.repeats = 2, 4, 4, 2
        options.hidden, options.layers = 128, 2
    return options


if __name__ == "__main__":
    raise SystemExit(main())

"""The command `draftsieve eval`: methods x budgets x lengths x tasks, into a results folder."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ...core.evaluation.realtext.suites import Suite
    from ...core.evaluation.runner import Grid
    from ...core.evaluation.shared import Bench

from .arguments import (
    add_models,
    add_running,
    count,
    known_path,
    loading,
    new_folder,
    progress,
    quantization,
    share,
    weights,
)
from .choice import choose_models

_DESCRIPTION = """\
Measure what compression costs in accuracy: generated tasks, natural text of yours (--data), or real
questions (--suite). Every method gets the same items; the target answers greedily. The folder gets
items.jsonl, results.jsonl, table.md and plots. Started again with the same options, an interrupted
run goes on.
"""
_EPILOG = """\
examples:
  draftsieve eval --length 1000 --budget 0.125 --items 200 --out results/
  draftsieve eval --methods none specpc bm25-sentences perplexity --budget 0.25 --tasks none \\
      --data squad.json --out results-natural/
  draftsieve eval --suite python --methods none specpc bm25-sentences --out results-python/
  draftsieve eval --suite real --data FOLDER --embedder MODEL --length 1000 4000 --out results-real/
  draftsieve eval --suite xquad.en covidqa --data FOLDER --kept-only --draft smollm2-135m \\
      --methods none specpc bm25-sentences --reference bm25-sentences --out results-kept/
  draftsieve eval --target Qwen/Qwen3-4B --draft Qwen/Qwen3-0.6B --data my.json --out results-qwen/
  draftsieve eval --attention --length 1000 --items 60 --budget 0.25 0.125 --out results-attention/
  draftsieve eval --methods improvements --seed 1 --reference specpc --out chosen-on-seed-1/
  draftsieve eval --list
"""
_METHODS = {False: ("table",), True: ("none", "prompt")}  # with `--kept-only`


def add_eval(commands: Any) -> None:
    """Add the command to the parser's commands."""
    line = commands.add_parser(
        "eval",
        help="measure accuracy against budget, method by method",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_models(line, target=True, draft=True, bits="the target")
    line.add_argument(
        "--draft-quantization",
        type=weights,
        metavar="KIND",
        help="quantise the draft: nf4, int8, torchao (8 bits, closer to the unquantised model), or "
        "torch (8 bits, fast on a CPU)",
    )
    pair = line.add_argument_group("prompt and answer")
    pair.add_argument("--max-new-tokens", type=count, default=64, metavar="N")
    pair.add_argument(
        "--system",
        metavar="TEXT",
        help="system text; default: the one the bundled pair knows, or for other models one that "
        "explains the form of the answers",
    )
    grid = line.add_argument_group("what is measured")
    grid.add_argument(
        "--methods",
        nargs="+",
        metavar="NAME",
        help='default: table, with --kept-only "none prompt"',
    )
    grid.add_argument(
        "--budget",
        nargs="+",
        type=share,
        default=[0.125],
        metavar="SHARE",
        help="shares of the passages' tokens that stay, in (0, 1] (default: 0.125)",
    )
    grid.add_argument(
        "--length", nargs="+", type=count, default=[1000], metavar="N", help="tokens of the prompts"
    )
    grid.add_argument(
        "--tasks",
        nargs="+",
        metavar="NAME",
        help='default: all, with --suite none; "none" for none',
    )
    grid.add_argument(
        "--items", type=int, default=200, metavar="N", help="a length, over all tasks"
    )
    grid.add_argument(
        "--suite",
        nargs="+",
        metavar="NAME",
        help="real questions: python (the language reference that Python carries), real (all "
        "sets), or single sets",
    )
    grid.add_argument(
        "--data",
        type=known_path,
        metavar="PATH",
        help="with --suite the folder with the sets' files (default: DRAFTSIEVE_DATA), else a file "
        "with natural text in SQuAD's format",
    )
    grid.add_argument(
        "--data-items", type=int, default=100, metavar="N", help="per length, set and context"
    )
    grid.add_argument(
        "--contexts",
        nargs="+",
        metavar="NAME",
        help="what surrounds the passages that answer: bm25, random, mixed (half and half), "
        "article (the text as it stands), and with --embedder embedding and fusion "
        "(default: bm25, with --embedder fusion)",
    )
    grid.add_argument(
        "--embedder",
        metavar="MODEL",
        help="an encoder, such as a sentence-transformers folder, for those contexts and for the "
        "semantic_weight of methods",
    )
    grid.add_argument("--seed", type=int, default=0, help="of the items (default: 0)")
    grid.add_argument(
        "--question-first", action="store_true", help="put the question in front of the passages"
    )
    grid.add_argument(
        "--reference", default="none", metavar="NAME", help="paired differences are against this"
    )
    line.add_argument("--out", type=new_folder, default=Path("results"), metavar="FOLDER")
    instead = line.add_mutually_exclusive_group()
    instead.add_argument(
        "--kept-only",
        action="store_true",
        help="no answers, and no target: which method keeps the text that answers",
    )
    instead.add_argument(
        "--attention",
        action="store_true",
        help="no answers: how well the draft's scores predict the target's attention, layer by "
        "layer, over these items (attention.json, attention.png)",
    )
    line.add_argument("--list", action="store_true", help="print the names of methods and tasks")
    add_running(line)
    line.set_defaults(run=evaluate)


def evaluate(arguments: argparse.Namespace) -> None:
    """Run the grid and print the table."""
    from ...core.evaluation.methods import GROUPS, METHODS
    from ...core.evaluation.puzzles import TASKS
    from ...core.evaluation.realtext.sets import SETS
    from ...core.evaluation.runner import TABLE, Grid, run
    from ...core.evaluation.shared import Bench
    from ...core.evaluation.tasks import INSTRUCTIONS
    from ...core.evaluation.text_only import EMBEDDED
    from ...core.models.loading import load_model
    from ...core.models.names import BUILTIN
    from ...core.prompt.messages import DEFAULT_SYSTEM

    if arguments.list:
        own = *(f"{name}:MODEL" for name in EMBEDDED), "specpc:OPTION=VALUE,..."
        own += ("speckv:OPTION=VALUE,...",)
        print("methods:", *METHODS, *own, sep="\n  ")
        print("groups of methods:", *(f"{g}: {' '.join(m)}" for g, m in GROUPS.items()), sep="\n  ")
        print("tasks:", *TASKS, sep="\n  ")
        print("suites:", "python", "real", *SETS, sep="\n  ")
        return
    roles = ("draft",) if arguments.kept_only else ("target", "draft")
    choose_models(arguments, *roles, fallback=False)
    reader = arguments.draft if arguments.kept_only else arguments.target
    known = reader.startswith(BUILTIN)
    system = arguments.system or (DEFAULT_SYSTEM if known else INSTRUCTIONS)
    grid = Grid(
        methods=tuple(arguments.methods or _METHODS[arguments.kept_only]),
        budgets=tuple(arguments.budget),
        lengths=tuple(arguments.length),
        tasks=_tasks(arguments.tasks, () if arguments.suite else tuple(TASKS)),
        items=arguments.items,
        data=None if arguments.suite else arguments.data,
        natural=arguments.data_items,
        seed=arguments.seed,
        question_first=arguments.question_first,
        system=system,
        reference=arguments.reference,
        suite=_suite(arguments) if arguments.suite else None,
        kept_only=arguments.kept_only,
    )
    options: dict[str, Any] = {
        "device": arguments.device,
        "progress": progress(arguments),
    }
    target = None
    if not arguments.kept_only:
        one = loading(arguments)
        target = load_model(
            arguments.target, quantization=quantization(arguments), **one, **options
        )
    other = loading(arguments, "draft_") | {"quantization": arguments.draft_quantization}
    bench = Bench(
        target,
        load_model(arguments.draft, **other, **options),
        max_new_tokens=arguments.max_new_tokens,
        embedder=arguments.embedder,
    )
    if arguments.attention:
        _attention(bench, grid, arguments)
        return
    run(bench, grid, arguments.out, progress=progress(arguments))
    print((arguments.out / TABLE).read_text(encoding="utf-8"), end="")


def _attention(bench: Bench, grid: Grid, arguments: argparse.Namespace) -> None:
    """Compare draft and target on the grid's items, and print the table."""
    from tqdm import tqdm

    from ...core.evaluation.agreement import measure_agreement, table, write_agreement
    from ...core.evaluation.runner import build

    items = list(build(bench, grid))
    shown = tqdm(items, "Compared", disable=not progress(arguments))
    found = measure_agreement(bench, shown, grid.budgets)
    write_agreement(found, arguments.out)
    print(table(found), end="")


def _suite(arguments: argparse.Namespace) -> Suite:
    """The sets that `--suite` names, and their contexts."""
    from ...core.evaluation.realtext.suites import make_suite
    from ...core.models.shared import shared_encoder

    embed = shared_encoder(arguments.embedder) if arguments.embedder else None
    return make_suite(
        arguments.suite,
        arguments.data,
        contexts=tuple(arguments.contexts or ["fusion" if embed else "bm25"]),
        questions=arguments.data_items,
        embed=embed,
    )


def _tasks(named: list[str] | None, known: tuple[str, ...]) -> tuple[str, ...]:
    if named is None:
        return known
    return () if named == ["none"] else tuple(named)

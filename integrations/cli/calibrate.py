"""The command `draftsieve calibrate`: which heads of a draft look at what a question needs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ...core.compressor import Compressor
    from ...core.evaluation.tasks import EvalItem

from .arguments import (
    add_models,
    add_running,
    count,
    known_path,
    loading,
    new_file,
    new_folder,
    progress,
)
from .choice import choose_models

_DESCRIPTION = """\
Learn the weights of a draft's attention heads from questions whose evidence is known, generated
ones, --data in SQuAD's format or the sets of --suite, and save them.
SpecPC(head_weights="calibrated") uses the file beside the draft, SpecPC(head_weights="FILE") any
other. All heads get a weight (needs the extra [eval]), or with --heads the few that find most
evidence when passages are read apart, as the preset 2026-12 reads them.
"""
_FEWEST = 10  # questions to choose heads by
_EPILOG = """\
examples:
  draftsieve calibrate --draft builtin:draft
  draftsieve calibrate --draft models/my-draft --data my.json
  draftsieve calibrate --draft Qwen/Qwen3-0.6B --out qwen3-0.6b-heads.json
  draftsieve calibrate --draft smollm2-135m --heads 4 --suite nq --data FOLDER --embedder MODEL \\
      --length 1500 --items 160 --seed 1 --readings .bench/heads --out smollm2-135m.json
"""


def add_calibrate(commands: Any) -> None:
    """Add the command to the parser's commands."""
    line = commands.add_parser(
        "calibrate",
        help="learn which of a draft's heads find evidence",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_models(line, target=False, draft=True, bits="")
    line.add_argument(
        "--length",
        nargs="+",
        type=count,
        default=[500, 1000, 2000],
        metavar="N",
        help="tokens of the prompts (default: 500 1000 2000)",
    )
    line.add_argument(
        "--items", type=count, default=132, metavar="N", help="a length (default: %(default)s)"
    )
    line.add_argument(
        "--heads", type=count, metavar="N", help="choose so many heads, not weights of all"
    )
    line.add_argument(
        "--suite", nargs="+", metavar="NAME", help="sets of real questions, as `draftsieve eval`"
    )
    line.add_argument(
        "--data",
        type=known_path,
        metavar="PATH",
        help="with --suite the folder with the sets' files (default: DRAFTSIEVE_DATA), else a file "
        "with questions in SQuAD's format, in place of generated ones",
    )
    line.add_argument(
        "--embedder",
        metavar="MODEL",
        help="with --suite: passages around the ones that answer are found by this encoder and "
        "BM25 together, not by BM25 alone",
    )
    line.add_argument(
        "--readings",
        type=new_folder,
        metavar="FOLDER",
        help="with --heads: keeps what the draft has read, so that an interrupted run goes on",
    )
    line.add_argument("--seed", type=int, metavar="N", help="of the items (default: 1000000)")
    line.add_argument(
        "--out", type=new_file(), metavar="FILE", help="default: head_weights.json beside the draft"
    )
    add_running(line)
    line.set_defaults(run=calibrate)


def calibrate(arguments: argparse.Namespace) -> None:
    """Read, learn, save, and say what the weights are worth."""
    from ...core.compressor import Compressor
    from ...core.evaluation.calibration import calibrate
    from ...core.specpc.head_weights import CALIBRATED, weights_path

    bars = progress(arguments)
    choose_models(arguments, "draft", fallback=False)
    compressor = Compressor.load(
        arguments.draft, device=arguments.device, progress=bars, **loading(arguments)
    )
    path = arguments.out or weights_path(compressor.model, CALIBRATED)
    items = _items(arguments, compressor)
    if arguments.heads:
        _few(compressor, items, path, arguments)
        return
    single = arguments.data is not None and not arguments.suite
    source = arguments.data.name if single else None
    found = calibrate(compressor, items, source=source, progress=bars)
    found.weights.save(path)
    print(
        f"{path}: learned from {found.items} items. Average precision of finding evidence on "
        f"others: {found.precision:.3f}, {found.precision_before:.3f} with the paper's maximum "
        "over heads."
    )


def _few(
    compressor: Compressor, items: list[EvalItem], path: Path, arguments: argparse.Namespace
) -> None:
    """Choose a few heads, save them, and say what they keep of other questions."""
    from ...core.errors import ConfigError
    from ...core.evaluation.few_heads import (
        SHARES,
        as_head_weights,
        choose_heads,
        held_out,
        read_tables,
    )

    bars = progress(arguments)
    tables = read_tables(compressor, items, folder=arguments.readings, progress=bars)
    if len(tables) < _FEWEST:
        raise ConfigError(
            f"Only {len(tables)} questions can teach this draft, at least {_FEWEST} are needed: "
            "give more items, or shorter ones where the draft's window is small."
        )
    weights, curve = choose_heads(tables, arguments.heads, progress=bars)
    about: dict[str, object] = {"items": len(tables), "length": arguments.length}
    about |= {"source": arguments.suite or "generated", "seed": arguments.seed}
    name = Path(str(compressor.model.config.name_or_path)).name
    as_head_weights(compressor, weights, draft=name, **about).save(path)
    chosen = ", ".join(f"{layer}:{head}" for layer, head in weights.nonzero().tolist())
    print(f"{path}: layer:head {chosen}, chosen from {len(tables)} items.")
    print("kept with 1, 2, ... heads:", *(f"{100 * share:.1f} %" for share in curve))
    checked = held_out(tables, arguments.heads, progress=bars)
    kept = ", ".join(f"{100 * k:.1f} % at {s:g}" for k, s in zip(checked, SHARES, strict=True))
    print(f"chosen on three quarters, kept of the last: {kept}")


def _items(arguments: argparse.Namespace, compressor: Compressor) -> list[EvalItem]:
    from ...core.evaluation.calibration import SEED
    from ...core.evaluation.puzzles import TASKS
    from ...core.evaluation.squad import read_article
    from ...core.evaluation.tasks import make_items, natural_items
    from ...core.specpc.bm25 import bm25

    seed = SEED if arguments.seed is None else arguments.seed
    if arguments.suite:
        return _real_items(arguments, compressor, seed)
    article = None if arguments.data is None else read_article(arguments.data)
    count, items = compressor.count_tokens, []
    for length in arguments.length:
        if article is None:
            items += make_items(tuple(TASKS), length, arguments.items, count, seed=seed)
        else:
            items += natural_items(article, length, arguments.items, count, bm25, seed=seed)
    return items


def _real_items(arguments: argparse.Namespace, compressor: Compressor, seed: int) -> list[EvalItem]:
    from ...core.evaluation.realtext.suites import make_suite
    from ...core.models.shared import shared_encoder
    from ...core.prompt.messages import DEFAULT_SYSTEM

    embed = shared_encoder(arguments.embedder) if arguments.embedder else None
    suite = make_suite(
        arguments.suite,
        arguments.data,
        contexts=("fusion" if embed else "bm25",),
        questions=arguments.items,
        embed=embed,
    )
    return [
        item
        for length in arguments.length
        for item in suite.items(length, compressor.count_tokens, seed=seed, system=DEFAULT_SYSTEM)
    ]

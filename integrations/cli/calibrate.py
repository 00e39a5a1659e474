"""The command `draftsieve calibrate`: which heads of a draft look at what a question needs."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ...core.compressor import Compressor
    from ...core.evaluation.tasks import EvalItem

from .arguments import add_models, add_running, count, known_file, loading, new_file, progress
from .choice import choose_models

_DESCRIPTION = """\
Learn the weights of a draft's attention heads from questions whose evidence is known, generated
ones or --data in SQuAD's format, and save them. SpecPC(head_weights="calibrated") uses the file
beside the draft, SpecPC(head_weights="FILE") any other. Needs the extra [eval].
"""
_EPILOG = """\
examples:
  draftsieve calibrate --draft builtin:draft
  draftsieve calibrate --draft models/my-draft --data my.json
  draftsieve calibrate --draft Qwen/Qwen3-0.6B --out qwen3-0.6b-heads.json
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
        "--data",
        type=known_file,
        metavar="FILE",
        help="questions in SQuAD's format, not generated ones",
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
    source = None if arguments.data is None else arguments.data.name
    found = calibrate(compressor, _items(arguments, compressor), source=source, progress=bars)
    found.weights.save(path)
    print(
        f"{path}: learned from {found.items} items. Average precision of finding evidence on "
        f"others: {found.precision:.3f}, {found.precision_before:.3f} with the paper's maximum "
        "over heads."
    )


def _items(arguments: argparse.Namespace, compressor: Compressor) -> list[EvalItem]:
    from ...core.evaluation.calibration import SEED
    from ...core.evaluation.puzzles import TASKS
    from ...core.evaluation.squad import read_article
    from ...core.evaluation.tasks import make_items, natural_items
    from ...core.specpc.bm25 import bm25

    seed = SEED if arguments.seed is None else arguments.seed
    article = None if arguments.data is None else read_article(arguments.data)
    count, items = compressor.count_tokens, []
    for length in arguments.length:
        if article is None:
            items += make_items(tuple(TASKS), length, arguments.items, count, seed=seed)
        else:
            items += natural_items(article, length, arguments.items, count, bm25, seed=seed)
    return items

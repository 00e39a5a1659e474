"""`draftsieve drafts build`: a tri-gram store from documents and past answers."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...core.errors import PromptError
from ...core.models.names import DEFAULT_MODEL
from .arguments import add_running, count, known_file, model, new_file
from .choice import choose_models
from .sources import plain_text

if TYPE_CHECKING:
    from collections.abc import Callable


def add_drafts(commands: Any) -> None:
    """Add the command to the parser's subcommands."""
    group = commands.add_parser(
        "drafts",
        help="prepare faster decoding",
        description="What `ask --drafting aded` reads.",
    ).add_subparsers(title="commands", metavar="COMMAND", required=True)
    line = group.add_parser(
        "build",
        help="learn which words follow which from documents and past answers",
        description="Write a tri-gram store. It remembers text: keep it like the documents.",
    )
    line.add_argument("--docs", type=Path, action="append", default=[], metavar="FOLDER")
    line.add_argument(
        "--answers",
        type=known_file,
        action="append",
        default=[],
        metavar="FILE",
        help='past answers: JSON lines with "answer", or any text',
    )
    line.add_argument(
        "--target",
        type=model,
        metavar="MODEL",
        help=f"whose tokenizer is used (default: {DEFAULT_MODEL})",
    )
    line.add_argument(
        "--out", type=new_file(".safetensors"), required=True, metavar="FILE", help="*.safetensors"
    )
    line.add_argument(
        "--pairs", type=count, default=1 << 18, metavar="N", help="room, 128 bytes each"
    )
    add_running(line)
    line.set_defaults(run=build)


def build(arguments: argparse.Namespace) -> None:
    """Read, learn, save, and say how much was learnt."""
    if not arguments.docs and not arguments.answers:
        raise PromptError("There is nothing to learn from: give --docs FOLDER or --answers FILE.")
    texts = list(_texts(arguments))
    from ...core.generation.speculative.drafters.store import build_store, vocabulary_fingerprint
    from ...core.models.loading import load_tokenizer
    from ...core.prompt.encoder import PromptEncoder

    choose_models(arguments, "target")
    tokenizer = load_tokenizer(arguments.target)
    encode: Callable[[str], list[int]] = PromptEncoder(tokenizer).encode_text
    store = build_store(
        (encode(text) for text in texts),
        pairs=arguments.pairs,
        vocabulary=vocabulary_fingerprint(tokenizer.get_vocab()),
    )
    store.save(arguments.out)
    size = arguments.out.stat().st_size / 1e6
    print(f"{len(store)} pairs of tokens in {arguments.out} ({size:.1f} MB)")


def _texts(arguments: argparse.Namespace) -> Iterator[str]:
    from ...retrievers.folder import read_folder

    for folder in arguments.docs:
        yield from (passage.text for passage in read_folder(folder))
    for file in arguments.answers:
        for line in plain_text(str(file)).splitlines():
            if line.strip():
                yield _answer(line)


def _answer(line: str) -> str:
    """The "answer" of a JSON line, or the line."""
    try:
        value = json.loads(line)
    except json.JSONDecodeError:
        return line
    return str(value["answer"]) if isinstance(value, dict) and "answer" in value else line

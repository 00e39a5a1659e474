"""`draftsieve index`: a folder's passages, read by the draft before anybody asks."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .arguments import (
    add_models,
    add_running,
    count,
    layer,
    loading,
    model,
    new_folder,
    progress,
    quantization,
)
from .choice import choose_models
from .output import print_json
from .stored import require_store

if TYPE_CHECKING:
    from ...core.specpc.stored.passage_store import PassageStore
    from ...core.types import Passage

TIERS, CODECS, LAYERS = ("cache", "keys"), ("float16", "int8", "int4"), ("heads", "all")
_EPILOG = """\
examples:
  draftsieve index build --docs notes/ --store readings/
  draftsieve index update --docs notes/ --store readings/
  draftsieve index stats --store readings/ --docs notes/
  draftsieve ask "Who leads the archive?" --docs notes/ --store readings/
"""
_UPDATE = """\
Read what is new, forget what is no longer in the folders, and let it leave the disk. A changed
passage is a new one. The store then holds these folders' passages and no others.
"""


def add_index(commands: Any) -> None:
    """Add the command to the parser's subcommands."""
    group = commands.add_parser(
        "index",
        help="let the draft read documents once, before questions come",
        description="What `ask --store` and `compress --store` use.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    ).add_subparsers(title="commands", metavar="COMMAND", required=True)
    line = group.add_parser(
        "build",
        help="read the passages of folders into a store",
        description="Read passages that are not in the store yet. A run that was ended goes on "
        "where it was. A store holds what text can be recovered from: keep it like the documents.",
    )
    _add_reading(line)
    line.set_defaults(run=build)
    line = group.add_parser(
        "update", help="bring a store up to date with its folders", description=_UPDATE
    )
    _add_reading(line)
    line.set_defaults(run=update)
    line = group.add_parser(
        "stats",
        help="what a store holds",
        description="Passages, tokens and bytes, and with --docs how many of the folders' passages "
        "are there. No model is loaded.",
    )
    _add_places(line, docs=False)
    line.add_argument("--json", action="store_true", help="print one JSON object")
    add_running(line)
    line.set_defaults(run=stats)


def _add_places(line: argparse.ArgumentParser, *, docs: bool) -> None:
    line.add_argument(
        "--docs",
        type=Path,
        action="append",
        required=docs,
        default=[],
        metavar="FOLDER",
        help="documents; may be repeated",
    )
    line.add_argument("--store", type=new_folder, required=True, metavar="PATH", help="its folder")


def _add_reading(line: argparse.ArgumentParser) -> None:
    """What `build` and `update` are told."""
    _add_places(line, docs=True)
    group = line.add_argument_group("what is kept of a token (default: as the store was made)")
    group.add_argument(
        "--tier",
        choices=TIERS,
        help="keys and values, so that the question sees the passages (cache, of new stores), or "
        "the keys of the heads that count",
    )
    group.add_argument("--codec", choices=CODECS, help="how numbers are kept (of new stores: int8)")
    group.add_argument(
        "--layers",
        choices=LAYERS,
        help="up to the last layer whose heads count (heads, of new stores), or all",
    )
    group.add_argument(
        "--first-layer",
        type=layer,
        metavar="N",
        help="the question sees passages from layer N on; lower ones are not kept (0, of new "
        "stores)",
    )
    group.add_argument(
        "--embedder",
        type=model,
        metavar="MODEL",
        help="keep this encoder's vectors of the sentences too, for --embedder of `ask`",
    )
    group.add_argument(
        "--limit", type=count, metavar="MB", help="most megabytes; what is used least leaves"
    )
    add_models(line, target=False, draft=True, bits="the draft")
    add_running(line)


def build(arguments: argparse.Namespace) -> None:
    """Read what is new, and say how much there is."""
    passages = _passages(arguments)
    with _open(arguments) as store:
        new = store.add(passages)
        _summary(store, f"{new} of {len(passages)} passages were read", arguments.store)


def update(arguments: argparse.Namespace) -> None:
    """Read what is new, forget what is gone, and say how much there is."""
    require_store(arguments.store)
    passages = _passages(arguments)
    with _open(arguments) as store:
        gone = store.prune(passages)
        new = store.add(passages)
        told = f"{new} of {len(passages)} passages were read, {gone} others forgotten"
        _summary(store, told, arguments.store)


def stats(arguments: argparse.Namespace) -> None:
    """What a store holds, and how much of the folders."""
    from ...core.specpc.stored.indexing import digest
    from ...core.specpc.stored.vectors import vectors_in
    from ...core.store.shards import Shards

    made = require_store(arguments.store)
    with Shards.open(arguments.store, made) as shards, vectors_in(arguments.store) as sentences:
        held, rows = shards.stats(), 0 if sentences is None else max(0, sentences.stats().rows - 1)
        found: dict[str, Any] = {
            "passages": held.entries,
            "tokens": held.rows,
            "bytes": held.bytes,
            "bytes_a_token": round(held.bytes / max(1, held.rows), 1),
            "sentence_vectors": rows,
            "vector_bytes": 0 if sentences is None else sentences.stats().bytes,
            **{name: made[name] for name in ("tier", "codec", "layers", "first_layer", "draft")},
        }
        if arguments.docs:
            names = {digest(passage.text) for passage in _passages(arguments)}
            known = shards.has([*names])
            found |= {
                "docs_stored": len(known),
                "docs_missing": len(names) - len(known),
                "not_in_docs": held.entries - len(known),
            }
    if arguments.json:
        print_json(found)
        return
    for name, value in found.items():
        print(f"{name.replace('_', ' ')}: {value}")


def _passages(arguments: argparse.Namespace) -> list[Passage]:
    """Cut as `ask` and `compress` cut them, so that they are found again."""
    from ...retrievers import read_folder

    return [passage for folder in arguments.docs for passage in read_folder(folder)]


def _open(arguments: argparse.Namespace) -> PassageStore:
    from ...core.compressor import Compressor
    from ...core.specpc.stored.passage_store import PassageStore

    choose_models(arguments, "draft", fallback=False)  # a store is of one draft for ever
    draft = Compressor.load(
        arguments.draft,
        **loading(arguments),
        quantization=quantization(arguments),
        device=arguments.device,
        progress=progress(arguments),
    )
    return PassageStore.open(
        arguments.store,
        draft,
        tier=arguments.tier,
        codec=arguments.codec,
        layers=arguments.layers,
        first_layer=arguments.first_layer,
        embedder=arguments.embedder,
        limit=None if arguments.limit is None else arguments.limit * 1_000_000,
    )


def _summary(store: PassageStore, done: str, path: Path) -> None:
    from ..html_view import size

    held = store.stats()
    each = round(held.bytes / max(1, held.rows))
    print(
        f"{done}; {path} holds {held.entries} passages of {held.rows} tokens in {size(held.bytes)} "
        f"({each} bytes a token)"
    )

"""The store of `ask`, `compress` and `index`: passages that the draft has read before."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...core.config import Method, stages
from ...core.errors import ConfigError, StoreError
from .arguments import new_folder

if TYPE_CHECKING:
    from ...core.compressor import Compressor
    from ...core.types import Passage


def add_store(line: argparse.ArgumentParser) -> None:
    """Add the options that `stored` reads."""
    group = line.add_argument_group("store")
    group.add_argument(
        "--store",
        type=new_folder,
        metavar="PATH",
        help="passages that the draft has read before, see `draftsieve index`",
    )
    group.add_argument(
        "--store-new",
        action="store_true",
        help="put passages there that are missing; without a store, make one",
    )


def stored(arguments: argparse.Namespace, method: Method | None) -> dict[str, Any]:
    """How a draft is loaded with the store that the arguments name.

    Raises:
        ConfigError: The method does not read passages, or no store is named.
        StoreError: There is no store.
    """
    if arguments.store is None:
        if arguments.store_new:
            raise ConfigError("--store-new: say where, with --store PATH.")
        return {}
    if stages(method)[0] is None:
        raise ConfigError("--store: only the methods specpc and speckv-pc read passages from it.")
    if not arguments.store_new:
        require_store(arguments.store)
    return {"store": arguments.store, "store_new": arguments.store_new}


def require_store(path: Path) -> dict[str, Any]:
    """What a store was made with.

    Raises:
        StoreError: There is none.
    """
    from ...core.store.shards import Shards

    made = Shards.made_with(path)
    if not made:
        raise StoreError(
            f"There is no store in {str(path)!r}: `draftsieve index build --docs FOLDER --store "
            f"{path}` makes one."
        )
    return made


def tell(compressor: Compressor | None, passages: Sequence[Passage]) -> None:
    """Say on stderr how many passages need not be read."""
    store = None if compressor is None else compressor.draft.store
    if store is not None:
        known = sum(passage in store for passage in passages)
        print(f"store: {known} of {len(passages)} passages are in it", file=sys.stderr)

"""Models that nobody named: a real one, offered where it is missing, else the bundled pair."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

from ...core.errors import DraftSieveError
from ...core.models.fetched import Published, fetch, fetched, fetched_folder, published
from ...core.models.names import BUILTIN, DEFAULT_MODEL
from .arguments import progress


def choose_models(arguments: argparse.Namespace, *roles: str, fallback: bool = True) -> None:
    """Name the models that the arguments leave open.

    A model that nobody named is `DEFAULT_MODEL`, beside a bundled one its partner. Where
    `DEFAULT_MODEL` is missing, somebody at a terminal is asked whether to fetch it. Otherwise the
    bundled pair stands in, and a sentence on stderr says so and names the command.

    Args:
        arguments: Their `target` and `draft`, where they are None, are set.
        roles: Which of these are needed.
        fallback: Whether the bundled pair may stand in; results that are written down had better
            not depend on what is on a machine.

    Raises:
        ModelNotFoundError: The model is missing, and nothing may stand in.
    """
    unnamed = [role for role in roles if getattr(arguments, role) is None]
    named = [getattr(arguments, role) for role in roles if role not in unnamed]
    bundled = any(name.startswith(BUILTIN) for name in named)
    if unnamed and not bundled:
        why = obtain(_agreed, bars=progress(arguments))
        if why and not fallback:
            fetched_folder(DEFAULT_MODEL)  # raises, and names the command
        if why:
            used = " and ".join(f"{BUILTIN}{role}" for role in unnamed)
            print(f"draftsieve: {why}: using {used}, for demonstration.", file=sys.stderr)
        bundled = bool(why)
    for role in unnamed:
        setattr(arguments, role, f"{BUILTIN}{role}" if bundled else DEFAULT_MODEL)


def obtain(
    agreed: Callable[[Published], bool], *, bars: bool, timeout: float | None = None
) -> str | None:
    """Fetch `DEFAULT_MODEL` where it is missing and `agreed` says yes.

    Args:
        agreed: Asked before anything is downloaded.
        bars: Show bars.
        timeout: Seconds that the download may take; None for no limit.

    Returns:
        Why it is not here, as half a sentence; None where it is.
    """
    model = published(DEFAULT_MODEL)
    if fetched(model):
        return None
    if not agreed(model):
        return (
            f"{model.name} is not on this machine (`draftsieve models get {model.name}` fetches "
            f"it once, {model.megabytes} MB)"
        )
    try:
        fetch(model, progress=bars, timeout=timeout)
    except (DraftSieveError, OSError) as error:
        return f"{model.name} could not be fetched ({' '.join(str(error).split())})"
    return None


def _agreed(model: Published) -> bool:
    """Ask, where somebody is there to answer."""
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        return False
    print(
        f"{model.title} ({model.licence}) is not on this machine. Fetch it once, "
        f"{model.megabytes} MB? [Y/n] ",
        end="",
        file=sys.stderr,
        flush=True,
    )
    return sys.stdin.readline().lower() in ("\n", "y\n", "yes\n")

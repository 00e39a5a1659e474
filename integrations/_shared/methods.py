"""A method by name, with its budget and options, as command lines and requests give it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from ...core.config import DEFAULT_METHOD, NEWEST_PRESET, Method, SpecKV, SpecKVPC, SpecPC
from ...core.errors import ConfigError

PAPER = "paper"
METHODS: Mapping[str, tuple[str, ...]] = {
    "specpc": ("specpc",),
    "speckv": ("speckv",),
    "speckv-pc": ("specpc", "speckv"),
    "none": (),
}
STAGES: Mapping[str, type[SpecPC | SpecKV]] = {"specpc": SpecPC, "speckv": SpecKV}
SHARE = DEFAULT_METHOD.ratio or 1.0
_BUDGETS = {"capacity", "ratio"}


def build_method(
    stages: Sequence[str],
    options: Mapping[str, Mapping[str, Any]],
    *,
    preset: str | None = None,
    ratio: float | None = None,
    capacity: int | None = None,
) -> Method | None:
    """The method of some stages.

    Args:
        stages: As `METHODS` has them.
        options: Of each stage, by name.
        preset: Which options these are changed from; None for the newest of SpecPC, and with
            SpecKV alone for those of the paper.
        ratio: A budget; of two stages what both leave together. None for 0.35, unless there is a
            capacity.
        capacity: A budget as a size.

    Raises:
        ConfigError: An option does not exist, has no such value, or does not go with another.
    """
    if not stages:
        return None
    given = {stage: dict(options.get(stage, {})) for stage in stages}
    _add_budgets(given, ratio, capacity)
    chosen = preset or (NEWEST_PRESET if "specpc" in stages else PAPER)
    made: dict[str, Any] = {}
    for stage, own in given.items():
        kind = STAGES[stage]
        plain = chosen == PAPER or stage != stages[0]  # of two stages the first has the preset
        made[stage] = kind(**own) if plain else kind.preset(chosen, **own)
    if len(made) == 2:
        return SpecKVPC(**made)
    method: SpecPC | SpecKV = made.popitem()[1]
    return method


def find_option(path: str, stages: Sequence[str], said: str) -> tuple[str, str]:
    """Stage and name of an option.

    Args:
        path: NAME, or STAGE.NAME where two stages have it.
        stages: Of the method.
        said: What the user wrote, for messages.

    Raises:
        ConfigError: There is no such option, or two.
    """
    stage, _, name = path.rpartition(".")
    homes = [home for home in stages if stage in ("", home) and name in STAGES[home].model_fields]
    if len(homes) == 1:
        return homes[0], name
    if homes:
        raise ConfigError(f"{said}: both stages have it: say specpc.{name} or speckv.{name}.")
    known = {name: None for home in stages for name in STAGES[home].model_fields}
    close = get_close_matches(name, known, 2)
    hint = f" Did you mean {' or '.join(close)}?" if close else ""
    raise ConfigError(f"{said}: there is no such option.{hint} There are: {', '.join(known)}.")


def _add_budgets(
    given: Mapping[str, dict[str, Any]], ratio: float | None, capacity: int | None
) -> None:
    """Give a budget to every stage that has none of its own."""
    missing = [stage for stage, options in given.items() if not _BUDGETS & options.keys()]
    first = given.get("specpc", {})
    if len(given) == 2 and "speckv" in missing and (capacity or "capacity" in first):
        raise ConfigError(
            "speckv-pc has two budgets, tokens of the prompt and entries of the cache: give both "
            "capacities, specpc.capacity=2000 and speckv.capacity=512 for instance, or a ratio "
            "for what both leave together."
        )
    share = ratio or SHARE
    for stage in missing:
        if capacity:
            given[stage]["capacity"] = capacity
        elif len(given) == 1:
            given[stage]["ratio"] = share
        elif stage == "specpc":
            given[stage]["ratio"] = min(1.0, 2 * share)
        else:
            given[stage]["ratio"] = min(1.0, share / first["ratio"])

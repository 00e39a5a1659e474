"""The options that choose a method, generated from the option classes of the core."""

from __future__ import annotations

import argparse
import inspect
import json
import re
import shutil
import textwrap
from collections.abc import Iterator, Sequence
from types import UnionType
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import TypeAdapter, ValidationError

from ...core.config import DEFAULT_METHOD, NEWEST_PRESET, SEMANTIC_WEIGHT, Method, SpecPC
from ...core.errors import ConfigError
from ...core.options import Options
from .._shared.methods import METHODS, PAPER, SHARE, STAGES, build_method, find_option
from .arguments import count, model, share

_RATIO = """\
share R of the passages' tokens to keep, in (0, 1] (default: {share}); question, system text and
template always stay on top of it. specpc: tokens of the prompt. speckv: entries of each attention
head's cache. speckv-pc: R is what both leave together: the prompt keeps 2R, and the cache as many
of those entries as make R.
"""
_CAPACITY = """\
a size in place of a share. specpc: draft tokens of the whole prompt. speckv: entries of each
attention head's cache, for the whole prompt.
"""
_PRESET = """\
which options others are changed from: a preset of specpc, with speckv alone one of its own, or
"paper" for those of the paper (default: {preset}, which keeps whole sentences; speckv: paper)
"""
_EMBEDDER = """\
a model for sentence embeddings, a folder in sentence-transformers' form or a hub id, for a second
opinion on sentences beside the draft's
"""
_WEIGHT = """\
share W of what a sentence counts that is the embedder's, in (0, 1] (default: the preset's, or with
--embedder {weight})
"""
_SET = """\
any other option, as in --set lookahead_tokens=8; may be repeated, and wins over the options above.
With speckv-pc, an option that both stages have is named specpc.NAME or speckv.NAME
"""


def add_method(line: argparse.ArgumentParser, *, prompt_only: bool = False) -> None:
    """Add the options that `read_method` reads; `prompt_only` for SpecPC alone."""
    group = line.add_argument_group("method, and what it keeps")
    if prompt_only:
        line.set_defaults(method="specpc")
    else:
        group.add_argument(
            "--method",
            choices=tuple(METHODS),
            default="specpc",
            help="shorten the prompt (specpc, the default), evict from the target's cache "
            "(speckv), both, or nothing",
        )
    budget = group.add_mutually_exclusive_group()
    budget.add_argument("--ratio", type=share, metavar="R", help=_RATIO.format(share=SHARE))
    budget.add_argument("--capacity", type=count, metavar="N", help=_CAPACITY)
    group.add_argument("--preset", metavar="NAME", help=_PRESET.format(preset=NEWEST_PRESET))
    group.add_argument("--embedder", type=model, metavar="MODEL", help=_EMBEDDER)
    weight = _WEIGHT.format(weight=SEMANTIC_WEIGHT)
    group.add_argument("--semantic-weight", type=share, metavar="W", help=weight)
    group.add_argument(
        "--set", dest="options", action="append", default=[], metavar="NAME=VALUE", help=_SET
    )
    stages = METHODS["specpc" if prompt_only else "speckv-pc"]
    group.add_argument(
        "--help-options", action=_HelpOptions, stages=stages, help="list what --set takes, and exit"
    )


def read_method(arguments: argparse.Namespace) -> Method | None:
    """The method that the arguments ask for.

    Raises:
        ConfigError: An option does not exist, has no such value, or does not go with another.
    """
    stages = METHODS[arguments.method]
    if not stages:
        return None
    given = _given(arguments.options, stages)
    preset = arguments.preset or (NEWEST_PRESET if "specpc" in stages else PAPER)
    _add_embedder(given, preset, arguments.embedder, arguments.semantic_weight)
    return build_method(
        stages, given, preset=preset, ratio=arguments.ratio, capacity=arguments.capacity
    )


def _given(options: Sequence[str], stages: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The values of `--set` by stage and name."""
    given: dict[str, dict[str, Any]] = {stage: {} for stage in stages}
    for option in options:
        path, equals, text = option.partition("=")
        if not equals:
            raise ConfigError(f"--set {option}: say NAME=VALUE, as in --set kernel_size=7.")
        stage, name = find_option(path.strip(), stages, f"--set {path.strip()}")
        given[stage][name] = _parse(path, STAGES[stage], name, text)
    return given


def _parse(path: str, options: type[Options], name: str, text: str) -> Any:
    field = options.model_fields[name]
    if text.lower() == "none" and type(None) in get_args(field.annotation):
        return None
    kind: Any = Annotated[field.annotation, field]
    try:
        return TypeAdapter(kind).validate_strings(text)
    except ValidationError as error:
        told = "; ".join(dict.fromkeys(each["msg"] for each in error.errors()))
        raise ConfigError(f"--set {path}={text}: {told[:1].lower()}{told[1:]}.") from error


def _add_embedder(
    given: dict[str, dict[str, Any]], preset: str, embedder: str | None, weight: float | None
) -> None:
    """Give SpecPC its embedder, and where nothing says how much that counts, a weight."""
    if embedder is None and weight is None:
        return
    if "specpc" not in given:
        raise ConfigError("--embedder, --semantic-weight: only SpecPC asks an embedder.")
    options = given["specpc"]
    own = 0.0 if preset == PAPER else SpecPC.preset(preset).semantic_weight
    options.setdefault("semantic_weight", weight or own or SEMANTIC_WEIGHT)
    if embedder is not None:
        options.setdefault("embedder", embedder)


class _HelpOptions(argparse.Action):
    """Print the options of the stages, their defaults and what they mean."""

    def __init__(self, *, stages: Sequence[str], **options: Any) -> None:
        super().__init__(nargs=0, **options)
        self.stages = stages

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        print("\n".join(self._lines()))
        parser.exit()

    def _lines(self) -> Iterator[str]:
        width = min(100, shutil.get_terminal_size().columns)
        for place, stage in enumerate(self.stages):
            kind = STAGES[stage]
            ours = DEFAULT_METHOD if kind is SpecPC else kind(ratio=SHARE)
            paper = kind(ratio=SHARE)
            if place:
                yield ""
            yield f"{kind.__name__}, --set NAME=VALUE (--set {stage}.NAME=VALUE with speckv-pc):\n"
            for name, meaning in described(kind).items():
                value, other = getattr(ours, name), getattr(paper, name)
                choices = " | ".join(map(_shown, _choices(kind.model_fields[name].annotation)))
                note = f"  ({choices})" if choices else ""
                note += "" if value == other else f"  (paper: {_shown(other)})"
                yield f"  {name}={_shown(value)}{note}"
                yield textwrap.fill(
                    meaning, width, initial_indent=" " * 6, subsequent_indent=" " * 6
                )


def described(options: type[Options]) -> dict[str, str]:
    """The first sentence on every option in its class's docstring."""
    text = (inspect.getdoc(options) or "").partition("Args:\n")[2]
    found = re.findall(r"^    (\w+): (.*(?:\n {8,}.*)*)", text, re.M)
    meanings = {name: " ".join(meaning.split()) for name, meaning in found}
    return {name: re.split(r"(?<=\.)\s", meaning)[0] for name, meaning in meanings.items()}


def _choices(annotation: Any) -> Iterator[object]:
    """The values of a type that has only some."""
    if get_origin(annotation) is Literal:
        yield from get_args(annotation)
    elif isinstance(annotation, UnionType):
        for part in get_args(annotation):
            yield from _choices(part)


def _shown(value: object) -> str:
    """A value as `--set` takes it."""
    if value is None:
        return "none"
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if " " in text else text

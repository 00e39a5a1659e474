"""`draftsieve serve`: a server that speaks OpenAI's interface."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from ...retrievers.extras import require
from .arguments import add_models, add_running, count, known_file, share
from .choice import choose_models

if TYPE_CHECKING:
    from ..server.settings import Settings

_EPILOG = """\
Every option can also stand in a TOML file (--config) or in the environment, as DRAFTSIEVE_PORT for
--port; flags win over the environment, and that over the file. Keys are no flags, as others see
those: DRAFTSIEVE_API_KEY, or api_keys = {NAME = "KEY"} in the file.

examples:
  draftsieve serve
  draftsieve serve --target Qwen/Qwen3-4B --draft Qwen/Qwen3-0.6B --ratio 0.25
  DRAFTSIEVE_API_KEY=... draftsieve serve --host 0.0.0.0
  draftsieve serve --upstream http://localhost:8080 --draft smollm2-135m --ratio 0.3
  draftsieve serve --print-config > server.toml
"""
_METHOD = ("method", "ratio", "capacity", "preset")


def add_serve(commands: Any) -> None:
    """Add the command to the parser's commands."""
    line = commands.add_parser(
        "serve",
        help="answer requests over HTTP as OpenAI does",
        description="Serve /v1/chat/completions and others; documents in requests are compressed.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_models(line, target=True, draft=True, bits="the target")
    method = line.add_argument_group("method, where a request names none")
    method.add_argument("--method", choices=("specpc", "speckv", "speckv-pc", "none"))
    budget = method.add_mutually_exclusive_group()
    budget.add_argument("--ratio", type=share, metavar="R", help="share of the documents' tokens")
    budget.add_argument("--capacity", type=count, metavar="N", help="a size in place of a share")
    method.add_argument("--preset", metavar="NAME", help="which options it has")
    own = line.add_argument_group("server")
    own.add_argument(
        "--upstream",
        metavar="URL",
        help="be a proxy in front of this OpenAI-compatible server, which answers",
    )
    own.add_argument("--config", type=known_file, metavar="FILE", help="settings as TOML")
    own.add_argument("--host", metavar="ADDRESS", help="(default: 127.0.0.1)")
    own.add_argument("--port", type=int, metavar="N", help="0 for a free one (default: 8000)")
    own.add_argument(
        "--public-without-key",
        action="store_true",
        help="listen at an address that others reach, without an API key",
    )
    own.add_argument("--max-tokens", type=count, metavar="N", help="of an answer (default: 512)")
    own.add_argument("--timeout", type=float, metavar="S", help="of a request (default: 300)")
    own.add_argument(
        "--max-requests", type=count, metavar="N", help="running and waiting ones (default: 64)"
    )
    own.add_argument("--log-format", choices=("json", "text"), help="(default: json)")
    own.add_argument(
        "--print-config", action="store_true", help="print all settings as TOML, and exit"
    )
    add_running(line)
    line.set_defaults(run=serve)


def serve(arguments: argparse.Namespace) -> None:
    """Read the settings, name the models, serve."""
    require("pydantic_settings", "server", "draftsieve serve")
    from ..server.settings import as_toml, read_settings

    settings = read_settings(arguments.config, **_given(arguments))
    if arguments.print_config:
        print(as_toml(settings), end="")
        return
    from ..server.running import serve as run

    run(_with_models(settings, arguments))


def _given(arguments: argparse.Namespace) -> dict[str, Any]:
    """What the flags say."""
    from ..server.settings import Settings

    flags = {name: getattr(arguments, name, None) for name in (*Settings.model_fields, *_METHOD)}
    method = {name: flags.pop(name) for name in _METHOD}
    given = {name: value for name, value in flags.items() if value is not None}
    if given.get("device") == "auto":  # the parser's default
        del given["device"]
    if not given["public_without_key"]:
        del given["public_without_key"]
    asked = {name: value for name, value in method.items() if value is not None}
    return {**given, **({"method": asked} if asked else {})}


def _with_models(settings: Settings, arguments: argparse.Namespace) -> Settings:
    """Name the models that nobody named, as other commands do."""
    arguments.target, arguments.draft = settings.target, settings.draft
    if settings.upstream is not None:
        choose_models(arguments, "draft")
        return settings.model_copy(update={"draft": arguments.draft})
    choose_models(arguments, "target", "draft")
    return settings.model_copy(update={"target": arguments.target, "draft": arguments.draft})

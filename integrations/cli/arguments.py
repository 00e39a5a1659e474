"""Checked arguments that commands share: what is wrong is said before anything is loaded."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ...core.config import Quantization
from ...core.errors import ModelNotFoundError
from ...core.models.names import BUILTIN, DEFAULT_MODEL, resolve

_MODELS = (
    f"hub ids, folders, GGUF files, models of `draftsieve models list`, or the bundled "
    f"{BUILTIN}target and {BUILTIN}draft"
)
_LOADING = {  # arguments of `load_model`
    "gguf_file": ("FILE", "GGUF file in its folder or hub repository"),
    "revision": ("NAME", "branch, tag or commit of its hub repository"),
    "attn_implementation": ("NAME", "attention: eager, sdpa, ... (default: the model's own)"),
}


def question(text: str) -> str:
    """A question with words in it."""
    if not text.strip():
        raise argparse.ArgumentTypeError("it is empty: say what the documents are read for")
    return text


def count(text: str) -> int:
    """A whole number from 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1")
    return int(text)


def layer(text: str) -> int:
    """A whole number from 0."""
    return 0 if text == "0" else count(text)


def share(text: str) -> float:
    """A number in (0, 1]."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number in (0, 1]")
    return value


def model(text: str) -> str:
    """A name that may be a model's: a bundled one's or a path must exist."""
    try:
        resolve(text)
    except ModelNotFoundError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


def weights(text: str) -> Quantization:
    """A way of quantising weights, by its short name."""
    known = {
        "nf4": Quantization(bits=4),
        "int8": Quantization(bits=8),
        "torchao": Quantization(bits=8, backend="torchao"),
        "torch": Quantization(bits=8, backend="torch"),
    }
    if text not in known:
        raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(known)}")
    return known[text]


def known_path(text: str) -> Path:
    """A file or folder that is there."""
    if not Path(text).exists():
        raise argparse.ArgumentTypeError(f"there is no file {text!r}")
    return Path(text)


def known_file(text: str) -> Path:
    """A file that is there."""
    if known_path(text).is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is a folder: give a file")
    return Path(text)


def file_or_stdin(text: str) -> str:
    """A file that is there, or "-"."""
    return text if text == "-" else str(known_file(text))


def new_file(*endings: str) -> Callable[[str], Path]:
    """A file that can be written, with one of the endings if there are any."""

    def check(text: str) -> Path:
        path = Path(text)
        if endings and path.suffix not in endings:
            raise argparse.ArgumentTypeError(f"{text!r} must end with {' or '.join(endings)}")
        if path.is_dir():
            raise argparse.ArgumentTypeError(f"{text!r} is a folder: give a file")
        if not path.parent.is_dir():
            raise argparse.ArgumentTypeError(f"{text!r}: there is no folder {str(path.parent)!r}")
        if not os.access(path if path.exists() else path.parent, os.W_OK):
            raise argparse.ArgumentTypeError(f"{text!r} may not be written")
        return path

    return check


def new_folder(text: str) -> Path:
    """A folder that is there or can be made."""
    if Path(text).exists() and not Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is a file: give a folder")
    return Path(text)


def add_models(line: argparse.ArgumentParser, *, target: bool, draft: bool, bits: str) -> None:
    """Which models are used, and how; `bits` says which of them `--bits` is about, if any."""
    group = line.add_argument_group("models", _MODELS)
    roles = [role for role, wanted in (("target", target), ("draft", draft)) if wanted]
    for role in roles:
        help_ = f"(default: {DEFAULT_MODEL})"
        group.add_argument(f"--{role}", type=model, metavar="MODEL", help=help_)
    if bits:
        group.add_argument("--bits", type=int, choices=(4, 8), help=f"quantise {bits}")
    for role in roles:
        prefix = _prefix(role, roles)
        for name, (metavar, meaning) in _LOADING.items():
            flag = f"--{prefix}{name}".replace("_", "-")
            group.add_argument(flag, metavar=metavar, help=f"the {role}'s {meaning}")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda, ... (default: auto)")


def loading(arguments: argparse.Namespace, prefix: str = "") -> dict[str, Any]:
    """How a model is loaded; `prefix` "" for the target or the only one, "draft_" for a draft."""
    return {name: getattr(arguments, prefix + name) for name in _LOADING}


def _prefix(role: str, roles: Sequence[str]) -> str:
    return "draft_" if role == "draft" and len(roles) == 2 else ""


def add_running(line: argparse.ArgumentParser) -> None:
    """What every command can be asked for."""
    line.add_argument("--no-progress", action="store_true", help="no progress bars on stderr")
    line.add_argument("-v", "--verbose", action="store_true", help="say more, on stderr")
    line.add_argument("--debug", action="store_true", help="show the traceback of an error")


def quantization(arguments: argparse.Namespace) -> Quantization | None:
    """What `--bits` asks for."""
    return Quantization(bits=arguments.bits) if arguments.bits else None


def progress(arguments: argparse.Namespace) -> bool:
    """Whether bars are shown: on a terminal, unless they are not wanted."""
    return not arguments.no_progress and sys.stderr.isatty()

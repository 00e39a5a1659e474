"""Names of models, told apart without loading anything."""

from __future__ import annotations

from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path

from ..errors import ModelNotFoundError
from .fetched import CATALOGUE, fetched_folder
from .hub import no_hub_id

BUILTIN, GGUF = "builtin:", ".gguf"
DEFAULT_MODEL = "smollm2-135m"  # target and draft of whoever names none, on the command line
_HOME = Path(str(files("draftsieve.core.builtin")))


def resolve(name: str | Path) -> str:
    """The folder of a bundled or fetched model, a path on disk, or the name as it is.

    Raises:
        ModelNotFoundError: "builtin:..." names no bundled model, a path is not there, the model has
            not been fetched, or the name can be none of a hub repository.
    """
    text = str(name)
    if not text.strip():
        raise ModelNotFoundError("The model name is empty: give a hub id, a folder or builtin:...")
    if text.startswith(BUILTIN):
        folder = _HOME / text.removeprefix(BUILTIN)
        if not (folder / "config.json").is_file():
            known = _bundled()
            raise ModelNotFoundError(f"There is no bundled model {text!r}; there are: {known}.")
        return str(folder)
    looks_local = isinstance(name, Path) or text.startswith((".", "/", "~"))
    path = Path(text).expanduser()
    if text in CATALOGUE and not path.is_dir():
        return str(fetched_folder(text))
    if path.is_dir() or (path.is_file() and path.suffix == GGUF):
        return str(path)
    if looks_local:
        raise ModelNotFoundError(missing(text, None))
    in_repository = text.endswith(GGUF) and text.count("/") == 2
    if not in_repository and (why := no_hub_id(text)) is not None:
        raise ModelNotFoundError(missing(text, f"the name cannot be one of the hub: {why}"))
    return text


def missing(name: str, hub: str | None) -> str:
    """What was looked for under a name that stands for no model, and what it may have meant.

    Args:
        name: As it was given.
        hub: What the hub had to say; None if it was not asked.
    """
    path = Path(name).expanduser().absolute()
    asked = "" if hub is None else f", and {hub}"
    similar = _similar(path, name)
    meant = f" Similar names: {', '.join(similar)}." if similar else ""
    return (
        f"There is no model {name!r}: there is no folder {str(path)!r}{asked}.{meant} Give a "
        "folder with config.json and safetensors, a GGUF file, a hub id, or one of "
        f"{', '.join([*_bundled(), *CATALOGUE])}."
    )


def _bundled() -> list[str]:
    return sorted(f"{BUILTIN}{path.parent.name}" for path in _HOME.glob("*/config.json"))


def _similar(path: Path, name: str) -> list[str]:
    """Folders and GGUF files beside a path, and models by name, that are called nearly the same."""
    beside = path.parent.iterdir() if path.parent.is_dir() else ()
    found = [it.name for it in beside if it.suffix == GGUF or (it / "config.json").is_file()]
    near = [str(Path(name).parent / it) for it in get_close_matches(path.name, found)]
    known = {model.removeprefix(BUILTIN): model for model in (*_bundled(), *CATALOGUE)}
    return near + [known[it] for it in get_close_matches(path.name, known)]

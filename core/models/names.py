"""Names of models, told apart without loading anything."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from ..errors import ModelNotFoundError
from .fetched import CATALOGUE, fetched_folder

BUILTIN, GGUF = "builtin:", ".gguf"


def resolve(name: str | Path) -> str:
    """The folder of a bundled or fetched model, a path on disk, or the name as it is.

    Raises:
        ModelNotFoundError: "builtin:..." names no bundled model, a path is not there, or the model
            has not been fetched.
    """
    text = str(name)
    if not text.strip():
        raise ModelNotFoundError("The model name is empty: give a hub id, a folder or builtin:...")
    if text.startswith(BUILTIN):
        home = Path(str(files("draftsieve.core.builtin")))
        folder = home / text.removeprefix(BUILTIN)
        if not (folder / "config.json").is_file():
            known = sorted(f"{BUILTIN}{p.parent.name}" for p in home.glob("*/config.json"))
            raise ModelNotFoundError(f"There is no bundled model {text!r}; there are: {known}.")
        return str(folder)
    looks_local = isinstance(name, Path) or text.startswith((".", "/", "~"))
    path = Path(text).expanduser()
    if text in CATALOGUE and not path.is_dir():
        return str(fetched_folder(text))
    if path.is_dir() or (path.is_file() and path.suffix == GGUF):
        return str(path)
    if looks_local or (text.endswith(GGUF) and text.count("/") != 2):
        raise ModelNotFoundError(
            f"The model {text!r} does not exist: give a folder or a GGUF file."
        )
    return text

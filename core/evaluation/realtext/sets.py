"""The sets of real questions by name, and the folder that they are read from."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ...errors import ConfigError
from .collection import Collection
from .cutting import WORDS
from .mtrag import read_mtrag
from .natural_questions import read_natural_questions
from .squad_form import read_squad_form

VARIABLE = "DRAFTSIEVE_DATA"


@dataclass(frozen=True, slots=True)
class DataSet:
    """A file's name, what reads it, and where it is published."""

    file: str
    read: Callable[[Path], Collection]
    source: str


def _squad_form(name: str, words: int | None = None) -> Callable[[Path], Collection]:
    return lambda path: read_squad_form(path, name, words)


SETS = {
    **{
        f"xquad.{language}": DataSet(
            f"xquad.{language}.json",
            _squad_form(f"xquad.{language}"),
            "https://github.com/google-deepmind/xquad",
        )
        for language in ("en", "de", "zh")
    },
    "covidqa": DataSet(
        "covidqa.json", _squad_form("covidqa", WORDS), "https://github.com/deepset-ai/COVID-QA"
    ),
    "nq": DataSet(
        "nq_open_gold.jsonl",
        read_natural_questions,
        "https://github.com/nelson-liu/lost-in-the-middle",
    ),
    "mtrag": DataSet("mtrag_un.jsonl", read_mtrag, "https://github.com/IBM/mt-rag-benchmark"),
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


def read_set(name: str, folder: str | Path | None = None) -> Collection:
    """Read one of `SETS`.

    Args:
        name: Its name.
        folder: As for `data_folder`.

    Raises:
        ConfigError: There is no such set, no folder, or no such file in it.
        PromptError: The file has another form.
    """
    if name not in SETS:
        raise ConfigError(f"There is no data set {name!r}; there are: {', '.join(SETS)}.")
    wanted = SETS[name]
    path = data_folder(folder) / wanted.file
    if not path.is_file():
        raise ConfigError(
            f"The data set {name!r} is read from {str(path)!r}, which is not there. It is "
            f"published at {wanted.source}."
        )
    return wanted.read(path)

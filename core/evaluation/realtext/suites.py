"""What a run takes of the sets of real questions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import ConfigError
from ...models.embedder import Embedder
from ..python_reference import read_reference
from ..squad import Counter
from ..tasks import EvalItem
from .collection import Collection
from .contexts import Around, real_items
from .rankings import rankings
from .sets import SETS, read_set

ARTICLE = "article"  # the context that is the article itself
PYTHON, REAL = "python", "real"  # names of suites beside those of `SETS`
PUBLISHED = tuple(name for name, found in SETS.items() if not found.derived)
_HERE, _FILE = Path(__file__).resolve(), "python_reference.jsonl"
_PLACES = _HERE.parents[1] / "data" / _FILE, _HERE.parents[3] / "examples" / "data" / _FILE


@dataclass(frozen=True, slots=True)
class Suite:
    """Collections and the contexts that their questions are put into.

    Args:
        collections: Passages and questions.
        contexts: Names of `rankings`, or "article" for the text around the gold passage as it
            stands.
        questions: Of each collection, a seeded subset; None takes all.
        embed: Texts to vectors, which "embedding" and "fusion" need.
    """

    collections: tuple[Collection, ...]
    contexts: tuple[str, ...] = ("bm25",)
    questions: int | None = None
    embed: Embedder | None = None

    def __post_init__(self) -> None:
        known = [*rankings(self.embed), ARTICLE]
        unknown = [name for name in self.contexts if name not in known]
        if unknown or not self.contexts:
            raise ConfigError(
                f"There are no contexts {unknown}; there are {known}"
                + ("." if self.embed else ", and with an embedder 'embedding' and 'fusion'.")
            )

    def describe(self) -> dict[str, Any]:
        """What must not change when a run goes on."""
        sizes = {c.name: [len(c.passages), len(c.questions)] for c in self.collections}
        return {"sets": sizes, "contexts": list(self.contexts), "questions": self.questions}

    def items(
        self, length: int, counter: Counter, *, seed: int, system: str | None
    ) -> Iterator[EvalItem]:
        """The items of one length, set by set and context by context.

        Args:
            length: Tokens of the passages, at most.
            counter: Token counter, the draft's.
            seed: Of the questions taken and of all chance.
            system: System text of the prompts.
        """
        for collection in self.collections:
            scores = rankings(self.embed, seed)
            for name in self.contexts:
                around = Around(name, length, scores.get(name))
                count = self.questions
                yield from real_items(
                    collection, around, counter, count=count, seed=seed, system=system
                )


def make_suite(names: Sequence[str], data: Path | None = None, **options: Any) -> Suite:
    """A suite by names, as the command line has them.

    Args:
        names: "python" for questions about the running Python's reference, "real" for all
            `PUBLISHED` sets, and names of `SETS`.
        data: The folder with the sets' files; None for what `DRAFTSIEVE_DATA` names. For "python"
            alone it may be the file with the questions.
        options: The rest of `Suite`.

    Raises:
        ConfigError: A set or its file does not exist.
    """
    parts: list[Collection] = []
    for name in dict.fromkeys(names):
        if name == PYTHON:
            asked = data if data is not None and data.is_file() else None
            parts += python_suite(asked).collections
        else:
            parts += real_suite(data, PUBLISHED if name == REAL else (name,)).collections
    return Suite(tuple(parts), **options)


def python_suite(path: str | Path | None = None, **options: Any) -> Suite:
    """Questions about the running Python's own language reference.

    Args:
        path: `python_reference.jsonl`; None for the one that the package carries, which in a
            checkout is in examples/data.
        options: The rest of `Suite`.

    Raises:
        ConfigError: There is no such file.
    """
    file = Path(path or next((place for place in _PLACES if place.is_file()), _PLACES[0]))
    if not file.is_file():
        raise ConfigError(
            f"The questions about Python's reference are read from {str(file)!r}, which is not "
            "there: name the file python_reference.jsonl of the project's examples/data."
        )
    return Suite((read_reference(file),), **options)


def real_suite(
    folder: str | Path | None = None, sets: Sequence[str] = PUBLISHED, **options: Any
) -> Suite:
    """Sets of real questions.

    Args:
        folder: Where their files are; None for what `DRAFTSIEVE_DATA` names.
        sets: Names of `SETS`.
        options: The rest of `Suite`.
    """
    return Suite(tuple(read_set(name, folder) for name in sets), **options)

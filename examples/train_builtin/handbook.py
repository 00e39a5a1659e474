"""Writes the demonstration handbook of an invented organisation, and questions about it.

Run `python -m examples.train_builtin.handbook` in the repository root. All names are held out: the
bundled pair has not seen them in training. The same seed gives the same files.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from dataclasses import dataclass, field
from pathlib import Path

from draftsieve.core.evaluation.world.facts import Attribute, Fact
from draftsieve.core.evaluation.world.names import VALUE_MAKERS, make_name, make_root, words

from .scenes import attributes

SEED = 4711
PAGES = {"person": 17, "project": 14, "company": 10, "device": 13, "place": 12}
QUESTIONS = {"one-fact": 30, "two-fact": 6, "all-values": 4}
_INTRODUCTIONS = {
    "person": "{e} is a colleague at the {o}, and this page tells who to turn to.",
    "project": "{e} is one of the undertakings of the {o}.",
    "company": "{e} is a partner of the {o}.",
    "device": "The {e} is in daily use at the {o}.",
    "place": "{e} is used by the {o} for meetings and events.",
}
SHORTEST, LONGEST = 190, 330  # characters of a paragraph


@dataclass(slots=True)
class Page:
    """A document under construction."""

    kind: str
    entity: str
    facts: list[Fact] = field(default_factory=list)
    others: list[Fact] = field(default_factory=list)  # about entities without a page

    @property
    def file_name(self) -> str:
        """For example `project-velmora.md`."""
        return re.sub(r"[^a-z0-9]+", "-", f"{self.kind} {self.entity}".lower()) + ".md"


class Handbook:
    """All pages, built from one seed."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.organisation = f"{make_root(self.rng, True)} Institute"
        self.fillers = Path(__file__).with_name("handbook.txt").read_text("utf-8").splitlines()
        self.names = {kind: self._names(kind, 2 * count) for kind, count in PAGES.items()}
        self.pages = [
            Page(kind, name) for kind, count in PAGES.items() for name in self.names[kind][:count]
        ]
        self.said: dict[tuple[str, str], int] = {}
        for page in self.pages:
            self._fill(page)

    def _names(self, kind: str, count: int) -> list[str]:
        names: list[str] = []
        while len(names) < count:
            name = make_name(kind, self.rng, True)
            if name not in names:
                names.append(name)
        return names

    def _value(self, attribute: Attribute, entity: str) -> str:
        if attribute.value_type in self.names:
            known = [n for n in self.names[attribute.value_type] if n != entity]
            return self.rng.choice(known)
        return VALUE_MAKERS[attribute.value_type](self.rng, True)

    def _fill(self, page: Page) -> None:
        """The page's own facts, and some about entities without a page."""
        rng, table = self.rng, attributes()[page.kind]
        for attribute in rng.sample(table, min(len(table), rng.randrange(6, 9))):
            values = {
                self._value(attribute, page.entity) for _ in range(3 if attribute.multi else 1)
            }
            page.facts += [Fact(page.entity, attribute, value) for value in sorted(values)]
        strangers = self.names[page.kind][PAGES[page.kind] :]
        for _ in range(rng.randrange(3, 6)):
            attribute = rng.choice([a for a in table if not a.multi])
            entity = rng.choice(strangers)
            if (entity, attribute.key) not in self.said:
                self.said[entity, attribute.key] = 1
                page.others.append(Fact(entity, attribute, self._value(attribute, entity)))
        rng.shuffle(page.facts)

    def filler(self) -> str:
        """One sentence of everyday handbook talk."""
        rng = self.rng
        return rng.choice(self.fillers).format(
            team=rng.choice(words("teams")),
            thing=rng.choice(words("things")),
            day=rng.choice(words("days")),
            colour=rng.choice(words("patterns")),
        )

    def text(self, page: Page) -> str:
        """The page as Markdown: a title, then paragraphs that can each stand alone."""
        rng = self.rng
        first = _INTRODUCTIONS[page.kind].format(e=page.entity, o=self.organisation)
        waiting = [*page.facts]
        for fact in page.others:
            waiting.insert(rng.randrange(len(waiting) + 1), fact)
        paragraphs: list[str] = []
        sentences = [first]
        while waiting:
            for _ in range(rng.choice((1, 1, 2))):
                if waiting:
                    fact = waiting.pop(0)
                    form = rng.choice(fact.attribute.statements)
                    sentences.append(form.format(e=fact.entity, v=fact.value))
            wanted = rng.randrange(SHORTEST, LONGEST)
            while sum(map(len, sentences)) < wanted:
                place = rng.randrange(1 if sentences[0] == first else 0, len(sentences) + 1)
                filler = self.filler()
                if filler not in sentences:
                    sentences.insert(place, filler)
            paragraphs.append(" ".join(sentences))
            sentences = []
        return "\n\n".join([f"# {page.entity}", *paragraphs]) + "\n"

    def questions(self) -> list[dict[str, str]]:
        """Questions that name their entity, spread over the pages."""
        rng = self.rng
        pages = rng.sample(self.pages, len(self.pages))
        found: list[dict[str, str]] = []
        for kind, count in QUESTIONS.items():
            made = 0
            while made < count:
                page = pages.pop(0)
                pages.append(page)
                if question := self._question(kind, page):
                    found.append({**question, "document": page.file_name, "type": kind})
                    made += 1
        return found

    def _question(self, kind: str, page: Page) -> dict[str, str] | None:
        rng = self.rng
        single = [fact for fact in page.facts if not fact.attribute.multi]
        if kind == "all-values":
            several = [fact for fact in page.facts if fact.attribute.multi]
            if len(several) < 2:
                return None
            question = rng.choice(several[0].attribute.questions).format(e=page.entity)
            return {"question": question, "answer": ", ".join(fact.value for fact in several)}
        if kind == "two-fact":
            first, second = rng.sample(single, 2)
            article = first.attribute.article
            question = (
                f"What are the {first.attribute.label} of {article}{page.entity} "
                f"and the {second.attribute.label} of {article}{page.entity}?"
            )
            return {"question": question, "answer": f"{first.value} and {second.value}"}
        fact = rng.choice(single)
        forms = fact.attribute.distant if rng.random() < 0.4 else fact.attribute.questions
        return {"question": rng.choice(forms).format(e=page.entity), "answer": fact.value}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("examples/data"))
    parser.add_argument("--seed", type=int, default=SEED)
    options = parser.parse_args()
    handbook = Handbook(options.seed)
    folder = options.out / "handbook"
    folder.mkdir(parents=True, exist_ok=True)
    for page in handbook.pages:
        (folder / page.file_name).write_text(handbook.text(page), encoding="utf-8")
    lines = [json.dumps(question, ensure_ascii=False) for question in handbook.questions()]
    path = options.out / "handbook_questions.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

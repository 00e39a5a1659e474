"""What is asked and which sentences answer it: one function a task, in the style of RULER.

RULER is arXiv 2404.06654; its needles, variables and frequent words are stated here as sentences of
passages, in the wording of `world/`, which the bundled pair reads. `tasks.py` hides the sentences
among others.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path

from .world.facts import Attribute, load_attributes
from .world.names import ENTITY_TYPES, KINDS, VALUE_MAKERS, make_name, make_root

NOT_FOUND = "not in the passages"
_ASKED_ABOUT = ("the {l} of {e}", "the {l} of {e}", "{e}'s {l}")
_WHICH = (
    "Which passage gives {what}?",
    "Give the number of the passage with {what}.",
)
_QUOTE = (
    'Complete the quotation: "{s} ..."',
    'How does this sentence go on: "{s} ..."',
    'What follows the words "{s} ..."?',
)
_MENTIONS = (
    "Much has been said about {e} in recent weeks.",
    "A short note on {e} follows.",
    "Many visitors ask about {e}.",
    "The next issue will say more about {e}.",
)


@dataclass(frozen=True, slots=True)
class Needle:
    """A sentence that an answer needs, and the value in it."""

    text: str
    value: str


@dataclass(frozen=True, slots=True)
class Puzzle:
    """A question, its answers, and what to hide and to hide it among.

    `answers` are all needed, in any order; empty where the answer is the needle's passage.
    `near` gives fresh sentences that look like needles; `near_share` is their share of the text
    around, the rest is natural.
    """

    question: str
    answers: tuple[str, ...]
    needles: tuple[Needle, ...]
    near: Callable[[], list[str]]
    near_share: float


@cache
def attributes() -> Mapping[str, tuple[Attribute, ...]]:
    """All attributes by the kind of thing that has them."""
    found = load_attributes()
    return {kind: tuple(a for a in found if a.kind == kind) for kind in KINDS}


@cache
def natural_sentences() -> tuple[str, ...]:
    """Natural sentences that the bundled pair was not trained on."""
    text = Path(__file__).with_name("world").joinpath("sentences.txt").read_text(encoding="utf-8")
    return tuple(line for line in text.splitlines() if not line.startswith("#"))


class World:
    """Fresh held-out names, and sentences about them that are never said twice.

    Args:
        rng: Source of every choice.
    """

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.names: set[str] = set()
        self.said: set[tuple[str, str]] = set()

    def name(self, kind: str) -> str:
        """A name of this kind that nothing has yet."""
        while True:
            name = make_name(kind, self.rng, held_out=True)
            if name not in self.names:
                self.names.add(name)
                return name

    def word(self) -> str:
        """One invented word that nothing is called yet."""
        while True:
            word = make_root(self.rng, held_out=True)
            if word not in self.names:
                self.names.add(word)
                return word

    def value(self, attribute: Attribute) -> str:
        """A random value; people and companies are new ones."""
        if attribute.value_type in ENTITY_TYPES:
            return self.name(attribute.value_type)
        return VALUE_MAKERS[attribute.value_type](self.rng, True)

    def say(self, entity: str, attribute: Attribute, value: str | None = None) -> Needle:
        """State a fact in one of its wordings."""
        value = self.value(attribute) if value is None else value
        self.said.add((entity, attribute.key))
        return Needle(self.rng.choice(attribute.statements).format(e=entity, v=value), value)

    def single(self, kind: str | None = None, plain: bool = False) -> Attribute:
        """An attribute with one value; `plain`: the value is no person or company."""
        chosen = kind or self.rng.choice(KINDS)
        fits = [
            attribute
            for attribute in attributes()[chosen]
            if not attribute.multi and not (plain and attribute.value_type in ENTITY_TYPES)
        ]
        return self.rng.choice(fits)

    def ask(self, attribute: Attribute, entity: str) -> str:
        """One wording of the question; nearly half of them share only the name with the fact."""
        distant = self.rng.random() < 0.45
        forms = attribute.distant if distant else attribute.questions
        return self.rng.choice(forms).format(e=entity)

    def phrase(self, attribute: Attribute, entity: str) -> str:
        """For example `the badge number of Mara Velintov`."""
        form = self.rng.choice(_ASKED_ABOUT)
        return form.format(l=attribute.label, e=attribute.article + entity)

    def others(self, asked: Attribute, *known: str) -> Callable[[], list[str]]:
        """Facts of the asked attribute about new things, and other facts, also of known things."""
        rest = [attribute for attribute in attributes()[asked.kind] if attribute is not asked]

        def near() -> list[str]:
            if self.rng.random() < 0.6:
                count = self.rng.randrange(2, 5) if asked.multi else 1
                entity = self.name(asked.kind)
                return [self.say(entity, asked).text for _ in range(count)]
            entity, attribute = self.name(asked.kind), self.rng.choice(rest)
            if known and self.rng.random() < 0.3:
                entity = self.rng.choice(known)
            if (entity, attribute.key) in self.said:
                entity = self.name(asked.kind)
            return [self.say(entity, attribute).text]

        return near


def one_key(world: World) -> Puzzle:
    """One fact in natural text; the asked thing is mentioned, no other fact is stated."""
    attribute = world.single()
    entity = world.name(attribute.kind)
    needle = world.say(entity, attribute)

    def near() -> list[str]:
        return [world.rng.choice(_MENTIONS).format(e=entity)]

    return Puzzle(world.ask(attribute, entity), (needle.value,), (needle,), near, 0.05)


def many_keys(world: World) -> Puzzle:
    """One fact among the same attribute of many others and other facts of its kind."""
    attribute = world.single()
    entity = world.name(attribute.kind)
    needle = world.say(entity, attribute)
    near = world.others(attribute, entity)
    return Puzzle(world.ask(attribute, entity), (needle.value,), (needle,), near, 0.6)


def all_values(world: World) -> Puzzle:
    """Every value of an attribute that has several."""
    attribute = world.rng.choice([a for kind in KINDS for a in attributes()[kind] if a.multi])
    entity = world.name(attribute.kind)
    values: list[str] = []
    while len(values) < 3:
        value = world.value(attribute)
        values += [value] if value not in values else []
    needles = tuple(world.say(entity, attribute, value) for value in values)
    near = world.others(attribute, entity)
    return Puzzle(world.ask(attribute, entity), tuple(values), needles, near, 0.5)


def several_questions(world: World) -> Puzzle:
    """Two facts about two things of one kind, asked at once."""
    first = world.single()
    second = world.single(first.kind)
    entities = world.name(first.kind), world.name(first.kind)
    needles = world.say(entities[0], first), world.say(entities[1], second)
    left, right = world.phrase(first, entities[0]), world.phrase(second, entities[1])
    start, end = world.rng.choice((("What are", "?"), ("Give", "."), ("Tell me", ".")))
    question = f"{start} {left} and {right}{end}"
    answers = tuple(needle.value for needle in needles)
    return Puzzle(question, answers, needles, world.others(first, *entities), 0.6)


def two_hops(world: World) -> Puzzle:
    """A property of a person or company that is itself a value."""
    return _chain(world, 2)


def three_hops(world: World) -> Puzzle:
    """One more step: a property of the value of a value."""
    return _chain(world, 3)


def _chain(world: World, hops: int) -> Puzzle:
    """Chains of the same attributes about other things stand around."""
    path = _path(world, hops)

    def state() -> tuple[str, tuple[Needle, ...]]:
        start = entity = world.name(path[0].kind)
        found: list[Needle] = []
        for attribute in path:
            found.append(world.say(entity, attribute))
            entity = found[-1].value
        return start, tuple(found)

    start, needles = state()
    asked = path[0].article + start
    for attribute in path[:-1]:
        asked = f"the {attribute.label} of {asked}"
    question = world.ask(path[-1], asked)

    def near() -> list[str]:
        return [needle.text for needle in state()[1]]

    return Puzzle(question, (needles[-1].value,), needles, near, 0.5)


def _path(world: World, hops: int) -> list[Attribute]:
    """Attributes of which each one's value has the next one."""
    while True:
        path = [world.single()]
        while len(path) < hops and path[-1].value_type in ENTITY_TYPES:
            path.append(world.single(path[-1].value_type, plain=len(path) == hops - 1))
        if len(path) == hops and len({attribute.key for attribute in path}) == hops:
            return path


def variables(world: World) -> Puzzle:
    """RULER's variable tracking: all names that a value was handed on to."""

    def chain(length: int) -> tuple[str, list[str], list[Needle]]:
        value = str(world.rng.randrange(10_000, 100_000))
        names = [world.word().upper() for _ in range(length)]
        needles = [Needle(f"VAR {names[0]} = {value}.", names[0])]
        needles += [Needle(f"VAR {new} = VAR {old}.", new) for old, new in pairwise(names)]
        return value, names, needles

    value, names, needles = chain(4)

    def near() -> list[str]:
        return [needle.text for needle in chain(2)[2]]

    question = f"Which variables have the value {value}? Name all of them."
    return Puzzle(question, tuple(names), tuple(needles), near, 0.3)


def frequent_words(world: World) -> Puzzle:
    """RULER's common words: three words stand in nearly every list, sixty others rarely."""
    common = [world.word() for _ in range(3)]
    rare = [world.word() for _ in range(60)]

    def near() -> list[str]:
        line = [word for word in common if world.rng.random() < 0.8]
        line += world.rng.sample(rare, 9 - len(line))
        world.rng.shuffle(line)
        return [f"List: {', '.join(line)}."]

    question = "Which three words occur most often in the lists?"
    return Puzzle(question, tuple(common), (), near, 1.0)


def which_passage(world: World) -> Puzzle:
    """The number of the passage that states a fact."""
    attribute = world.single()
    entity = world.name(attribute.kind)
    needle = world.say(entity, attribute)
    question = world.rng.choice(_WHICH).format(what=world.phrase(attribute, entity))
    return Puzzle(question, (), (needle,), world.others(attribute, entity), 0.6)


def unanswerable(world: World) -> Puzzle:
    """Other things have the asked property; of the asked thing other facts are stated."""
    attribute = world.single()
    entity = world.name(attribute.kind)
    world.said.add((entity, attribute.key))
    question = world.ask(attribute, entity)
    return Puzzle(question, (NOT_FOUND,), (), world.others(attribute, entity), 0.6)


def quotation(world: World) -> Puzzle:
    """The rest of a natural sentence."""
    sentence = world.rng.choice(natural_sentences())
    words = sentence.split()
    cut = world.rng.randrange(max(3, len(words) - 7), len(words) - 2)
    rest = " ".join(words[cut:])
    question = world.rng.choice(_QUOTE).format(s=" ".join(words[:cut]))
    near = world.others(world.single())
    return Puzzle(question, (rest,), (Needle(sentence, rest),), near, 0.2)


TASKS: Mapping[str, Callable[[World], Puzzle]] = {
    "one-key": one_key,
    "many-keys": many_keys,
    "all-values": all_values,
    "several-questions": several_questions,
    "two-hop": two_hops,
    "three-hop": three_hops,
    "variables": variables,
    "frequent-words": frequent_words,
    "which-passage": which_passage,
    "unanswerable": unanswerable,
    "quotation": quotation,
}

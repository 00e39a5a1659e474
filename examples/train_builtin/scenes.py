"""Invented scenes: facts about named entities, spread over numbered passages."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Literal

from draftsieve.core.evaluation.world.facts import Attribute, Fact, load_attributes, stopwords
from draftsieve.core.evaluation.world.names import ENTITY_TYPES, KINDS, VALUE_MAKERS, make_name

GAP = " … "
_FILLERS = (
    "{e} was mentioned twice in the meeting.",
    "Nobody had heard of {e} before.",
    "The newspapers wrote little about {e}.",
    "Much has been said about {e} in recent weeks.",
    "A short note on {e} follows.",
    "Many visitors ask about {e}.",
    "The annual report praises {e}.",
    "There were some complaints about {e}, but they were soon settled.",
    "An old photograph of {e} hangs in the corridor.",
    "The next issue will say more about {e}.",
)


@dataclass(frozen=True, slots=True)
class Stated:
    """A fact as it was worded, and the passage (from 1) where it stands."""

    fact: Fact
    sentence: str
    passage: int


@dataclass(slots=True)
class Scene:
    """Passages with everything that can be asked about them."""

    passages: list[str] = field(default_factory=list)
    stated: list[Stated] = field(default_factory=list)
    missing: list[Fact] = field(default_factory=list)  # true, but not in the passages
    natural: list[str] = field(default_factory=list)  # sentences that stand in the passages whole


@dataclass(frozen=True, slots=True)
class SceneOptions:
    """What a scene looks like; `None` means drawn at random."""

    characters: int
    held_out: bool = False
    focus: bool | None = None  # many entities with the same attributes
    natural_share: float | None = None
    fragments: bool | None = None
    # one attribute, always entity before value or always after it, nothing else: pure matching
    easy: Literal["forward", "backward"] | None = None
    lists: bool = False  # everything of a kind has several values of one attribute, if any can
    running: bool = False  # natural text in runs of neighbouring sentences, as of one document


@cache
def attributes() -> dict[str, list[Attribute]]:
    """All attributes by kind."""
    table: dict[str, list[Attribute]] = {kind: [] for kind in KINDS}
    for attribute in load_attributes():
        table[attribute.kind].append(attribute)
    return table


@cache
def natural_sentences(path: Path) -> list[str]:
    """The corpus, one sentence a line."""
    return path.read_text(encoding="utf-8").splitlines()


class _Builder:
    """Collects entities and facts until the scene has its size."""

    def __init__(self, rng: random.Random, options: SceneOptions) -> None:
        self.rng, self.options = rng, options
        self.names: dict[str, list[str]] = {kind: [] for kind in KINDS}
        self.facts: list[list[tuple[Fact, str]]] = []  # per entity
        self.used = 0
        focus = rng.random() < 0.6 if options.focus is None else options.focus
        kinds = rng.sample(KINDS, 1 if focus else rng.randrange(1, 4))
        most = 3 if focus else 5
        self.chosen = {
            kind: rng.sample(attributes()[kind], rng.randrange(1 + focus, most + 1))
            for kind in kinds
        }
        if options.lists:
            for kind, chosen in self.chosen.items():
                several = [attribute for attribute in attributes()[kind] if attribute.multi]
                if several and several[0] not in chosen:
                    chosen[0] = several[0]
        self.density = rng.uniform(0.4, 1.0)
        if options.easy:
            # mostly the kind whose names are one root: the first thing to match
            kinds = kinds if rng.random() < 0.4 else ["project"]
            single = [attribute for attribute in attributes()[kinds[0]] if not attribute.multi]
            self.chosen = {kinds[0]: [rng.choice(single)]}

    def new_name(self, kind: str) -> str:
        """A fresh name; now and then it shares its first word with another one."""
        rng = self.rng
        while True:
            name = make_name(kind, rng, self.options.held_out)
            others = self.names[kind]
            if kind == "person" and others and rng.random() < 0.2:
                first, last = name.split()
                other = rng.choice(others).split()
                name = f"{other[0]} {last}" if rng.random() < 0.5 else f"{first} {other[1]}"
            if name not in others:
                others.append(name)
                return name

    def value(self, attribute: Attribute, entity: str) -> str:
        """A random value; people and companies may be known already."""
        kind = attribute.value_type
        if kind in ENTITY_TYPES:
            known = [name for name in self.names[kind] if name != entity]
            if known and not self.options.easy and self.rng.random() < 0.5:
                return self.rng.choice(known)
            return self.new_name(kind)
        return VALUE_MAKERS[kind](self.rng, self.options.held_out)

    def add_entity(self, kind: str, name: str | None = None) -> None:
        """One entity with some of the chosen attributes."""
        rng = self.rng
        name = name or self.new_name(kind)
        chosen = self.chosen.get(kind) or rng.sample(attributes()[kind], 2)
        self.chosen[kind] = chosen
        picked = [a for i, a in enumerate(chosen) if i == 0 or rng.random() < self.density]
        group: list[tuple[Fact, str]] = []
        followers: list[tuple[str, str]] = []
        for attribute in picked:
            values: list[str] = []
            for _ in range(rng.randrange(2, 5) if attribute.multi else 1):
                value = self.value(attribute, name)
                if value in values:
                    continue
                values.append(value)
                forms = attribute.statements
                if self.options.easy:
                    forward = self.options.easy == "forward"
                    forms = [f for f in forms if (f.find("{e}") < f.find("{v}")) == forward]
                sentence = rng.choice(forms).format(e=name, v=value)
                group.append((Fact(name, attribute, value), sentence))
                self.used += len(sentence) + 1
                hop = attribute.value_type in ENTITY_TYPES and not self.options.easy
                if hop and rng.random() < 0.35:
                    followers.append((attribute.value_type, value))
        self.facts.append(group)
        known = {facts[0][0].entity for facts in self.facts}
        for follower_kind, follower in followers:
            if follower not in known and len(self.chosen) < 4:
                self.add_entity(follower_kind, follower)
                known.add(follower)


def make_scene(rng: random.Random, options: SceneOptions, corpus: list[str]) -> Scene:
    """Build passages of about `options.characters` characters."""
    share = options.natural_share
    share = rng.choice((0.0, 0.15, 0.3, 0.5)) if share is None else share
    builder = _Builder(rng, options)
    kinds = list(builder.chosen)
    while builder.used < options.characters * (1 - share):
        builder.add_entity(rng.choice(kinds))

    # 1. units: sentences that stay together, each with its fact or None
    units: list[list[tuple[Fact | None, str]]] = []
    together = rng.random() < 0.5
    for group in builder.facts:
        rng.shuffle(group)
        units.extend([list(group)] if together else [[pair] for pair in group])
    natural_left = options.characters * share
    everyone = [name for names in builder.names.values() for name in names]
    if options.running:
        near, place = rng.choice((200, 1000, len(corpus))), rng.randrange(len(corpus))
    while natural_left > 0:
        if options.running:
            start = (place + rng.randrange(near)) % len(corpus)
            texts = corpus[start : start + rng.randrange(1, 7)]
        elif rng.random() < 0.15:
            texts = [rng.choice(_FILLERS).format(e=rng.choice(everyone))]
        else:
            texts = [rng.choice(corpus)]
        natural_left -= sum(len(text) + 1 for text in texts)
        units.append([(None, text) for text in texts])
    rng.shuffle(units)

    # 2. passages of a few units
    fragments = rng.random() < 0.25 if options.fragments is None else options.fragments
    scene = Scene()
    most = rng.choice((1, 2, 3, 5, 8))
    position = 0
    while position < len(units):
        count = rng.randrange(1, most + 1)
        pairs = [pair for unit in units[position : position + count] for pair in unit]
        position += count
        _add_passage(rng, scene, pairs, fragments)
    return scene


def _add_passage(
    rng: random.Random, scene: Scene, pairs: list[tuple[Fact | None, str]], fragments: bool
) -> None:
    """Join the sentences to one passage; as fragments, some of them cut or gone."""
    number = len(scene.passages) + 1
    if not fragments:
        for fact, sentence in pairs:
            if fact:
                scene.stated.append(Stated(fact, sentence, number))
            else:
                scene.natural.append(sentence)
        separator = "\n\n" if rng.random() < 0.05 else "\n" if rng.random() < 0.05 else " "
        text = separator.join(sentence for _, sentence in pairs)
        if rng.random() < 0.06:
            named = next((fact.entity for fact, _ in pairs if fact), "Notes")
            text = f"# {named}\n\n{text}"
        scene.passages.append(text)
        return
    pieces: list[str] = []
    kept: list[tuple[Fact, str]] = []
    for fact, sentence in pairs:
        if rng.random() < (0.2 if fact else 0.4):
            pieces.append("")
            if fact:
                scene.missing.append(fact)
        elif fact:
            cut = cut_stopwords(rng, sentence, fact)
            kept.append((fact, cut))
            pieces.append(cut)
        else:
            pieces.append(cut_words(rng, sentence))
    text = join_pieces(pieces)
    if text.strip(" …"):
        scene.passages.append(text)
        scene.stated.extend(Stated(fact, cut, number) for fact, cut in kept)


def join_pieces(pieces: list[str]) -> str:
    """Join with one space, or with a gap mark where a piece is empty."""
    text, gap = "", False
    for piece in pieces:
        if not piece:
            gap = True
            continue
        text += (GAP if gap else " ") + piece if text else piece
        gap = False
    return text


def cut_words(rng: random.Random, sentence: str) -> str:
    """Delete one or two runs of words."""
    words = sentence.split()
    for _ in range(rng.randrange(0, 3)):
        start = rng.randrange(len(words))
        words[start : start + rng.randrange(1, 8)] = [""]
    return join_pieces(words)


def cut_stopwords(rng: random.Random, sentence: str, fact: Fact) -> str:
    """Delete some function words outside of the entity's name and the value."""
    if rng.random() < 0.4:
        return sentence
    kept = sentence.replace(fact.entity, "\0").replace(fact.value, "\1")
    words = [
        "" if word.lower().strip(".,") in stopwords() and rng.random() < 0.5 else word
        for word in kept.split()
    ]
    return join_pieces(words).replace("\0", fact.entity).replace("\1", fact.value)

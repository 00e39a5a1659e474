"""Questions with their answers about a scene."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from draftsieve.core.evaluation.world.facts import Attribute, shares_only_name
from draftsieve.core.evaluation.world.names import ENTITY_TYPES, KINDS, make_name

from .natural import cloze, quotation
from .scenes import Scene, Stated, attributes
from .turns import Sought, Turn

NOT_FOUND = "not in the passages"
_PEOPLE_FORMS = ("the {l} of {e}", "the {l} of {e}", "{e}'s {l}")
_WHICH_FORMS = (
    "Which passage gives the {l} of {e}?",
    "Which passage says it: {q}",
    "In which passage is this answered: {q}",
    "Give the number of the passage with the {l} of {e}.",
)


@dataclass(frozen=True, slots=True)
class _Index:
    """A scene's facts by (entity, attribute key)."""

    scene: Scene
    single: list[Stated]
    by_key: dict[tuple[str, str], list[Stated]]


def index_scene(scene: Scene) -> _Index:
    """Group the stated facts."""
    by_key: dict[tuple[str, str], list[Stated]] = {}
    for stated in scene.stated:
        by_key.setdefault((stated.fact.entity, stated.fact.attribute.key), []).append(stated)
    single = [s for s in scene.stated if not s.fact.attribute.multi]
    return _Index(scene, single, by_key)


def word_question(
    rng: random.Random, attribute: Attribute, entity: str, distant: bool | None = None
) -> str:
    """One wording of the question for an attribute of an entity."""
    distant = rng.random() < 0.45 if distant is None else distant
    form = rng.choice(attribute.distant if distant else attribute.questions)
    return form.format(e=entity)


def noun_phrase(rng: random.Random, attribute: Attribute, entity: str) -> str:
    """For example `the badge number of Mara Velintov`."""
    form = rng.choice(_PEOPLE_FORMS)
    return form.format(l=attribute.label, e=attribute.article + entity)


def one_fact(rng: random.Random, index: _Index, distant: bool | None = None) -> Turn | None:
    """One value."""
    if not index.single:
        return None
    stated = rng.choice(index.single)
    fact = stated.fact
    question = word_question(rng, fact.attribute, fact.entity, distant)
    only_name = shares_only_name(question, stated.sentence, fact.entity, fact.value)
    value_first = stated.sentence.find(fact.value) < stated.sentence.find(fact.entity)
    return Turn(question, fact.value, "one-fact", only_name, value_first, (Sought(stated),))


def two_facts(rng: random.Random, index: _Index) -> Turn | None:
    """Two values, in the order of the question."""
    if len(index.single) < 2:
        return None
    first, second = rng.sample(index.single, 2)
    if rng.random() < 0.4:
        same = [
            s for s in index.single if s.fact.attribute is first.fact.attribute and s is not first
        ]
        second = rng.choice(same) if same else second
    a, b = first.fact, second.fact
    if rng.random() < 0.7:
        left = noun_phrase(rng, a.attribute, a.entity)
        right = noun_phrase(rng, b.attribute, b.entity)
        start = rng.choice(("What are", "Give", "Tell me", "State"))
        question = f"{start} {left} and {right}{'?' if start == 'What are' else '.'}"
    else:
        left = word_question(rng, a.attribute, a.entity)
        right = word_question(rng, b.attribute, b.entity)
        question = f"{left} {right}"
    evidence = Sought(first), Sought(second, len(a.value) + len(" and "))
    return Turn(question, f"{a.value} and {b.value}", "two-fact", evidence=evidence)


def all_values(rng: random.Random, index: _Index) -> Turn | None:
    """Every value of a key with several values, in order of appearance."""
    groups = [g for g in index.by_key.values() if g[0].fact.attribute.multi]
    if not groups:
        return None
    group = rng.choice(groups)
    fact = group[0].fact
    question = word_question(rng, fact.attribute, fact.entity)
    evidence, answer = [], ""
    for number, stated in enumerate(group):
        answer += ", " if number else ""
        before = group[number - 1] if number else None
        evidence.append(Sought(stated, len(answer), before=before))
        answer += stated.fact.value
    return Turn(question, answer, "all-values", evidence=tuple(evidence))


def two_hop(rng: random.Random, index: _Index) -> Turn | None:
    """A property of a person or company that is itself a value; the answer names both."""
    chains = [
        (link, target)
        for link in index.single
        if link.fact.attribute.value_type in ENTITY_TYPES
        for target in index.single
        if target.fact.entity == link.fact.value
    ]
    if not chains:
        return None
    way, found = rng.choice(chains)
    link, target = way.fact, found.fact
    middle = f"the {link.attribute.label} of {link.attribute.article}{link.entity}"
    question = word_question(rng, target.attribute, middle)
    answer = f"{link.value}: {target.value}"
    evidence = Sought(way), Sought(found, len(link.value) + len(": "), said=0)
    return Turn(question, answer, "two-hop", evidence=evidence)


def which_passage(rng: random.Random, index: _Index) -> Turn | None:
    """The number of the passage that states a fact."""
    if not index.single:
        return None
    stated = rng.choice(index.single)
    fact = stated.fact
    form = rng.choice(_WHICH_FORMS)
    question = form.format(
        l=fact.attribute.label,
        e=fact.attribute.article + fact.entity,
        q=word_question(rng, fact.attribute, fact.entity),
    )
    evidence = (Sought(stated, len("["), number=True),)
    return Turn(question, f"[{stated.passage}]", "which", evidence=evidence)


def unanswerable(rng: random.Random, index: _Index, held_out: bool) -> Turn | None:
    """A known entity without the asked property, or an unknown entity."""
    scene = index.scene
    if scene.missing and rng.random() < 0.5:
        fact = rng.choice(scene.missing)
        if (fact.entity, fact.attribute.key) in index.by_key:
            return None
        attribute, entity = fact.attribute, fact.entity
    elif scene.stated and rng.random() < 0.5:
        known = rng.choice(scene.stated).fact
        entity = known.entity
        attribute = rng.choice(attributes()[known.attribute.kind])
        if (entity, attribute.key) in index.by_key:
            return None
    else:
        kind = scene.stated and rng.choice(scene.stated).fact.attribute.kind
        attribute = rng.choice(attributes()[kind or rng.choice(KINDS)])
        entity = make_name(attribute.kind, rng, held_out)
    return Turn(word_question(rng, attribute, entity), NOT_FOUND, "unanswerable")


MAKERS: dict[str, tuple[float, Callable[[random.Random, _Index], Turn | None]]] = {
    "one-fact": (0.45, one_fact),
    "two-fact": (0.08, two_facts),
    "all-values": (0.12, all_values),
    "two-hop": (0.09, two_hop),
    "which": (0.07, which_passage),
    "quotation": (0.05, lambda rng, index: quotation(rng, index.scene.natural)),
    "cloze": (0.12, lambda rng, index: cloze(rng, index.scene.natural)),
}
NATURAL_MAKERS = ("quotation", "cloze")


def make_turns(rng: random.Random, scene: Scene, held_out: bool) -> Iterator[Turn]:
    """Endless different questions about a scene, until it has no more."""
    index = index_scene(scene)
    names = [*(MAKERS if scene.stated else NATURAL_MAKERS), "unanswerable"]
    weights = [*(MAKERS[name][0] for name in names[:-1]), 0.06]
    seen: set[str] = set()
    failures = unanswered = 0
    while failures < 30:
        name = rng.choices(names, weights)[0]
        if name == "unanswerable":
            # where the facts run out, the rest must not all be unanswerable
            allowed = unanswered <= 0.12 * len(seen)
            turn = unanswerable(rng, index, held_out) if allowed else None
        else:
            turn = MAKERS[name][1](rng, index)
        mark = turn and f"{turn.type} {turn.answer if turn.answer != NOT_FOUND else turn.question}"
        if turn is None or mark in seen:
            failures += 1
            continue
        unanswered += turn.type == "unanswerable"
        seen.add(mark or "")
        yield turn


def easy_turns(rng: random.Random, scene: Scene) -> Iterator[Turn]:
    """Each fact once, asked in words near to its own."""
    for stated in rng.sample(scene.stated, len(scene.stated)):
        fact = stated.fact
        question = word_question(rng, fact.attribute, fact.entity, distant=False)
        yield Turn(question, fact.value, "one-fact", evidence=(Sought(stated),))

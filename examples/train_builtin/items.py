"""Evaluation items on held-out names: hard to guess, in prompts of a fixed size."""

from __future__ import annotations

import random
from dataclasses import dataclass

from tokenizers import Tokenizer

from draftsieve.core.evaluation.world.facts import Fact

from .generator import SYSTEM, user_message
from .questions import MAKERS, index_scene, one_fact, unanswerable
from .scenes import Scene, SceneOptions, make_scene
from .turns import Turn


@dataclass(frozen=True, slots=True)
class Cell:
    """One row of the accuracy table."""

    name: str
    type: str
    tokens: int
    facts: int  # at least this many in the prompt
    most_facts: int  # and at most this many; the rest is natural text
    fragments: bool = False
    passages: bool = True  # without them: the no-context baseline


CELLS = (
    Cell("one-fact, 500 tokens", "one-fact", 500, 15, 20),
    Cell("one-fact, 1,000 tokens", "one-fact", 1000, 25, 35),
    Cell("one-fact, 2,000 tokens", "one-fact", 2000, 40, 60),
    Cell("one-fact, 500 tokens, fragments", "one-fact", 500, 15, 20, fragments=True),
    Cell("two-fact, 500 tokens", "two-fact", 500, 15, 20),
    Cell("all-values, 500 tokens", "all-values", 500, 15, 20),
    Cell("two-hop, 500 tokens", "two-hop", 500, 15, 20),
    Cell("which passage, 500 tokens", "which", 500, 15, 20),
    Cell("unanswerable, 500 tokens", "unanswerable", 500, 15, 20),
    Cell("quotation, 500 tokens", "quotation", 500, 0, 20),
    Cell("one-fact, no passages (baseline)", "one-fact", 500, 15, 20, passages=False),
    Cell("one-fact, 500 tokens, mostly facts", "one-fact", 500, 23, 30),
    Cell("one-fact, 2,000 tokens, mostly facts", "one-fact", 2000, 80, 120),
    Cell("two-fact, 1,000 tokens", "two-fact", 1000, 25, 35),
    Cell("all-values, 1,000 tokens", "all-values", 1000, 25, 35),
    Cell("two-hop, 1,000 tokens", "two-hop", 1000, 25, 35),
    Cell("cloze, 500 tokens", "cloze", 500, 0, 20),
    Cell("one-fact, 4,000 tokens", "one-fact", 4000, 60, 160),
    Cell("one-fact, 7,800 tokens", "one-fact", 7800, 120, 320),
)
LEAST_SAME, LEAST_OTHER = 8, 4  # facts of the asked attribute; others about things of its kind


@dataclass(frozen=True, slots=True)
class Item:
    """A prompt with one question and its answer."""

    messages: list[dict[str, str]]
    turn: Turn
    tokens: int
    facts: int


def is_hard(scene: Scene, fact: Fact) -> bool:
    """Enough facts of the asked attribute, and enough others about things of the asked kind."""
    kinds = [s.fact.attribute for s in scene.stated if s.fact.attribute.kind == fact.attribute.kind]
    same = sum(attribute is fact.attribute for attribute in kinds)
    return same >= LEAST_SAME and len(kinds) - same >= LEAST_OTHER


def draw_turn(rng: random.Random, scene: Scene, cell: Cell, distant: bool) -> Turn | None:
    """A question of the cell's type, or None where this scene has none."""
    index = index_scene(scene)
    if cell.type == "unanswerable":
        return unanswerable(rng, index, held_out=True)
    if cell.type != "one-fact":
        return MAKERS[cell.type][1](rng, index)
    hard = [s for s in index.single if is_hard(scene, s.fact)]
    if not hard:
        return None
    chosen = rng.choice(hard)
    turn = one_fact(rng, index_scene(Scene(stated=[chosen])), distant)
    return turn if turn and turn.distant == distant else None


def make_items(
    cell: Cell, count: int, seed: int, corpus: list[str], tokenizer: Tokenizer
) -> list[Item]:
    """`count` items, half of them sharing only the entity's name with their fact."""
    rng = random.Random(f"{seed}/{cell.name}")
    items: list[Item] = []
    while len(items) < count:
        size = int(cell.tokens * rng.uniform(2.4, 3.8))
        # a chain or a list needs several attributes, the other questions many of the same
        focus = cell.type in ("one-fact", "which", "unanswerable")
        share = rng.uniform(0.0, 0.7)
        options = SceneOptions(size, True, focus, share, cell.fragments)
        scene = make_scene(rng, options, corpus)
        turn = draw_turn(rng, scene, cell, distant=len(items) % 2 == 0)
        if turn is None or not cell.facts <= len(scene.stated) <= cell.most_facts:
            continue
        content = user_message(scene.passages, turn.question)
        tokens = len(tokenizer.encode(content).ids)
        if not 0.88 * cell.tokens <= tokens <= 1.08 * cell.tokens:
            continue
        if not cell.passages:
            content = f"Question: {turn.question}"
        messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": content}]
        items.append(Item(messages, turn, tokens, len(scene.stated)))
    return items

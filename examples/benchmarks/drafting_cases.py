"""Requests for the drafting benchmarks, with the answers that a perfect model gives."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from compression_cost import python_reference

from draftsieve import Engine, Prompt
from draftsieve.core.generation.speculative.drafters.store import TrigramStore
from draftsieve.retrievers.folder import read_folder

HANDBOOK = Path(__file__).parent.parent / "data" / "handbook"
SHORTEST, LONGEST = 50, 200  # tokens of an answer
SYSTEM = "Answer from the passages."


@dataclass(frozen=True, slots=True)
class Case:
    """A request with the answer that a perfect model gives."""

    ids: torch.Tensor  # (tokens,) int64, the prompt
    reference: tuple[int, ...]


def make_cases(engine: Engine, count: int, seed: int = 0) -> list[Case]:
    """Quotations, lists of all values and JSON of facts, in turn, about two handbook passages."""
    chance, passages = random.Random(seed), [p.text for p in read_folder(HANDBOOK)]
    encoder = engine._need_pipeline().pair.encoder
    cases: list[Case] = []
    while len(cases) < count:
        texts = chance.sample(passages, 2)
        ask = (_quotation, _values, _json)[len(cases) % 3]
        question, answer = ask(chance, texts)
        reference = engine.encode_text(answer)[:LONGEST]
        if len(reference) >= SHORTEST:
            prompt = Prompt.from_question(question, texts, system=SYSTEM)
            cases.append(Case(encoder.encode(prompt).ids, tuple(reference)))
    return cases


def unrelated_cases(engine: Engine, count: int, *, shuffled: bool) -> list[Case]:
    """Handbook prompts with answers that copy nothing: sentences of the language reference.

    Args:
        engine: Whose tokenizer is used.
        count: Requests; no sentence is used twice.
        shuffled: Mix the text's words, so that only single words repeat.
    """
    chance = random.Random(5)
    words = " ".join(python_reference().paragraphs).split()
    if shuffled:
        chance.shuffle(words)
    ids = engine.encode_text(" ".join(words))
    prompts = make_cases(engine, count, seed=2)
    size = min(150, len(ids) // count)
    return [
        Case(case.ids, tuple(ids[size * place : size * (place + 1)]))
        for place, case in enumerate(prompts)
    ]


def handbook_store(engine: Engine) -> TrigramStore:
    """What `draftsieve drafts build` makes of the handbook."""
    store = TrigramStore()
    for passage in read_folder(HANDBOOK):
        store.learn(engine.encode_text(passage.text))
    return store


def distinct_share(tokens: Sequence[int]) -> float:
    """Different 4-grams as a share of all."""
    grams = [tuple(tokens[place : place + 4]) for place in range(len(tokens) - 3)]
    return len(set(grams)) / max(1, len(grams))


def _sentences(text: str) -> list[str]:
    return [sentence.strip() for sentence in re.split(r"(?<=[.!?])\s+", text) if sentence.strip()]


def _quotation(chance: random.Random, texts: Sequence[str]) -> tuple[str, str]:
    place = chance.randrange(len(texts))
    return f"Quote the first sentences of passage {place + 1}.", " ".join(
        _sentences(texts[place])[: chance.randrange(2, 6)]
    )


def _values(chance: random.Random, texts: Sequence[str]) -> tuple[str, str]:
    place = chance.randrange(len(texts))
    found = re.findall(r"\S*\d\S*|(?:[A-Z]\w+ )+[A-Z]\w+", texts[place])
    return f"List all names and numbers of passage {place + 1}.", ", ".join(dict.fromkeys(found))


def _json(chance: random.Random, texts: Sequence[str]) -> tuple[str, str]:
    facts = [
        {"passage": place, "fact": fact}
        for place, text in enumerate(texts, start=1)
        for fact in _sentences(text)[1 : chance.randrange(2, 4)]
    ]
    return "Give facts of the passages as JSON.", json.dumps(facts)

"""RAG conversations: passages, questions, answers, as text and as token ids."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Literal, NamedTuple

from tokenizers import Encoding, Tokenizer

from .questions import Turn, easy_turns, make_turns
from .scenes import Scene, SceneOptions, make_scene

SYSTEM = "Answer the question using only the passages."
_OTHER_SYSTEMS = (
    None,
    None,
    None,
    "You are a helpful assistant.",
    "Use the passages.",
    "Answer briefly.",
    "Answer from the passages and keep it short.",
)
BACKWARD_SHARE = 0.5  # of the easy rows: values that come before their entity are harder to find
CHARACTERS_PER_TOKEN = 2.9  # of fact-rich passages under the bundled tokenizer


@dataclass(frozen=True, slots=True)
class Conversation:
    """A scene with the questions asked about it."""

    system: str | None
    scene: Scene
    turns: list[Turn]
    bare: list[bool]  # whether a turn leaves out the word "Question:"

    def messages(self, turns: int) -> list[dict[str, str]]:
        """Chat messages up to and with question `turns`, whose answer is left out."""
        messages = [{"role": "system", "content": self.system}] if self.system else []
        for number, turn in enumerate(self.turns[:turns]):
            messages.append({"role": "user", "content": self.user_text(number)})
            if number < turns - 1:
                messages.append({"role": "assistant", "content": turn.answer})
        return messages

    def user_text(self, number: int) -> str:
        """The user's message of a turn; the first one holds the passages."""
        turn = self.turns[number]
        if number == 0:
            return user_message(self.scene.passages, turn.question, self.bare[0])
        return turn.question if self.bare[number] else f"Question: {turn.question}"


def user_message(passages: list[str], question: str, bare: bool = False) -> str:
    """Numbered passages, then the question: the bundled prompt format.

    A `bare` question goes without its heading, as in frameworks' chat messages.
    """
    parts = [f"[{number}] {text}" for number, text in enumerate(passages, 1)]
    return "\n\n".join([*parts, question if bare else f"Question: {question}"])


def make_conversation(
    rng: random.Random, options: SceneOptions, most_turns: int, corpus: list[str]
) -> Conversation:
    """A scene with up to `most_turns` questions."""
    while True:
        scene = make_scene(rng, options, corpus)
        makers = (
            easy_turns(rng, scene) if options.easy else make_turns(rng, scene, options.held_out)
        )
        turns = list(islice(makers, most_turns))
        if turns:
            break
    short = options.characters < 300
    system = SYSTEM if rng.random() < (0.2 if short else 0.7) else rng.choice(_OTHER_SYSTEMS)
    return Conversation(system, scene, turns, [rng.random() < 0.1 for _ in turns])


def segments(conversation: Conversation) -> list[str]:
    """Text cut before and after each answer: prompt, answer, prompt, answer, ...

    Joined, they equal the chat template's text; each answer ends with `<|im_end|>`.
    """
    parts: list[str] = []
    lead = f"<|im_start|>system\n{conversation.system}<|im_end|>\n" if conversation.system else ""
    for number, turn in enumerate(conversation.turns):
        text = conversation.user_text(number)
        parts.append(f"{lead}<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n")
        parts.append(f"{turn.answer}<|im_end|>")
        lead = "\n"
    return parts


LINK_KINDS = (
    "value to name",
    "name to value",
    "name to second token of value",
    "name asked for",
    "value",
    "name",
    "rest of value",
    "what follows a quotation",
)
EVIDENCE_KINDS = range(4, 8)  # the answer looks at the fact; the others prepare it, lower down
BOUND_STEPS = 3  # tokens of an answer that depend on the name; later ones follow from those before


class Link(NamedTuple):
    """A position, and an earlier one that a head should look at; `kind` is one of `LINK_KINDS`."""

    asking: int
    found: int
    kind: int


@dataclass(frozen=True, slots=True)
class Row:
    """A training row: ids, and for each answer its type and where it lies."""

    ids: list[int]
    answers: list[tuple[str, int, int]]  # type, start, end
    links: list[Link]


def _context_share(length: int) -> tuple[float, float]:
    """How much of a row the passages take; short rows still need room for questions."""
    if length <= 256:
        return 0.15, 0.4
    if length <= 512:
        return 0.25, 0.6
    return (0.35, 0.88) if length <= 1024 else (0.35, 0.92)


def make_row(
    rng: random.Random,
    tokenizer: Tokenizer,
    corpus: list[str],
    length: int,
    held_out: bool,
    easy: bool = False,
) -> Row:
    """One conversation of at most `length` tokens with at least one answer."""
    while True:
        share = rng.uniform(*_context_share(length))
        size = int(length * share * CHARACTERS_PER_TOKEN)
        options = SceneOptions(characters=size, held_out=held_out)
        if easy:
            order: Literal["forward", "backward"] = (
                "backward" if rng.random() < BACKWARD_SHARE else "forward"
            )
            options = SceneOptions(size, held_out, True, 0.0, False, easy=order)
        most_turns = 3 + int(length * (1 - share) / 22)
        conversation = make_conversation(rng, options, most_turns, corpus)
        parts = segments(conversation)
        encoded = tokenizer.encode_batch(parts, add_special_tokens=False)
        ids: list[int] = []
        answers: list[tuple[str, int, int]] = []
        links: list[Link] = []
        for number, turn in enumerate(conversation.turns):
            prompt, answer = encoded[2 * number : 2 * number + 2]
            if len(ids) + len(prompt.ids) + len(answer.ids) > length:
                break
            ids += prompt.ids
            answers.append((turn.type, len(ids), len(ids) + len(answer.ids)))
            links += _links(conversation, number, parts, encoded, len(ids) - 1)
            ids += answer.ids
        if answers:
            return Row(ids, answers, links)


def _links(
    conversation: Conversation, number: int, parts: list[str], encoded: list[Encoding], asking: int
) -> list[Link]:
    """Where to look for the answer of a turn that begins behind position `asking`.

    A value belongs to a name: the later of the two looks at the earlier one. What begins the
    answer looks at the name in the question, and at the later of the two in the fact.
    """
    turn = conversation.turns[number]
    if turn.begun:
        return _quotation_links(turn.begun, parts[0], encoded, number, asking)
    if not (stated := turn.evidence):
        return []
    sentence, fact = stated.sentence, stated.fact
    passage = parts[0].index(conversation.scene.passages[stated.passage - 1])
    start = parts[0].find(sentence, passage)
    value, name = sentence.find(fact.value), sentence.find(fact.entity)
    if min(start, value, name) < 0:
        return []
    first = encoded[0].char_to_token(start + value)
    last = encoded[0].char_to_token(start + name + len(fact.entity) - 1)
    if first is None or last is None:
        return []
    place = parts[2 * number].rfind(fact.entity)
    asked = encoded[2 * number].char_to_token(place + len(fact.entity) - 1) if place >= 0 else None
    offset = asking + 1 - len(encoded[2 * number].ids)
    read, said = encoded[0].ids, encoded[2 * number + 1].ids
    links: list[Link] = []
    for step in range(len(said) - 1):
        if step and (first + step >= len(read) or said[step] != read[first + step]):
            break
        if asked is not None and step < BOUND_STEPS:
            links.append(Link(asking + step, offset + asked, 3))
        links += _step_links(step, first, last, asking)
    return links


def _quotation_links(
    begun: str, text: str, encoded: list[Encoding], number: int, asking: int
) -> list[Link]:
    """Behind the dots the answer looks at the last quoted word, and at what follows it."""
    start = text.find(begun)
    first = encoded[0].char_to_token(start + len(begun) + 1) if start >= 0 else None
    question, answer = encoded[2 * number], encoded[2 * number + 1]
    dots = [place for place, token in enumerate(question.tokens) if token == "Ġ."]
    lead = answer.char_to_token(len("... "))
    if first is None or lead is None or not dots:
        return []
    links = [Link(asking + lead, asking + dots[-1] - len(question.ids), 3)]
    read = encoded[0].ids[first:]
    for step, token in enumerate(answer.ids[lead:-1]):
        if step >= len(read) or token != read[step]:
            break
        links.append(Link(asking + lead + step, first + step, 6 if step else 7))
    return links


def _step_links(step: int, first: int, last: int, asking: int) -> Iterator[Link]:
    """Links of token `step` of a value that begins at `first`, with the name ending at `last`."""
    if first > last:
        if step < BOUND_STEPS:
            yield Link(first + step, last, 0)
        yield Link(asking + step, first + step, 6 if step else 4)
    elif step < 2:
        yield Link(last, first + step, 1 + step)
        yield Link(asking + step, last, 5)
    else:
        yield Link(asking + step, first + step, 6)

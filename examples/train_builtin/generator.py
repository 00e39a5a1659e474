"""RAG conversations: passages, questions, answers, as text and as token ids."""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import islice
from typing import Literal

from tokenizers import Tokenizer

from .links import Link, Reading
from .questions import easy_turns, make_turns
from .scenes import Scene, SceneOptions, make_scene
from .turns import Turn

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
LISTS_SHARE = 0.35  # of the training rows of all kinds of questions
RowKind = Literal["all", "easy", "natural"]
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
    kind: RowKind = "all",
) -> Row:
    """One conversation of at most `length` tokens with at least one answer.

    An "easy" one states one attribute of several entities, a "natural" one has no facts, only
    neighbouring sentences of the corpus.
    """
    while True:
        share = rng.uniform(*_context_share(length))
        size = int(length * share * CHARACTERS_PER_TOKEN)
        lists = kind == "all" and not held_out and rng.random() < LISTS_SHARE
        options = SceneOptions(characters=size, held_out=held_out, lists=lists)
        if kind == "natural":
            options = SceneOptions(size, held_out, False, 1.0, False, running=True)
        if kind == "easy":
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
            texts = parts[0], encoded[0], parts[2 * number], prompt
            links += Reading(conversation.scene, *texts, answer, len(ids) - 1).links(turn)
            ids += answer.ids
        if answers:
            return Row(ids, answers, links)

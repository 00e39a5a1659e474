"""Evaluation items: a question over passages, its answers, and where the evidence stands.

The same seed, length and token counter give the same items. Every name is held out.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import cycle
from typing import Any, Literal

from ..errors import ConfigError
from ..prompt.messages import DEFAULT_SYSTEM, QUESTION_HEADING, Prompt
from ..specpc.units import sentence_spans
from .puzzles import NOT_FOUND, TASKS, Needle, Puzzle, World, natural_sentences
from .squad import Article, Counter, Scorer, build_items, sample_questions

INSTRUCTIONS = (
    "Answer the question using only the passages. Give only the answer, as short as possible and "
    'in the words of the passages, without a sentence around it. Join several answers by ", ". '
    f"Name a passage by its number, like [3]. If the passages do not say it, answer: {NOT_FOUND}"
)  # for models that were not trained on this format
NATURAL = "squad"  # the task name of items from a SQuAD file
DEPTHS = 10  # needles are spread evenly over this many parts of the prompt


@dataclass(frozen=True, slots=True)
class Place:
    """Characters start..end (end exclusive) of a passage."""

    passage: int
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Evidence:
    """What must survive compression: a value, and the sentence around it."""

    value: Place
    sentence: Place


@dataclass(frozen=True, slots=True)
class Turn:
    """What was said before the question; `role` is "user" or "assistant"."""

    role: str
    text: str


@dataclass(frozen=True, slots=True)
class EvalItem:
    """One question with its passages.

    `task` is a generated one, `NATURAL`, or "SET/CONTEXT" for real questions (`realtext`).
    `answers` are all needed (`need="all"`) or alternatives (`need="any"`); so is `evidence`.
    `depth` is the place of the evidence, 0 at the start of the passages, 1 at their end.
    `turns` is the conversation so far; the passages stand behind it. `kind` tells apart questions
    of one task.
    """

    id: str
    task: str
    length: int  # tokens asked for
    question: str
    passages: tuple[str, ...]
    answers: tuple[str, ...]
    need: Literal["all", "any"]
    evidence: tuple[Evidence, ...]
    depth: float | None
    question_first: bool = False
    system: str | None = DEFAULT_SYSTEM
    turns: tuple[Turn, ...] = ()
    kind: str = ""

    def prompt(self) -> Prompt:
        """The request as the engine takes it."""
        if self.question_first:
            return question_first(self.question, self.passages, self.system, self.turns)
        if self.turns:
            text = {"type": "text", "text": QUESTION_HEADING + self.question}
            return _conversation(self.turns, [*_blocks(self.passages), text], self.system)
        return Prompt.from_question(self.question, self.passages, system=self.system)

    @property
    def real(self) -> bool:
        """Whether people asked it, about what people wrote."""
        return is_real(self.task)

    @property
    def said_by_user(self) -> str:
        """The user's turns and the question, one a line."""
        said = [turn.text for turn in self.turns if turn.role == "user"]
        return "\n".join([*said, self.question])

    @property
    def reference(self) -> str:
        """The answer that is read to a target, to ask how likely it finds it."""
        return ", ".join(self.answers) if self.need == "all" else self.answers[0]

    def as_json(self) -> dict[str, Any]:
        """For other programs that shall answer the same items, and for `from_json`."""
        return asdict(self)

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> EvalItem:
        """The item that `as_json` described."""
        evidence = tuple(
            Evidence(Place(**part["value"]), Place(**part["sentence"])) for part in row["evidence"]
        )
        lists = {
            "passages": tuple(row["passages"]),
            "answers": tuple(row["answers"]),
            "evidence": evidence,
            "turns": tuple(Turn(**turn) for turn in row.get("turns", ())),
        }
        return cls(**{**row, **lists})


def is_real(task: str) -> bool:
    """Whether a task's name is that of real questions."""
    return "/" in task


def question_first(
    question: str, passages: Sequence[str], system: str | None, turns: Sequence[Turn] = ()
) -> Prompt:
    """The usual prompt with the question in front of the passages."""
    text = {"type": "text", "text": QUESTION_HEADING + question}
    return _conversation(turns, [text, *_blocks(passages)], system)


def _conversation(
    turns: Sequence[Turn], blocks: Sequence[dict[str, str]], system: str | None
) -> Prompt:
    lead = [{"role": "system", "content": system}] if system else []
    said = [{"role": turn.role, "content": turn.text} for turn in turns]
    return Prompt.from_messages([*lead, *said, {"role": "user", "content": blocks}])


def _blocks(passages: Sequence[str]) -> list[dict[str, str]]:
    return [{"type": "document", "text": text} for text in passages]


def make_items(
    tasks: Sequence[str],
    length: int,
    count: int,
    counter: Counter,
    *,
    seed: int = 0,
    question_first: bool = False,
    system: str | None = DEFAULT_SYSTEM,
) -> list[EvalItem]:
    """Generate items, spread evenly over tasks and taken from them in turn.

    Args:
        tasks: Names of `puzzles.TASKS`.
        length: Tokens of the user's message (passages and question) that an item has at most; it
            is filled as far as whole sentences allow.
        count: Number of items in all.
        counter: Token counter, the draft's.
        seed: Items of different seeds have nothing in common.
        question_first: Put the question in front of the passages.
        system: System text of the prompts.

    Raises:
        ConfigError: A task does not exist, or the length cannot hold one.
    """
    unknown = sorted(set(tasks) - set(TASKS))
    if unknown or not tasks:
        raise ConfigError(f"There is no task {unknown}; there are: {sorted(TASKS)}.")
    items = []
    for place in range(count):
        task, number = tasks[place % len(tasks)], place // len(tasks)
        items.append(
            make_item(
                task,
                length,
                number,
                counter,
                seed=seed,
                question_first=question_first,
                system=system,
            )
        )
    return items


def make_item(
    task: str,
    length: int,
    number: int,
    counter: Counter,
    *,
    seed: int = 0,
    question_first: bool = False,
    system: str | None = DEFAULT_SYSTEM,
) -> EvalItem:
    """Generate one item; arguments as for `make_items`, `number` counts the items of a task."""
    rng = random.Random(f"{seed}/{task}/{length}/{number}")
    puzzle = TASKS[task](World(rng))
    # every ten items of a task cover all depths once, in a seeded order
    order = list(range(DEPTHS))
    random.Random(f"{seed}/{task}/{number // DEPTHS}").shuffle(order)
    depth = (order[number % DEPTHS] + rng.random()) / DEPTHS
    laid = _fill(rng, puzzle, length, depth, counter)
    evidence = tuple(_evidence(laid.passages, needle) for needle in puzzle.needles)
    answers = puzzle.answers or (f"[{evidence[0].value.passage + 1}]",)
    identity = f"{task}-{length}-{seed}-{number}" + ("-first" if question_first else "")
    return EvalItem(
        identity,
        task,
        length,
        puzzle.question,
        laid.passages,
        answers,
        "all",
        evidence,
        mean_depth(laid.passages, evidence),
        question_first,
        system,
    )


def natural_items(
    article: Article,
    length: int,
    count: int,
    counter: Counter,
    score: Scorer,
    *,
    seed: int = 0,
    question_first: bool = False,
    system: str | None = DEFAULT_SYSTEM,
) -> list[EvalItem]:
    """Questions of a SQuAD file, each among the paragraphs that a retriever ranks highest.

    Args:
        article: What `squad.read_article` read.
        length: Tokens of the passages at most.
        count: Number of questions, a seeded subset.
        counter: Token counter, the draft's.
        score: The retriever.
        seed: Of the subset and of the order of the passages.
        question_first: As for `make_items`.
        system: As for `make_items`.
    """
    questions = sample_questions(article, count, seed)
    items = []
    for found in build_items(article, questions, score, counter, max_tokens=length, seed=seed):
        texts = tuple(passage.text for passage in found.passages)
        evidence = tuple(
            evidence_around(texts, Place(found.gold, answer.start, answer.end))
            for answer in found.question.answers
        )
        suffix = "-first" if question_first else ""
        items.append(
            EvalItem(
                f"{NATURAL}-{length}-{seed}-{found.question.id}{suffix}",
                NATURAL,
                length,
                found.question.text,
                texts,
                tuple(sorted({answer.text for answer in found.question.answers})),
                "any",
                evidence,
                mean_depth(texts, evidence[:1]),
                question_first,
                system,
            )
        )
    return items


# ---------------------------------------------------------------- laying out


@dataclass(frozen=True, slots=True)
class _Laid:
    passages: tuple[str, ...]
    tokens: int


def _fill(rng: random.Random, puzzle: Puzzle, length: int, depth: float, counter: Counter) -> _Laid:
    """As many sentences around the needles as the length holds."""
    around = _surroundings(rng, puzzle, length, counter)
    places = sorted(rng.random() for _ in puzzle.needles)
    if places:
        places[rng.randrange(len(places))] = depth
    places.sort()
    most, layout = rng.choice((2, 3, 5, 8)), rng.random()

    def lay(size: int) -> _Laid:
        units = list(around[:size])
        spots = [round(place * size) for place in places]
        for spot, needle in reversed(list(zip(spots, puzzle.needles, strict=True))):
            units.insert(spot, needle.text)
        passages = _group(random.Random(layout), units, most)
        return _Laid(passages, counter(_user_text(passages, puzzle.question)))

    low, high = 0, len(around) + 1  # `low` sentences fit, `high` do not (or are not there)
    best = lay(0)
    if best.tokens > length or not around:
        raise ConfigError(f"length={length} cannot hold the question and its evidence: raise it.")
    while high - low > 1:
        middle = (low + high) // 2
        tried = lay(middle)
        if tried.tokens <= length:
            low, best = middle, tried
        else:
            high = middle
    return best


def _surroundings(rng: random.Random, puzzle: Puzzle, length: int, counter: Counter) -> list[str]:
    """Sentences in random order, by estimate a little more than the length holds."""
    hidden = {needle.text for needle in puzzle.needles}
    natural = [sentence for sentence in natural_sentences() if sentence not in hidden]
    rng.shuffle(natural)
    endless = cycle(natural)
    found: list[str] = []
    tokens = 0
    while tokens < 1.1 * length + 50:
        group = puzzle.near() if rng.random() < puzzle.near_share else [next(endless)]
        found += group
        tokens += sum(map(counter, group))
    rng.shuffle(found)
    return found


def _group(rng: random.Random, units: Sequence[str], most: int) -> tuple[str, ...]:
    """Passages of one to `most` sentences."""
    passages, position = [], 0
    while position < len(units):
        size = rng.randrange(1, most + 1)
        passages.append(" ".join(units[position : position + size]))
        position += size
    return tuple(passages)


def _user_text(passages: Sequence[str], question: str) -> str:
    """The user's message as the bundled prompt format has it."""
    prompt = Prompt.from_question(question, passages, system=None)
    (message,) = prompt.messages
    return "".join(part.text for part in prompt.layout(message))


def _evidence(passages: Sequence[str], needle: Needle) -> Evidence:
    """Where a needle stands; its text occurs once."""
    index, first = next(
        (i, text.find(needle.text)) for i, text in enumerate(passages) if needle.text in text
    )
    value = first + needle.text.rfind(needle.value)
    return Evidence(
        Place(index, value, value + len(needle.value)),
        Place(index, first, first + len(needle.text)),
    )


def evidence_around(passages: Sequence[str], value: Place) -> Evidence:
    """A value with the sentence, or the sentences, that it touches."""
    spans = [
        (start, end)
        for start, end in sentence_spans(passages[value.passage])
        if start < value.end and end > value.start
    ]
    start = min([value.start, *(start for start, _ in spans)])
    end = max([value.end, *(end for _, end in spans)])
    return Evidence(value, Place(value.passage, start, end))


def mean_depth(passages: Sequence[str], evidence: Sequence[Evidence]) -> float | None:
    """Mean place of the evidence as a share of the passages' characters."""
    if not evidence:
        return None
    starts = [0]
    for text in passages:
        starts.append(starts[-1] + len(text))
    places = [starts[e.value.passage] + e.value.start for e in evidence]
    return sum(places) / len(places) / max(1, starts[-1])

"""Methods x budgets x lengths x tasks in one run: the same items for all, greedy, resumable.

    items -> (per item) draft readings and full prefill, once -> every method and budget
          -> results.jsonl -> table.md, accuracy plots

A run that was interrupted goes on where it stopped when it is started again with the same options;
methods, budgets and lengths may be added to a finished one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..errors import ConfigError, DraftSieveError, OutOfMemoryError
from ..prompt.messages import DEFAULT_SYSTEM
from ..specpc.bm25 import bm25
from .answer_words import words_kept
from .kept_summary import kept_markdown
from .likelihood import divergence
from .methods import EvalMethod, Run, find_methods
from .metrics import score_answer, survival
from .plots import write_plots
from .puzzles import TASKS
from .realtext.suites import Suite
from .records import ITEMS, Record, append, open_folder, write_lines
from .shared import Bench, Case
from .spoken import score_spoken
from .squad import read_article
from .summary import markdown
from .tasks import EvalItem, make_items, natural_items

logger = logging.getLogger(__name__)
TABLE = "table.md"


@dataclass(frozen=True, slots=True)
class Grid:
    """What a run measures.

    Args:
        methods: Names as for `find_methods`.
        budgets: Shares of the passages' tokens that may stay, in (0, 1].
        lengths: Tokens of the prompts.
        tasks: Names of `puzzles.TASKS`; none with `data` alone.
        items: Generated items a length, spread evenly over the tasks.
        data: A SQuAD-format file with natural text, or None.
        natural: Questions of that file a length.
        seed: Of the items.
        question_first: Put the question in front of the passages.
        system: System text of all prompts.
        reference: The method that the others are compared with.
        suite: Real questions, asked at each length.
        kept_only: Measure what stays of the prompts, and answer nothing: no target is read.
    """

    methods: tuple[str, ...] = ("table",)
    budgets: tuple[float, ...] = (0.125,)
    lengths: tuple[int, ...] = (1000,)
    tasks: tuple[str, ...] = tuple(TASKS)
    items: int = 200
    data: Path | None = None
    natural: int = 100
    seed: int = 0
    question_first: bool = False
    system: str | None = DEFAULT_SYSTEM
    reference: str = "none"
    suite: Suite | None = None
    kept_only: bool = False

    def __post_init__(self) -> None:
        wrong = [budget for budget in self.budgets if not 0 < budget <= 1]
        if wrong or not self.budgets:
            raise ConfigError(f"Budgets are shares in (0, 1], but one is {wrong}.")
        if self.items < 0 or self.natural < 0 or not self.lengths:
            raise ConfigError("A run needs at least one length, and no negative numbers of items.")
        if not self.tasks and self.data is None and self.suite is None:
            raise ConfigError(
                "There is nothing to measure: name tasks, or give a data file or a suite."
            )
        if self.data is not None and not self.data.is_file():
            raise ConfigError(
                f"{str(self.data)!r} is no file with questions: give one in SQuAD's format, or a "
                "suite for a folder of data sets."
            )
        unknown = [task for task in self.tasks if task not in TASKS]
        if unknown:
            raise ConfigError(f"There are no tasks {unknown}; there are: {sorted(TASKS)}.")
        found = find_methods(self.methods)
        textless = [method.name for method in found if method.keep is None]
        if self.kept_only and textless:
            raise ConfigError(
                f"{', '.join(textless)}: what they keep is no text, so that kept_only has nothing "
                "to measure: leave them out, or let the target answer."
            )
        names = [method.name for method in found]
        if self.reference not in names:
            raise ConfigError(
                f"The reference {self.reference!r} is not among the methods of this run: {names}."
            )

    def describe(self, bench: Bench) -> dict[str, Any]:
        """What must not change when a run goes on; methods, budgets and lengths may."""
        return {
            **bench.names,
            "weights": bench.weights,
            "max_new_tokens": bench.generation.max_new_tokens,
            "tasks": list(self.tasks),
            "items": self.items,
            "data": None if self.data is None else self.data.name,
            "natural": self.natural,
            "seed": self.seed,
            "question_first": self.question_first,
            "system": self.system,
            **({} if bench.embedder is None else {"embedder": str(bench.embedder)}),
            **({} if self.suite is None else {"suite": self.suite.describe()}),
            **({"kept_only": True} if self.kept_only else {}),
        }


def run(bench: Bench, grid: Grid, folder: Path, *, progress: bool = True) -> list[Record]:
    """Measure everything that the folder does not hold yet, and write table and plots.

    Args:
        bench: The pair.
        grid: What to measure.
        folder: Gets items.jsonl, results.jsonl, table.md and, with matplotlib, the plots.
        progress: Show a bar with the time left.

    Returns:
        The records of this grid, also those of earlier runs.

    Raises:
        ConfigError: The folder holds results of another run, or a name does not exist.
    """
    methods = usable(find_methods(grid.methods), bench)
    if grid.reference not in {method.name for method in methods}:
        raise ConfigError(
            f"The reference {grid.reference!r} is not among the methods of this run: "
            f"{[method.name for method in methods]}."
        )
    done = {record.key: record for record in open_folder(folder, grid.describe(bench))}
    items = list(build(bench, grid))
    write_lines(folder / ITEMS, (item.as_json() for item in items))
    wanted = [(item, method, budget) for item in items for method, budget in cells(methods, grid)]
    keys = {(item.id, method.name, budget) for item, method, budget in wanted}
    with tqdm(
        total=len(keys), initial=len(keys & set(done)), unit="run", disable=not progress
    ) as bar:
        for item in items:
            missing = [
                (method, budget)
                for method, budget in cells(methods, grid)
                if (item.id, method.name, budget) not in done
            ]
            for record in measure(bench, item, missing, kept_only=grid.kept_only):
                append(folder, record)
                done[record.key] = record
                bar.update()
    found = [record for key, record in done.items() if key in keys]
    write_report(found, grid, bench, folder)
    return found


def usable(methods: Sequence[EvalMethod], bench: Bench) -> list[EvalMethod]:
    """The methods whose needs are met; the others are left out with a warning."""
    found = []
    for method in methods:
        try:
            if method.check is not None:
                method.check(bench)
            found.append(method)
        except DraftSieveError as error:
            logger.warning("%s is skipped: %s", method.name, error)
    return found


def cells(methods: Iterable[EvalMethod], grid: Grid) -> Iterator[tuple[EvalMethod, float]]:
    """Every method with every budget; reading everything has none."""
    for method in methods:
        for budget in (1.0,) if method.kind == "none" else grid.budgets:
            yield method, budget


def build(bench: Bench, grid: Grid) -> Iterator[EvalItem]:
    """The items of all lengths, generated ones first."""
    article = None if grid.data is None else read_article(grid.data)
    count = bench.draft.count_tokens
    for length in grid.lengths:
        if grid.tasks:
            yield from make_items(
                grid.tasks,
                length,
                grid.items,
                count,
                seed=grid.seed,
                question_first=grid.question_first,
                system=grid.system,
            )
        if article is not None:
            yield from natural_items(
                article,
                length,
                grid.natural,
                count,
                bm25,
                seed=grid.seed,
                question_first=grid.question_first,
                system=grid.system,
            )
        if grid.suite is not None:
            yield from grid.suite.items(length, count, seed=grid.seed, system=grid.system)


def measure(
    bench: Bench,
    item: EvalItem,
    missing: Sequence[tuple[EvalMethod, float]],
    *,
    kept_only: bool = False,
) -> Iterator[Record]:
    """Run methods on one item; readings and prefill are made once, answers none if `kept_only`."""
    if not missing:
        return
    case = bench.open(item)
    draft_correct = None if kept_only else _draft_right(case)
    for method, budget in missing:
        act = method.keep if kept_only else method.run
        assert act is not None  # `Grid` refuses methods that keep no text
        yield _record(case, method, budget, act, draft_correct)


def _draft_right(case: Case) -> bool | None:
    """Whether the draft answers the whole prompt right by itself; None where it cannot."""
    try:
        return _right(case, case.draft_answer())
    except OutOfMemoryError:
        raise
    except DraftSieveError as error:
        logger.info("The draft cannot answer %s itself: %s", case.item.id, error)
        return None


def _record(
    case: Case,
    method: EvalMethod,
    budget: float,
    act: Callable[[Case, float], Run],
    draft_correct: bool | None,
) -> Record:
    """One run, scored; a method that refuses an item has answered wrongly."""
    item, error = case.item, None
    try:
        done = act(case, budget)
    except OutOfMemoryError:
        raise
    except DraftSieveError as refused:
        error = f"{type(refused).__name__}: {refused}"
        logger.warning("%s on %s: %s", method.name, item.id, error)
        nothing = None if method.keep is None else tuple(() for _ in item.passages)
        done = Run("", 0, 0, nothing, 0.0, 0.0)
    return score_run(case, method.name, budget, done, draft_correct, error)


def score_run(
    case: Case, method: str, budget: float, done: Run, draft_correct: bool | None, error: str | None
) -> Record:
    """What a method did, as a record.

    Args:
        case: The item.
        method: Its name.
        budget: What it was given.
        done: What it did.
        draft_correct: As in `Record`.
        error: Why it did not, if so.
    """
    item = case.item
    score = (score_spoken if case.spoken else score_answer)(item, done.text)
    reading, full = done.reading, None if done.reading is None else case.full_reading()
    alive = None if done.kept is None else survival(item, done.kept)
    return Record(
        item=item.id,
        task=item.task,
        length=item.length,
        question_first=item.question_first,
        depth=item.depth,
        method=method,
        budget=budget,
        answer=done.text,
        correct=score.correct and error is None,
        recall=score.recall,
        f1=score.f1,
        survived=None if alive is None else alive[0],
        sentences_survived=None if alive is None else alive[1],
        full_tokens=len(case.tokens),
        prompt_tokens=done.prompt_tokens,
        cache_tokens=done.cache_tokens,
        draft_seconds=round(done.draft_seconds, 4),
        target_seconds=round(done.target_seconds, 4),
        draft_correct=draft_correct,
        error=error,
        kind=item.kind,
        log_likelihood=None if reading is None else reading.log_likelihood,
        divergence=None if reading is None or full is None else divergence(full, reading),
        own_divergence=done.own_divergence,
        words_kept=None if done.kept is None else words_kept(item, done.kept),
    )


def _right(case: Case, text: str) -> bool:
    """Whether an answer is right: in so many words, or for sentences where it contains it."""
    if case.spoken:
        return score_spoken(case.item, text).recall == 1
    return score_answer(case.item, text).correct


def write_report(records: Sequence[Record], grid: Grid, bench: Bench, folder: Path) -> None:
    """Write the table, and the plots where matplotlib is installed."""
    title = f"{bench.names['target']} with {bench.names['draft']}, seed {grid.seed}"
    shown = kept_markdown if grid.kept_only else markdown
    text = shown(records, reference=grid.reference, title=title)
    (folder / TABLE).write_text(text, encoding="utf-8")
    if not grid.kept_only:
        write_plots(records, folder)

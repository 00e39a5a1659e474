"""One answer decoded in one way and timed: our loop with any drafter, or transformers' generate."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from drafting_cases import LONGEST, SHORTEST, Case
from transformers import PreTrainedModel

from draftsieve import Engine, Generation
from draftsieve.core.config import DraftKind
from draftsieve.core.generation.decode import next_tokens
from draftsieve.core.generation.speculative.drafters.tree import Drafter
from draftsieve.core.generation.speculative.select import Drafters, DraftPlan
from draftsieve.core.generation.speculative.verify import Speculation, Tally, verified_tokens
from draftsieve.core.models.loading import end_token_ids

Way = DraftKind | dict[str, Any] | None  # a drafter of ours, options of generate, or nothing
THEIRS: dict[str, dict[str, Any]] = {
    "HF plain": {},
    "HF prompt lookup": {"prompt_lookup_num_tokens": 10},
    "HF assisted": {"assistant_model": None},  # the engine's draft
}


@dataclass(frozen=True, slots=True)
class Run:
    """One answer decoded in one way."""

    tokens: tuple[int, ...]
    forwards: int  # of the target, behind the one that read the prompt
    seconds: float  # of the whole answer, reading included
    drafting: float = 0.0  # seconds of proposing and observing


def run(engine: Engine, drafters: Drafters | None, case: Case, way: Way, forced: bool) -> Run:
    """Decode one answer.

    Args:
        engine: Target and draft.
        drafters: With the store of this way; None for transformers.
        case: The request.
        way: See `Way`.
        forced: Say the reference; else greedy, of 50 to 200 tokens.
    """
    said = case.reference if forced else None
    if isinstance(way, dict):
        work = partial(_theirs, engine, case, said, way)
    else:
        assert drafters is not None
        work = partial(_ours, engine, drafters, case, way, said)
    with counted_forwards(engine.target) as count:
        _wait(engine.target)
        began = time.perf_counter()
        tokens, drafting = work()
        _wait(engine.target)
        seconds = time.perf_counter() - began
    return Run(tuple(tokens), count[0] - 1, seconds, drafting)


class Said:
    """Stands where a grammar does: forces an answer, or forbids to end it too early."""

    complete = False

    def __init__(self, said: Sequence[int] | None, ends: Sequence[int]) -> None:
        self.said, self.ends, self.place = said, list(ends), 0

    def mask(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits of the next token."""
        if self.said is not None:
            forced = torch.full_like(logits, float("-inf"))
            forced[self.said[self.place]] = 0.0
            return forced
        if self.place < SHORTEST:
            logits = logits.clone()
            logits[self.ends] = float("-inf")
        return logits

    def accept(self, token: int) -> None:
        """Go on."""
        self.place += 1


def _ours(
    engine: Engine, drafters: Drafters, case: Case, kind: DraftKind | None, said: Any
) -> tuple[list[int], float]:
    """The library's decoding loop, plain or drafted."""
    ends = end_token_ids(engine.target).tolist()
    length = LONGEST if said is None else len(said)
    tally, speculation = Tally(), None
    if kind is not None:
        ask = partial(_guess, engine, case, length)
        plan = DraftPlan(kind, case.ids, case.ids, None, ask, tally)
        speculation = drafters.start(plan)
    rules: Any = [Said(said, ends)]
    options = Generation(max_new_tokens=length)
    steps = next_tokens(engine.target, [case.ids], options, None, rules, speculation)
    tokens: list[int] = []
    for (token,) in steps:
        tokens.append(token)
        if said is None and token in ends:
            break
    steps.close()  # type: ignore[attr-defined]
    return tokens, tally.seconds


def _guess(engine: Engine, case: Case, length: int) -> torch.Tensor:
    """The draft's answer, for drafting="lookahead"."""
    draft = engine.draft
    assert draft is not None
    ids = case.ids.unsqueeze(0).to(draft.device)
    with torch.no_grad():
        out = draft.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=length,
            do_sample=False,
            pad_token_id=0,
        )
    return out[0, ids.shape[1] :].cpu()


@contextmanager
def _ruled(
    model: PreTrainedModel, prompt: int, said: Sequence[int] | None, ends: Sequence[int]
) -> Iterator[None]:
    """`Said` for transformers, upon the logits of every place that a pass looks at.

    A logits processor would not do: prompt lookup asks it which of its guesses are forbidden, and
    would learn the answer from one that forces it.
    """
    read = [0]

    def note(_: Any, args: Any, kwargs: dict[str, Any]) -> None:
        cache = kwargs.get("past_key_values")
        read[0] = 0 if cache is None else cache.get_seq_length()

    def rewrite(_: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        rows = output.logits[0]  # (places, vocabulary)
        first = read[0] + kwargs["input_ids"].shape[1] - len(rows) + 1 - prompt
        for place, row in enumerate(rows, start=first):
            rule = Said(said, ends)
            rule.place = place if said is None else min(place, len(said) - 1)
            if place >= 0:
                row.copy_(rule.mask(row))

    hooks = [
        model.register_forward_pre_hook(note, with_kwargs=True),
        model.register_forward_hook(rewrite, with_kwargs=True),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _theirs(
    engine: Engine, case: Case, said: Sequence[int] | None, options: dict[str, Any]
) -> tuple[list[int], float]:
    """transformers' generate."""
    ids = case.ids.unsqueeze(0).to(engine.target.device)
    ends = end_token_ids(engine.target).tolist()
    how = {key: engine.draft if key == "assistant_model" else v for key, v in options.items()}
    with _ruled(engine.target, ids.shape[1], said, ends):
        out = engine.target.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=LONGEST if said is None else len(said),
            do_sample=False,
            pad_token_id=0,
            **how,
        )
    return out[0, ids.shape[1] :].tolist(), 0.0


@contextmanager
def counted_forwards(model: PreTrainedModel) -> Iterator[list[int]]:
    """Count a model's forward passes."""
    count = [0]

    def add(*_: Any, **__: Any) -> None:
        count[0] += 1

    hook = model.register_forward_pre_hook(add)
    try:
        yield count
    finally:
        hook.remove()


def _wait(model: PreTrainedModel) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize()


class Oracle:
    """Reads trees without a model; whoever chooses knows the answer."""

    def room(self) -> int:
        """No limit."""
        return 1 << 30

    def read(self, tokens: Sequence[int], parents: Sequence[int]) -> torch.Tensor:
        """Nothing worth a look."""
        return torch.zeros(len(tokens), 1)

    def keep(self, path: Sequence[int]) -> None:
        """Nothing to keep."""


def simulate(drafter: Drafter, case: Case, tally: Tally | None = None) -> Tally:
    """What a drafter does on a reference answer, without running the target.

    Which guesses are accepted follows from the answer alone, so that the counts are those of a
    replay with the target. `seconds` are those of drafting.
    """
    rest, reader, tally = iter(case.reference[1:]), Oracle(), tally or Tally()
    choose: Callable[[torch.Tensor], int] = lambda _: next(rest)  # noqa: E731
    length = len(case.reference) - 1
    steps = verified_tokens(
        reader,  # type: ignore[arg-type]
        choose,
        Speculation(drafter, tally),
        case.ids.tolist(),
        case.reference[0],
        length,
    )
    assert sum(1 for _ in steps) == length
    return tally

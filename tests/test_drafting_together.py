"""Drafting beside everything else that changes decoding: grammars, threads, sparse and uneven."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import get_args

import pytest

from draftsieve import Engine, Generation, Grammar, Prompt, SpecKV, SpecKVPC, SpecPC
from draftsieve.core.config import DraftKind, Method
from draftsieve.core.generation.speculative.drafters.store import TrigramStore
from draftsieve.core.kv_cache.prefill import Start
from draftsieve.core.speckv import sparse_prefill
from draftsieve.core.speckv.evict import evict

from . import families
from .adapters_fixtures import QUESTION, TEXTS, tiny_engine, tiny_model, tiny_tokenizer
from .test_verification import STEPS, decode

KINDS: tuple[DraftKind, ...] = get_args(DraftKind)
GRAMMARS = (
    Grammar.json_schema(
        {
            "type": "object",
            "properties": {"place": {"type": "string"}, "times": {"type": "array", "maxItems": 4}},
            "required": ["place", "times"],
        }
    ),
    Grammar.regex("(The ferry|The museum|Tickets)( [a-z]+){3,9}[.]"),
)


@pytest.fixture
def sparse_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read sparsely whatever the length."""
    monkeypatch.setattr(sparse_prefill, "SHORTEST", {"cpu": 0, "cuda": 0})
    monkeypatch.setattr(sparse_prefill, "WORTH", float("inf"))


def same_model_engine() -> Engine:
    """The draft is the target, so that guesses come true and paths are kept."""
    return Engine(tiny_model(64, seed=2), tiny_tokenizer(), draft_model=tiny_model(64, seed=2))


# -- grammars -----------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 1.1])
@pytest.mark.parametrize("grammar", GRAMMARS, ids=["json", "regex"])
def test_answers_within_a_grammar_are_the_plain_ones(grammar: Grammar, temperature: float) -> None:
    engine, accepted = same_model_engine(), 0
    options = Generation(max_new_tokens=60, grammar=grammar, temperature=temperature, seed=4)
    plain = engine.answer(QUESTION, TEXTS, generation=options)
    for kind in (*KINDS, "aded"):  # the second time, the store knows the answer
        drafted = engine.answer(
            QUESTION, TEXTS, generation=options.model_copy(update={"drafting": kind})
        )
        assert drafted.text == plain.text, kind
        assert drafted.usage == plain.usage, kind
        assert drafted.finish_reason == plain.finish_reason, kind
        assert drafted.drafting is not None
        assert drafted.drafting.note is None
        accepted += drafted.drafting.accepted
    assert accepted > 10


# -- threads ------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", [tiny_engine, same_model_engine], ids=["pair", "same"])
def test_concurrent_drafts_and_grammars_give_what_they_give_alone(
    engine: Callable[[], Engine],
) -> None:
    shared = engine()
    methods: tuple[Method | None, ...] = (None, SpecPC(ratio=0.5), SpecKV(ratio=0.5))
    plans = [
        (kind, grammar, methods[place % 3], 0.0 if place % 2 else 1.2)
        for place, (kind, grammar) in enumerate(product(KINDS, (None, *GRAMMARS)))
    ]

    def ask(plan: int, *, drafting: bool) -> tuple[str, str]:
        kind, grammar, method, temperature = plans[plan]
        options = Generation(
            max_new_tokens=24,
            grammar=grammar,
            temperature=temperature,
            seed=plan,
            drafting=kind if drafting else None,
        )
        answer = shared.answer(QUESTION, TEXTS, method=method, generation=options)
        if drafting:
            assert answer.drafting is not None
            assert answer.drafting.note is None
            assert answer.drafting.tokens == answer.drafting.forwards + answer.drafting.accepted
        return answer.text, answer.finish_reason

    alone = [ask(plan, drafting=False) for plan in range(len(plans))]
    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(lambda plan: ask(plan, drafting=True), range(len(plans))))
    assert together == alone


def test_a_store_is_learnt_saved_and_read_at_once(tmp_path: Path) -> None:
    """Nobody sees a pair half written: the shares of its successors never pass one."""
    store, texts = TrigramStore(pairs=64), [[n % 7, n % 5, n % 3] * 20 for n in range(40)]

    def work(place: int) -> None:
        store.learn(texts[place])
        file = tmp_path / f"{place}.safetensors"
        if place % 8 == 0:
            store.save(file)
        for seen in (store, TrigramStore.load(file)) if place % 8 == 0 else (store,):
            for first, second in product(range(7), repeat=2):
                weights = [weight for _, weight in seen.successors(first, second)]
                assert sum(weights) <= 1.0 + 1e-5

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(work, range(40)))
    assert len(store) <= 64


# -- caches -------------------------------------------------------------------------------------


@pytest.mark.usefixtures("sparse_everywhere")
@pytest.mark.parametrize(
    "budgets", [{}, {"head_budgets": "adaptive"}, {"layer_budgets": "pyramid"}]
)
@pytest.mark.parametrize(("name", "implementation"), [("llama", "sdpa"), ("llama", "eager")])
def test_drafts_on_uneven_caches_that_were_read_sparsely(
    name: str, implementation: str, budgets: dict[str, str]
) -> None:
    model = families.build(name, implementation)
    prompt, guess = families.ids(150, seed=3)[0], families.ids(5, seed=4)[0]
    method = SpecKV(
        capacity=40,
        window_size=8,
        prefill_vertical_size=20,
        prefill_window_size=64,
        **budgets,  # type: ignore[arg-type]
    )

    def begin() -> Start:
        return evict(model, [prompt], [guess], method, [40]).start

    plain, drafted, tally = decode(model, prompt, begin, Generation(max_new_tokens=STEPS))
    assert drafted == plain
    assert tally.accepted > 5
    assert tally.note is None


@pytest.mark.usefixtures("sparse_everywhere")
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_with_sparse_uneven_reading_through_the_engine(kind: DraftKind) -> None:
    engine = same_model_engine()
    speckv = SpecKV(
        ratio=0.5,
        head_budgets="adaptive",
        layer_budgets="pyramid",
        prefill_vertical_size=16,
        prefill_window_size=64,
    )
    for method in (speckv, SpecKVPC(specpc=SpecPC(ratio=0.7), speckv=speckv)):
        options = Generation(max_new_tokens=20, grammar=GRAMMARS[0])
        plain = engine.answer(QUESTION, TEXTS * 2, method=method, generation=options)
        drafted = engine.answer(
            QUESTION,
            TEXTS * 2,
            method=method,
            generation=options.model_copy(update={"drafting": kind}),
        )
        assert drafted.text == plain.text
        assert drafted.drafting is not None
        assert drafted.drafting.note is None


@pytest.mark.parametrize("storage", ["memory", "int8"])
def test_sessions_of_either_storage_draft(storage: str) -> None:
    session = same_model_engine().session(TEXTS, storage=storage)  # type: ignore[arg-type]
    for method, kind in product((None, SpecKV(ratio=0.5)), ("lookup", "auto", "model")):
        options = Generation(max_new_tokens=20)
        plain = session.answer(QUESTION, method=method, generation=options)
        drafted = session.answer(
            QUESTION, method=method, generation=options.model_copy(update={"drafting": kind})
        )
        assert drafted.text == plain.text


def test_batches_with_grammars_are_decoded_plainly_and_say_so() -> None:
    engine = tiny_engine()
    prompts = [Prompt.from_question(QUESTION, TEXTS[:n]) for n in (1, 2)]
    options = Generation(max_new_tokens=16, grammar=GRAMMARS[0])
    plain = engine.generate_many(prompts, generation=options)
    drafted = engine.generate_many(
        prompts, generation=options.model_copy(update={"drafting": "auto"})
    )
    assert [answer.text for answer in drafted] == [answer.text for answer in plain]
    assert all(answer.drafting and answer.drafting.note for answer in drafted)

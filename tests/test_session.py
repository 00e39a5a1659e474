"""Sessions: the same answers as reading everything again, for every question, from disk too."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from draftsieve import Engine, Generation, Passage, SpecKV, SpecPC
from draftsieve.core.errors import ModelError, PromptError

from .adapters_fixtures import QUESTION, TEXTS, tiny_engine, tiny_model, tiny_tokenizer

QUESTIONS = [QUESTION, "Where are tickets sold?", "What does the museum show?", QUESTION]
SHORT = Generation(max_new_tokens=10)
METHODS = [
    None,
    SpecKV(ratio=0.4),
    SpecKV(capacity=5000),
    SpecKV(ratio=0.4, scorer="snapkv"),
    SpecKV(ratio=0.4, scorer="laq"),
    SpecKV(ratio=0.4, scorer="tova"),
]


@pytest.mark.parametrize("method", METHODS)
def test_every_question_gets_what_a_new_reading_gives(method: SpecKV | None) -> None:
    engine = tiny_engine()
    session = engine.session(TEXTS)
    for question in QUESTIONS:
        found = session.answer(question, method=method, generation=SHORT)
        fresh = engine.answer(question, TEXTS, method=method, generation=SHORT)
        assert found.text == fresh.text
        assert found.usage == fresh.usage
        assert found.lookahead == fresh.lookahead


def test_the_target_reads_only_what_is_new() -> None:
    engine = Engine(tiny_model(64, seed=2), tiny_tokenizer())
    session = engine.session(TEXTS)
    lengths: list[int] = []
    hook = engine.target.model.register_forward_hook(
        lambda _m, _a, kwargs, _o: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    session.answer(QUESTION, generation=SHORT)
    session.answer(QUESTION, method=SpecKV(ratio=0.4, scorer="snapkv"), generation=SHORT)
    hook.remove()
    whole = engine.answer(QUESTION, TEXTS, generation=SHORT).usage.prompt_tokens
    assert max(lengths) < whole / 2


def test_asking_changes_nothing() -> None:
    session = tiny_engine().session(TEXTS)
    before = [t.clone() for t in session.memories.target.keys]
    with ThreadPoolExecutor(4) as pool:
        texts = list(
            pool.map(
                lambda q: session.answer(q, method=METHODS[1], generation=SHORT).text,
                QUESTIONS * 3,
            )
        )
    assert texts == texts[:4] * 3
    assert all(torch.equal(a, b) for a, b in zip(before, session.memories.target.keys, strict=True))


def test_saved_sessions_answer_the_same(tmp_path: Path) -> None:
    engine = tiny_engine()
    session = engine.session([Passage(t, f"p{i}", {"page": i}) for i, t in enumerate(TEXTS)])
    session.save(tmp_path / "session")
    loaded = engine.load_session(tmp_path / "session")
    assert loaded.passages == session.passages
    assert loaded.bytes == session.bytes
    for question in QUESTIONS:
        found = loaded.answer(question, method=METHODS[1], generation=SHORT)
        assert found.text == session.answer(question, method=METHODS[1], generation=SHORT).text
    names = {p.name for p in (tmp_path / "session").iterdir()}
    assert names == {"memory.safetensors", "session.json"}
    other = Engine(tiny_model(64, seed=2), tiny_tokenizer(), name="other")
    with pytest.raises(ModelError, match="was read by 'tiny'"):
        other.load_session(tmp_path / "session")
    with pytest.raises(ModelError, match="holds no session"):
        engine.load_session(tmp_path)


def test_streams_are_the_answer() -> None:
    session = tiny_engine().session(TEXTS)
    pieces = list(session.stream(QUESTION, method=METHODS[1], generation=SHORT))
    answer = session.answer(QUESTION, method=METHODS[1], generation=SHORT)
    assert "".join(p.text for p in pieces) == answer.text


def test_what_a_session_cannot_do_is_said() -> None:
    session = tiny_engine().session(TEXTS)
    with pytest.raises(ModelError, match="read again"):
        session.answer(QUESTION, method=SpecPC())  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="h2o needs"):
        session.answer(QUESTION, method=SpecKV(ratio=0.4, scorer="h2o"), generation=SHORT)
    with pytest.raises(PromptError, match="nothing to read"):
        tiny_engine().session([""])
    with pytest.raises(PromptError, match="reads at most"):
        tiny_engine().session(TEXTS * 30)

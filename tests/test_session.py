"""Sessions: the same answers as reading everything again, for every question, from disk too."""

from __future__ import annotations

import asyncio
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import date
from pathlib import Path

import pytest
import torch

from draftsieve import Engine, Generation, Passage, Prompt, SpecKV, SpecPC
from draftsieve.core.errors import ConfigError, ModelError, PromptError
from draftsieve.core.kv_cache.prefix import Memory, read_memory
from draftsieve.core.kv_cache.storage import Storage, StoredLayer, StoredStates
from draftsieve.core.request import Memories
from draftsieve.core.session import Session
from draftsieve.core.speckv.evict import evict

from . import families
from .adapters_fixtures import (
    QUESTION,
    TEXTS,
    tiny_engine,
    tiny_model,
    tiny_tokenizer,
)

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
    before = [layer.keys.data.clone() for layer in session.memories.target.layers]
    with ThreadPoolExecutor(4) as pool:
        texts = list(
            pool.map(
                lambda q: session.answer(q, method=METHODS[1], generation=SHORT).text,
                QUESTIONS * 3,
            )
        )
    assert texts == texts[:4] * 3
    for old, layer in zip(before, session.memories.target.layers, strict=True):
        assert torch.equal(old, layer.keys.data)


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
    other = Engine(tiny_model(64, seed=3), tiny_tokenizer(), name="other")
    with pytest.raises(ModelError, match="was read by 'tiny'"):
        other.load_session(tmp_path / "session")
    with pytest.raises(ModelError, match="holds no session"):
        engine.load_session(tmp_path)


def test_streams_are_the_answer() -> None:
    session = tiny_engine().session(TEXTS)
    pieces = list(session.stream(QUESTION, method=METHODS[1], generation=SHORT))
    answer = session.answer(QUESTION, method=METHODS[1], generation=SHORT)
    assert "".join(p.text for p in pieces) == answer.text


def test_asynchronous_questions_get_the_same_answers() -> None:
    engine = tiny_engine()
    wanted = [engine.session(TEXTS).answer(q, generation=SHORT).text for q in QUESTIONS]

    async def ask() -> list[str]:
        session = await engine.asession(TEXTS)
        ticks, done = 0, asyncio.Event()

        async def tick() -> None:
            nonlocal ticks
            while not done.is_set():
                ticks += 1
                await asyncio.sleep(0)

        ticking = asyncio.create_task(tick())
        answers = await asyncio.gather(*(session.aanswer(q, generation=SHORT) for q in QUESTIONS))
        pieces = [piece.text async for piece in session.astream(QUESTION, generation=SHORT)]
        done.set()
        await ticking
        assert ticks > 10  # the event loop was free
        assert "".join(pieces) == wanted[0]
        return [answer.text for answer in answers]

    assert asyncio.run(ask()) == wanted


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


def _plain(session: Session) -> Session:
    """The same session whose rounded numbers are kept as ordinary ones."""

    def multiplied(states: StoredStates) -> StoredStates:
        assert states.scale is not None
        return StoredStates(states.data.float() * states.scale)

    def memory(packed: Memory) -> Memory:
        pairs = ((multiplied(la.keys), multiplied(la.values)) for la in packed.layers)
        return Memory(packed.ids, tuple(StoredLayer(*pair) for pair in pairs))

    assert session.memories.draft is not None
    memories = Memories(memory(session.memories.target), memory(session.memories.draft))
    return replace(session, memories=memories)


@pytest.mark.parametrize("method", [None, METHODS[1], METHODS[4]])
def test_int8_answers_are_those_of_the_rounded_numbers(method: SpecKV | None) -> None:
    session = tiny_engine().session(TEXTS, storage="int8")
    plain = _plain(session)
    for question in QUESTIONS[:2]:
        found = session.answer(question, method=method, generation=SHORT)
        assert found.text == plain.answer(question, method=method, generation=SHORT).text
    assert session.bytes / plain.bytes < 0.38  # 16 and 8 numbers a head, and a scale each


def test_int8_rounds_by_half_a_step_at_most() -> None:
    states = torch.randn(1, 2, 50, 16) * torch.logspace(-3, 3, 50).view(1, 1, 50, 1)
    states[:, :, 7] = 0.0
    for dtype, own in ((torch.float32, 1e-6), (torch.bfloat16, 2**-8), (torch.float16, 2**-10)):
        exact = states.to(dtype)
        found = StoredStates.of(exact, "int8").whole(torch.device("cpu"))
        assert found.dtype == dtype
        largest = exact.float().abs().amax(-1, keepdim=True)
        assert bool(((found.float() - exact.float()).abs() <= largest * (1 / 254 + own)).all())


def test_int8_hardly_moves_the_bundled_targets_logits() -> None:
    engine = Engine.load("builtin:target", device="cpu", progress=False)
    logits = []
    for storage in ("memory", "int8"):
        memory = engine.session(TEXTS, storage=storage).memories.target
        prompt = torch.cat([memory.ids, torch.tensor([40, 50, 60])])
        start = memory.start(engine.target, prompt)
        with torch.no_grad():
            out = engine.target(
                input_ids=start.feed,
                attention_mask=start.mask,
                position_ids=start.positions,
                past_key_values=start.cache,
            )
        logits.append(out.logits[0, -1])
    assert 0 < (logits[0] - logits[1]).norm() / logits[0].norm() < 0.02


def test_a_follow_up_uses_what_the_first_question_evicted() -> None:
    engine = tiny_engine()
    session = engine.session(TEXTS)
    method = SpecKV(ratio=0.3, pool=None)
    kept: list[list[set[int]]] = []
    for question in QUESTIONS[:2]:
        prompt = Prompt.from_question(question, session.passages)
        (asked,) = session.scheduler.pipeline.prepare(
            [prompt], method, [SHORT], "raise", session.memories
        )
        plan = asked.eviction
        assert plan is not None
        target = session.memories.target
        done = evict(
            engine.target,
            [asked.ids],
            [plan.lookahead],
            method,
            [plan.capacity],
            [plan.protected],
            target,
        )
        documents = target.ids.numel()
        kept.append([{p for p in head.tolist() if p < documents} for head in done.kept[0][0]])
    assert all(second - first for first, second in zip(*kept, strict=True))
    for question in QUESTIONS[:2]:  # one after the other on the same session
        found = session.answer(question, method=method, generation=SHORT)
        fresh = engine.answer(question, TEXTS, method=method, generation=SHORT)
        assert found.text == fresh.text


def test_stats_are_the_real_bytes() -> None:
    engine = tiny_engine()
    session = engine.session(TEXTS)
    stats = session.stats
    assert stats.target_bytes == stats.tokens * stats.entry_bytes
    assert stats.entry_bytes == 2 * 2 * 2 * 16 * 4  # keys and values, layers, heads, width, bytes
    assert stats.draft_bytes == stats.tokens * stats.entry_bytes // 2
    assert stats.bytes == session.bytes
    assert stats.seconds["read"] > 0
    found = session.answer(QUESTION, method=METHODS[1], generation=SHORT)
    assert found.usage.cache_entries is not None
    assert found.cache_bytes == found.usage.cache_entries * stats.entry_bytes
    fresh = engine.answer(QUESTION, TEXTS, method=METHODS[1], generation=SHORT)
    assert fresh.cache_bytes == found.cache_bytes
    assert session.answer(QUESTION, generation=SHORT).cache_bytes is None
    assert {"encode", "draft", "prefill", "decode"} <= set(found.timings)
    packed = engine.session(TEXTS, storage="int8").stats
    assert (packed.storage, packed.entry_bytes) == ("int8", stats.entry_bytes)
    assert packed.target_bytes * 16 == stats.target_bytes * (4 + 1)  # 16 int8 and a float


@pytest.mark.parametrize("storage", ["memory", "int8"])
def test_sessions_grow_and_read_only_what_is_new(storage: Storage) -> None:
    engine = tiny_engine()
    small = engine.session(TEXTS[:2], storage=storage)
    lengths: list[int] = []
    hook = engine.target.model.register_forward_hook(
        lambda _m, _a, kwargs, _o: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    grown = small.extend([Passage(TEXTS[2], "museum")])
    hook.remove()
    assert max(lengths) <= grown.stats.tokens - small.stats.tokens + 2
    assert [p.id for p in grown.passages] == ["1", "2", "museum"]
    for method in (None, METHODS[1]):
        old = small.answer(QUESTION, method=method, generation=SHORT)
        new = grown.answer(QUESTION, method=method, generation=SHORT)
        if storage == "memory":
            assert (
                old.text == engine.answer(QUESTION, TEXTS[:2], method=method, generation=SHORT).text
            )
            assert new.text == engine.answer(QUESTION, TEXTS, method=method, generation=SHORT).text
    with pytest.raises(PromptError, match="no passages to add"):
        grown.extend([])
    with pytest.raises(PromptError, match="reads at most"):
        grown.extend(TEXTS * 30)


@pytest.mark.parametrize("storage", ["memory", "int8"])
def test_a_mapped_session_is_its_own_copy(tmp_path: Path, storage: Storage) -> None:
    engine = tiny_engine()
    session = engine.session(TEXTS, storage=storage)
    expected = [session.answer(q, method=METHODS[1], generation=SHORT).text for q in QUESTIONS]
    session.save(tmp_path)
    mapped = engine.load_session(tmp_path)
    read = engine.load_session(tmp_path, mmap=False)
    assert (mapped.stats.mapped, read.stats.mapped) == (True, False)
    assert mapped.stats.storage == read.stats.storage == storage
    assert mapped.bytes == read.bytes == session.bytes
    if sys.platform == "linux":
        maps = Path("/proc/self/maps").read_text(encoding="utf-8")
        assert str(tmp_path / "memory.safetensors") in maps
    engine.session(TEXTS[:1]).save(tmp_path)  # in its place
    jobs = [(s, q) for s in (mapped, read) for q in QUESTIONS]
    with ThreadPoolExecutor(4) as pool:
        found = list(
            pool.map(
                lambda job: job[0].answer(job[1], method=METHODS[1], generation=SHORT).text, jobs
            )
        )
    assert found == expected * 2
    assert len(engine.load_session(tmp_path).passages) == 1


def test_metadata_that_is_no_json_is_named_and_nothing_is_written(tmp_path: Path) -> None:
    engine = tiny_engine()
    kept = engine.session([Passage(TEXTS[0], "old", {"odd": "\ud800", "pages": (1, 2)})])
    kept.save(tmp_path / "a")
    loaded = engine.load_session(tmp_path / "a")
    assert loaded.passages[0].metadata == {"odd": "\ud800", "pages": [1, 2]}
    dated = [TEXTS[1], Passage(TEXTS[0], "b", {"page": 1, "seen": date(2024, 5, 1)})]
    session = engine.session(dated)
    for folder in (tmp_path / "a", tmp_path / "new"):
        with pytest.raises(PromptError, match=r"Metadata 'seen' of passage 2 \(id 'b'\)"):
            session.save(folder)
    assert not (tmp_path / "new").exists()
    assert engine.load_session(tmp_path / "a").passages == loaded.passages


def test_a_save_that_fails_leaves_the_old_session(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = tiny_engine()
    engine.session(TEXTS[:1]).save(tmp_path)

    def full(*_: object, **__: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space"):
        engine.session(TEXTS).save(tmp_path)
    monkeypatch.undo()
    assert len(engine.load_session(tmp_path).passages) == 1
    assert {p.name for p in tmp_path.iterdir()} == {"memory.safetensors", "session.json"}


def test_another_draft_is_noticed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tiny_engine().session(TEXTS).save(tmp_path)
    other = Engine(
        tiny_model(64, seed=2), tiny_tokenizer(), draft_model=tiny_model(32, seed=5), name="other"
    )
    with caplog.at_level("WARNING"):
        session = other.load_session(tmp_path)
    assert "not read by this engine's draft" in caplog.text
    assert session.memories.draft is None
    found = session.answer(QUESTION, method=METHODS[1], generation=SHORT)
    fresh = other.answer(QUESTION, TEXTS, method=METHODS[1], generation=SHORT)
    assert (found.text, found.lookahead) == (fresh.text, fresh.lookahead)
    alone = Engine(tiny_model(64, seed=2), tiny_tokenizer())
    assert alone.load_session(tmp_path).memories.draft is None


def test_damaged_sessions_and_unknown_storages_are_refused(tmp_path: Path) -> None:
    engine = tiny_engine()
    engine.session(TEXTS).save(tmp_path)
    (tmp_path / "memory.safetensors").write_bytes(b"12345678 not tensors")
    with pytest.raises(ModelError, match="damaged"):
        engine.load_session(tmp_path)
    engine.session(TEXTS).save(tmp_path)
    (tmp_path / "session.json").write_text('{"model": "tiny"}', encoding="utf-8")
    with pytest.raises(ModelError, match="damaged"):
        engine.load_session(tmp_path)
    with pytest.raises(ConfigError, match="no storage 'int4'"):
        engine.session(TEXTS, storage="int4")  # type: ignore[arg-type]


def test_sliding_windows_are_refused_with_the_reason() -> None:
    with pytest.raises(ModelError, match="full attention in every layer"):
        read_memory(families.build("gemma3", "sdpa"), families.ids(40)[0])

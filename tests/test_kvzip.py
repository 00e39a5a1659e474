"""KVzip: scores from a repeated context, against plain attention matrices."""

from __future__ import annotations

import asyncio
from copy import deepcopy

import pytest
import torch

from draftsieve import Engine, Generation, Prompt, SpecKV
from draftsieve.core.errors import BudgetError, ModelError, RequestTimeoutError
from draftsieve.core.kv_cache.evicted_memory import EvictedMemory
from draftsieve.core.kv_cache.greedy import greedy
from draftsieve.core.kv_cache.prefill import Start
from draftsieve.core.kv_cache.prefix import read_memory
from draftsieve.core.speckv.evict import evict
from draftsieve.core.speckv.scorers import kvzip

from . import families
from .adapters_fixtures import QUESTION, TEXTS, tiny_engine, tiny_model, tiny_tokenizer

METHOD = SpecKV(scorer="kvzip", ratio=0.4)
REQUEST = torch.tensor([7, 8, 9])


def _candidates(tokens: int, first: int, end: int) -> torch.Tensor:
    found = torch.zeros(tokens, dtype=torch.bool)
    found[first:end] = True
    return found


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "gpt_oss"])
def test_scores_are_those_of_an_eager_pass(name: str) -> None:
    """One chunk that holds the whole context: the maxima of the repetition's attention to it."""
    model, prompt = families.build(name, "eager"), families.ids(60)[0]
    found = kvzip.reconstruct(model, prompt, _candidates(60, 0, 50), REQUEST)
    ids = torch.cat([prompt[:50], REQUEST, prompt[:50]])
    with torch.no_grad():
        whole = model(input_ids=ids.unsqueeze(0), output_attentions=True).attentions
    assert found
    for layer, scores in found.items():
        asked = whole[layer][0, :, 50:, :50]  # (heads, repeated, context)
        kv_heads = scores.shape[0]
        expected = asked.reshape(kv_heads, -1, 50).amax(1)
        torch.testing.assert_close(scores[:, :50], expected, rtol=1e-4, atol=1e-6)
        assert not scores[:, 50:].any()


def test_chunks_compete_among_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Section 3.4: softmax over a chunk's keys and those of its repetition alone."""
    model, prompt = families.build("llama", "eager"), families.ids(60)[0]
    monkeypatch.setattr(kvzip, "CHUNK", 20)
    monkeypatch.setattr(kvzip, "BLOCK", 7)
    monkeypatch.setattr(kvzip, "STEP", 11)
    found = kvzip.reconstruct(model, prompt, _candidates(60, 10, 50), REQUEST)
    for begin in (10, 30):
        again = prompt[max(10, begin - kvzip.OVERLAP) : begin + 20]
        ids = torch.cat([prompt[:50], REQUEST, again])
        with torch.no_grad():
            whole = model(input_ids=ids.unsqueeze(0), output_attentions=True).attentions
        for layer, scores in found.items():
            asked = whole[layer][0, :, 50:]
            own = torch.cat([asked[..., begin : begin + 20], asked[..., 50:]], dim=-1)
            share = own / own.sum(-1, keepdim=True)  # the softmax over these keys alone
            expected = share[..., :20].reshape(scores.shape[0], -1, 20).amax(1)
            torch.testing.assert_close(scores[:, begin : begin + 20], expected)


def test_a_memory_of_the_context_changes_no_score() -> None:
    model, prompt = families.build("llama", "sdpa"), families.ids(80)[0]
    candidates = _candidates(80, 5, 70)
    plain = kvzip.reconstruct(model, prompt, candidates, REQUEST)
    for size in (40, 70, 80):
        memory = read_memory(model, prompt[:size])
        found = kvzip.reconstruct(model, prompt, candidates, REQUEST, memory)
        for layer, scores in plain.items():
            torch.testing.assert_close(found[layer], scores, rtol=1e-4, atol=1e-6)


def test_the_question_has_no_part_in_the_choice() -> None:
    model, context = families.build("llama", "sdpa"), families.ids(60)[0]
    protected = torch.ones(80, dtype=torch.bool)
    protected[4:60] = False
    kept = []
    for seed in (1, 2):
        prompt = torch.cat([context, families.ids(20, seed=seed)[0]])
        done = evict(model, [prompt], [REQUEST], METHOD, [50], [protected])
        kept.append([head.tolist() for layer in done.entries(0) for head in layer])
    assert kept[0] == kept[1]


def test_an_engine_and_a_session_answer_with_it() -> None:
    engine = Engine(tiny_model(64, seed=2), tiny_tokenizer())
    short = Generation(max_new_tokens=6)
    answer = engine.answer(QUESTION, TEXTS, method=METHOD, generation=short)
    assert (answer.usage.cache_entries or 999) < answer.usage.prompt_tokens
    assert not answer.lookahead  # the request is no guess
    asked = engine.session(TEXTS).answer(QUESTION, METHOD, generation=short)
    assert asked.text == answer.text
    plain = engine.answer(QUESTION, TEXTS, generation=short)
    whole = engine.answer(
        QUESTION, TEXTS, method=SpecKV(scorer="kvzip", ratio=1.0), generation=short
    )
    assert whole.text == plain.text


def test_a_window_without_room_for_a_repetition_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = tiny_engine()
    config = engine.target.config
    tokens = engine.answer(QUESTION, TEXTS, generation=Generation(max_new_tokens=1)).usage
    monkeypatch.setattr(config, "max_position_embeddings", tokens.prompt_tokens + 9)
    with pytest.raises(ModelError, match='scorer="kvzip" lets the target repeat a context'):
        engine.answer(QUESTION, TEXTS, method=METHOD, generation=Generation(max_new_tokens=2))


def test_a_session_is_compressed_once_for_all_questions() -> None:
    engine = Engine(tiny_model(64, seed=2), tiny_tokenizer())
    session, short = engine.session(TEXTS), Generation(max_new_tokens=6)
    small = session.compress(METHOD)
    assert small.stats.tokens == session.stats.tokens
    assert small.bytes < 0.8 * session.bytes
    assert set(small.stats.seconds) == {"compress"}
    memory = small.memories.target
    assert isinstance(memory, EvictedMemory)
    for question in (QUESTION, "Where are tickets sold?", QUESTION):
        prompt = Prompt.from_question(question, TEXTS)
        ids = session.scheduler.pipeline.pair.encoder.encode(prompt).ids
        said = greedy(engine.target, ids, 6, _one_by_one(engine, memory, ids))
        answer = small.answer(question, generation=short)
        assert answer.text == _text(engine, said).removesuffix("\ufffd")  # half a character
        assert answer.usage.prompt_tokens == ids.numel()
    everything = session.compress(SpecKV(scorer="kvzip", capacity=5000))
    whole = session.answer(QUESTION, generation=short)
    assert everything.answer(QUESTION, generation=short).text == whole.text
    assert session.answer(QUESTION, generation=short).text == whole.text  # it stays as it is


def test_compressing_has_an_asynchronous_twin() -> None:
    session = tiny_engine().session(TEXTS)
    small, twin = session.compress(METHOD), asyncio.run(session.acompress(METHOD))
    short = Generation(max_new_tokens=4)
    assert (
        twin.answer(QUESTION, generation=short).text
        == small.answer(QUESTION, generation=short).text
    )


def _text(engine: Engine, ids: torch.Tensor) -> str:
    assert engine.tokenizer is not None
    return str(engine.tokenizer.decode(ids.tolist(), skip_special_tokens=True))


def _one_by_one(engine: Engine, memory: EvictedMemory, ids: torch.Tensor) -> Start:
    """The question fed token by token to the evicted cache, up to the last one."""
    start = deepcopy(memory.kept)
    feed, mask, place = start.feed, start.mask, start.positions
    for token in ids[memory.ids.numel() :]:
        with torch.no_grad():
            engine.target(
                input_ids=feed,
                attention_mask=mask,
                position_ids=place,
                past_key_values=start.cache,
                use_cache=True,
            )
        feed, place = token.view(1, 1), place + 1
        mask = torch.cat([mask, torch.ones_like(feed)], dim=1)
    return Start(start.cache, feed, mask, place)


def test_a_compressed_session_says_what_it_cannot() -> None:
    session = tiny_engine().session(TEXTS)
    with pytest.raises(ModelError, match="scorer='speckv' looks ahead"):
        session.compress(SpecKV(ratio=0.5))
    with pytest.raises(BudgetError, match="system text and template alone"):
        session.compress(SpecKV(scorer="kvzip", capacity=3))
    small = session.compress(METHOD)
    with pytest.raises(ModelError, match="cannot be compressed further"):
        small.compress(METHOD)
    with pytest.raises(ModelError, match="cannot be extended"):
        small.extend(["More."])
    with pytest.raises(ModelError, match="cannot be saved"):
        small.save("nowhere")
    with pytest.raises(ModelError, match="cannot be evicted by another method"):
        small.answer(QUESTION, SpecKV(ratio=0.5))
    with pytest.raises(RequestTimeoutError):
        session.compress(METHOD, timeout=1e-9)

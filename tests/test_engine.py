"""Engine: answers equal plain transformers, alone, batched, streamed, sampled and in threads."""

from __future__ import annotations

import asyncio
import gc
import inspect
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import DynamicCache

from draftsieve import Engine, Generation, Prompt, SpecPC
from draftsieve.core.compressor import Compressor
from draftsieve.core.conversation.compressor import TurnCompressor
from draftsieve.core.errors import ModelError, OutOfMemoryError, PromptError
from draftsieve.core.generation.sampling import Sampler
from draftsieve.core.models.footprint import explain_out_of_memory
from draftsieve.core.session import Session

from .adapters_fixtures import QUESTION, TEXTS, tiny_engine, tiny_model, tiny_tokenizer

SHORT = Generation(max_new_tokens=12)
SAMPLED = Generation(max_new_tokens=12, temperature=1.5, top_p=0.9, top_k=50, seed=7)
PROMPTS = [
    Prompt.from_question(QUESTION, TEXTS),
    Prompt.from_question("Where are tickets sold?", TEXTS[:1]),
    Prompt.from_messages([{"role": "user", "content": "Hello"}]),
]


def reference(prompt: Prompt, max_new_tokens: int) -> list[int]:
    """Greedy ids by transformers' own generate on apply_chat_template's ids."""
    engine, tokenizer = tiny_engine(), tiny_tokenizer()
    messages = [
        {"role": m.role, "content": "".join(p.text for p in prompt.layout(m))}
        for m in prompt.messages
    ]
    ids = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )["input_ids"]
    out = engine.target.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=0,
    )
    return out[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_answers_equal_transformers_generate(prompt: Prompt) -> None:
    answer = tiny_engine().generate(prompt, generation=SHORT)
    ids = reference(prompt, 12)
    assert answer.text == tiny_tokenizer().decode(ids, skip_special_tokens=True).rstrip("\ufffd")
    assert answer.usage.completion_tokens == len(ids)
    assert answer.finish_reason == "length"


def test_a_capacity_that_holds_everything_changes_nothing() -> None:
    engine = tiny_engine()
    plain = engine.answer(QUESTION, TEXTS, generation=SHORT)
    whole = engine.answer(QUESTION, TEXTS, method=SpecPC(capacity=5000), generation=SHORT)
    assert whole.text == plain.text
    assert whole.usage == plain.usage
    ids = torch.arange(5, 90).unsqueeze(0)
    traced = engine.trace(ids, SpecPC(capacity=85), max_new_tokens=8)
    assert (
        traced.output_ids.tolist() == engine.trace(ids, None, max_new_tokens=8).output_ids.tolist()
    )
    assert traced.lookahead_ids is not None


def test_engine_and_compressor_give_the_same_text() -> None:
    engine, method = tiny_engine(), SpecPC(ratio=0.4)
    answer = engine.answer(QUESTION, TEXTS, method=method, generation=SHORT)
    context = engine.compress(QUESTION, TEXTS, method)
    assert answer.context is not None
    assert answer.context.text == context.text
    assert answer.spans == context.spans
    assert answer.usage.prompt_tokens < answer.usage.original_prompt_tokens
    assert {"encode", "draft", "select", "prefill", "decode"} <= set(answer.timings)
    again = engine.answer(QUESTION, [p.text for p in context.passages], generation=SHORT)
    assert answer.text == again.text


@pytest.mark.parametrize("generation", [SHORT, SAMPLED])
def test_a_batch_gives_each_row_what_it_gets_alone(generation: Generation) -> None:
    engine = tiny_engine()
    alone = [engine.generate(p, generation=generation) for p in PROMPTS]
    together = engine.generate_many(PROMPTS, generation=generation)
    assert [a.text for a in together] == [a.text for a in alone]
    assert [a.usage for a in together] == [a.usage for a in alone]
    assert engine.generate_many([]) == []


def test_answer_many_is_answer_row_by_row() -> None:
    engine, method = tiny_engine(), SpecPC(ratio=0.5)
    questions = [QUESTION, "Where are tickets sold?"]
    many = engine.answer_many(questions, [TEXTS, TEXTS[:2]], method=method, generation=SHORT)
    one = engine.answer(questions[1], TEXTS[:2], method=method, generation=SHORT)
    assert many[1].text == one.text


def test_the_same_seed_gives_the_same_output() -> None:
    engine = tiny_engine()
    texts = [engine.generate(PROMPTS[0], generation=SAMPLED).text for _ in range(2)]
    assert texts[0] == texts[1]
    others = {
        engine.generate(PROMPTS[0], generation=SAMPLED.model_copy(update={"seed": s})).text
        for s in range(4)
    }
    assert len(others) > 1


def test_sampling_follows_the_targets_distribution() -> None:
    """4,000 first tokens against softmax probabilities: chi-square at the 0.1 % level."""
    engine, draws = tiny_engine(), 4000
    ids = torch.arange(5, 25)
    with torch.no_grad():
        logits = engine.target(input_ids=ids.unsqueeze(0)).logits[0, -1]

    options = Generation(temperature=2.0, top_k=6, seed=1)
    sampler = Sampler(ids, options)
    sampler.seen = []
    counts = torch.zeros_like(logits)
    for _ in range(draws):
        counts[sampler.choose(logits)] += 1
    top = logits.topk(6).indices
    expected = torch.softmax(logits[top] / 2.0, -1) * draws
    assert counts.sum() == counts[top].sum()
    chi_square = ((counts[top] - expected) ** 2 / expected).sum()
    assert chi_square < 20.5  # 5 degrees of freedom


def test_repetition_penalty_is_transformers_own() -> None:
    engine = tiny_engine()
    answer = engine.generate(
        PROMPTS[2], generation=Generation(max_new_tokens=12, repetition_penalty=1.5)
    )
    ids = tiny_tokenizer().apply_chat_template(
        [{"role": "user", "content": "Hello"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )["input_ids"]
    out = engine.target.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=12,
        do_sample=False,
        repetition_penalty=1.5,
        pad_token_id=0,
    )[0, ids.shape[1] :]
    assert answer.text == tiny_tokenizer().decode(out).rstrip("\ufffd")


def test_streamed_text_is_the_answer() -> None:
    engine = tiny_engine()
    answer = engine.generate(PROMPTS[0], generation=SHORT)
    *pieces, last = engine.stream_prompt(PROMPTS[0], generation=SHORT)
    assert "".join(p.text for p in pieces) == answer.text
    assert len(pieces) > 3
    assert last.answer is not None
    assert last.answer.text == answer.text
    assert all(p.answer is None for p in pieces)


def test_stop_strings_end_the_answer_and_are_not_part_of_it() -> None:
    engine = tiny_engine()
    full = engine.generate(PROMPTS[0], generation=SHORT).text
    stop = full[5:8]
    cut = full[: full.index(stop)]
    options = Generation(max_new_tokens=12, stop=("never there", stop))
    answer = engine.generate(PROMPTS[0], generation=options)
    assert (answer.text, answer.finish_reason) == (cut, "stop_string")
    assert "".join(c.text for c in engine.stream_prompt(PROMPTS[0], generation=options)) == cut


def test_end_tokens_stop_only_their_own_row() -> None:
    engine = Engine(tiny_model(64, seed=2), tiny_tokenizer())
    full = [engine.generate(p, generation=SHORT) for p in PROMPTS]
    ids = reference(PROMPTS[0], 12)
    engine.target.generation_config.eos_token_id = ids[4]
    together = engine.generate_many(PROMPTS, generation=SHORT)
    assert together[0].finish_reason == "stop"
    assert together[0].usage.completion_tokens == ids.index(ids[4]) + 1
    for row in (1, 2):
        assert together[row].text == engine.generate(PROMPTS[row], generation=SHORT).text
        assert full[row].text.startswith(together[row].text)


def test_a_closed_stream_frees_its_cache() -> None:
    def caches() -> int:
        gc.collect()
        return sum(issubclass(type(o), DynamicCache) for o in gc.get_objects())

    before = caches()
    stream = tiny_engine().stream_prompt(PROMPTS[0], generation=Generation(max_new_tokens=200))
    next(stream)
    assert caches() == before + 1
    stream.close()  # type: ignore[attr-defined]
    assert caches() == before


async def test_async_streams_do_not_block_the_loop_and_can_be_cancelled() -> None:
    engine = tiny_engine()
    answer = await engine.agenerate(PROMPTS[0], generation=SHORT)
    pieces = [c.text async for c in engine.astream_prompt(PROMPTS[0], generation=SHORT)]
    assert "".join(pieces) == answer.text

    async def endless() -> None:
        async for _ in engine.astream_prompt(PROMPTS[0], generation=Generation(max_new_tokens=900)):
            started.set()

    started = asyncio.Event()
    task = asyncio.create_task(endless())
    await started.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    for call in (engine.agenerate, lambda p, **o: engine.aanswer(QUESTION, TEXTS, **o)):
        job = asyncio.create_task(call(PROMPTS[0], generation=Generation(max_new_tokens=900)))
        await asyncio.sleep(0.2)
        job.cancel()
        with pytest.raises(asyncio.CancelledError):
            await job
    ticks = 0
    stream = asyncio.create_task(engine.agenerate(PROMPTS[0], generation=SHORT))
    while not stream.done():
        ticks += 1
        await asyncio.sleep(0)
    assert ticks > 1


def test_requests_with_different_options_run_side_by_side() -> None:
    engine = tiny_engine()
    jobs = [
        (method, generation)
        for method in (None, SpecPC(ratio=0.3), SpecPC(ratio=0.6, lookahead_tokens=2))
        for generation in (SHORT, SAMPLED)
    ]

    def run(job: tuple[SpecPC | None, Generation]) -> str:
        return engine.answer(QUESTION, TEXTS, method=job[0], generation=job[1]).text

    alone = [run(job) for job in jobs]
    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(run, jobs * 3)) == alone * 3


def test_errors_say_what_to_do() -> None:
    engine = Engine(tiny_model(64, seed=2), tiny_tokenizer())
    with pytest.raises(ModelError, match="no draft model"):
        engine.answer(QUESTION, TEXTS, method=SpecPC())
    with pytest.raises(PromptError, match="reads at most 1024"):
        engine.answer(QUESTION, TEXTS * 20)
    with pytest.raises(ModelError, match="no tokenizer"):
        Engine(tiny_model(64, seed=2), None).answer(QUESTION, TEXTS)
    with pytest.raises(PromptError, match="shape"):
        engine.trace(torch.zeros(3, dtype=torch.int64))


def test_unequal_lengths_are_named() -> None:
    engine = tiny_engine()
    with pytest.raises(PromptError, match="2 questions but 1 lists of passages"):
        engine.answer_many(["one?", "two?"], [TEXTS])
    with pytest.raises(PromptError, match="3 prompts but 2 generation options"):
        engine.generate_many(PROMPTS, generation=[SHORT, SHORT])


@pytest.mark.parametrize("kind", [Engine, Session, Compressor, TurnCompressor])
def test_asynchronous_twins_take_what_the_others_take(kind: type) -> None:
    names = {name for name in dir(kind) if not name.startswith("_")}
    twins = {name for name in names if name.startswith("a") and name[1:] in names}
    asked = {"answer", "stream", "compress", "generate", "guess_answer", "extend", "session"}
    asked |= {"answer_many", "generate_many", "stream_prompt"}
    assert {f"a{name}" for name in names & asked} <= twins
    for name in twins:
        ours, theirs = (inspect.signature(getattr(kind, each)) for each in (name, name[1:]))
        assert list(ours.parameters.values()) == list(theirs.parameters.values()), name


def test_method_and_timeout_stand_in_the_same_place_everywhere() -> None:
    for kind in (Engine, Session, Compressor):
        for name in dir(kind):
            if name.startswith("_") or not inspect.isfunction(call := getattr(kind, name)):
                continue
            kinds = {p.name: p.kind for p in inspect.signature(call).parameters.values()}
            if "timeout" in kinds:
                assert list(kinds)[-1] == "timeout", name
                assert kinds["timeout"] is inspect.Parameter.KEYWORD_ONLY
            if "method" in kinds and "generation" in kinds:
                positional = [
                    n for n, k in kinds.items() if k is not inspect.Parameter.KEYWORD_ONLY
                ]
                assert positional[-1] == "method", name


def test_the_exact_prompt_can_be_seen() -> None:
    engine, prompt = tiny_engine(), PROMPTS[0]
    text = engine.render(prompt)
    assert text.startswith("<|im_start|>system\n")
    assert text.endswith(f"Question: {QUESTION}<|im_end|>\n<|im_start|>assistant\n")
    assert all(passage in text for passage in TEXTS)
    ids = tiny_tokenizer()(text, add_special_tokens=False)["input_ids"]
    assert len(ids) == engine.generate(prompt, generation=SHORT).usage.prompt_tokens


def test_answers_end_at_the_targets_window() -> None:
    model = tiny_model(64, seed=2)
    engine = Engine(model, tiny_tokenizer())
    used = engine.generate(PROMPTS[2], generation=SHORT).usage.prompt_tokens
    model.config.max_position_embeddings = used + 5
    answer = Engine(model, tiny_tokenizer()).generate(PROMPTS[2], generation=SHORT)
    assert answer.usage.completion_tokens == 5


def test_out_of_memory_names_both_footprints() -> None:
    target, draft = tiny_model(64, seed=2), tiny_model(32, seed=1)
    with (
        pytest.raises(OutOfMemoryError, match=r"target \d+ MB, draft \d+ MB"),
        explain_out_of_memory(target=target, draft=draft),
    ):
        torch.empty(2**60)
    with (
        pytest.raises(RuntimeError, match="another"),
        explain_out_of_memory(target=target),
    ):
        raise RuntimeError("another problem")

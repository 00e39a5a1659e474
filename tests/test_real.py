"""A real pretrained chat model, SmolLM2-135M-Instruct, as target and as draft."""

from __future__ import annotations

import pytest
import torch

from draftsieve import Engine, Generation, Passage, Prompt, SpecKV, SpecKVPC, SpecPC
from draftsieve.core.evaluation.likelihood import divergence, read_answer
from draftsieve.core.kv_cache.greedy import greedy
from draftsieve.core.models.loading import end_token_ids, load_model
from draftsieve.core.prompt.encoder import PromptEncoder
from draftsieve.core.prompt.messages import DEFAULT_SYSTEM

pytestmark = pytest.mark.real

QUESTION = "In which year was the lighthouse at Kestrel Point built?"
TEXTS = [
    "The lighthouse at Kestrel Point was built in 1884 by the harbour board. Its lamp turns once "
    "in twelve seconds. The keeper's cottage was sold in 1962 and is now a small museum of knots.",
    "Kestrel Point also has a ferry to the island of Marra, four times a day in summer. A return "
    "ticket costs  3.50; children below\n\n6 travel free. Dogs must be kept on a lead on deck.",
]
SHORT = Generation(max_new_tokens=24)


@pytest.fixture(scope="module")
def engine(smollm2: str) -> Engine:
    loaded = load_model(smollm2, device="cpu", dtype="float32", progress=False)
    model = loaded.model  # reads and answers: one copy in memory
    return Engine(model, loaded.tokenizer, draft_model=model, name=smollm2, progress=False)


def _rendered(engine: Engine, texts: list[str], system: str = DEFAULT_SYSTEM) -> str:
    """The prompt as the tokenizer's own template writes it."""
    assert engine.tokenizer is not None
    shown = "".join(f"[{i}] {text}\n\n" for i, text in enumerate(texts, 1))
    messages = [
        {"role": "system", "content": system},
        {"role": "user", "content": f"{shown}Question: {QUESTION}"},
    ]
    text: str = engine.tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
    return text


def _generated(engine: Engine, texts: list[str]) -> str:
    """What transformers' own generate answers."""
    assert engine.tokenizer is not None
    ids = engine.tokenizer(_rendered(engine, texts), return_tensors="pt").input_ids
    out = engine.target.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False
    )
    return engine.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip()


def test_it_answers_as_transformers_generate_does(engine: Engine) -> None:
    answer = engine.answer(QUESTION, TEXTS, generation=SHORT)
    assert "1884" in answer.text
    assert answer.finish_reason == "stop"
    assert answer.text == _generated(engine, TEXTS)


@pytest.mark.parametrize("system", [DEFAULT_SYSTEM, None])
def test_a_prompt_is_the_string_form_without_the_templates_own_system_text(
    system: str | None, engine: Engine
) -> None:
    assert engine.tokenizer is not None
    prompt = Prompt.from_question(QUESTION, TEXTS, system=system)
    ids = PromptEncoder(engine.tokenizer).encode(prompt).ids.tolist()
    rendered = _rendered(engine, TEXTS, system or "")
    assert ids == engine.tokenizer(rendered, add_special_tokens=False).input_ids
    assert "Hugging Face" not in rendered
    assert ids.count(engine.tokenizer.bos_token_id) == 3  # one for each turn and the answer's
    assert end_token_ids(engine.target).tolist()[0] == engine.tokenizer.eos_token_id


def test_digits_are_tokens_of_their_own_and_spaces_before_them_stay_together(
    engine: Engine,
) -> None:
    assert engine.tokenizer is not None
    cut = engine.tokenizer.tokenize("at  3.50\n\n6")
    assert cut == ["at", "ĠĠ", "3", ".", "5", "0", "ĊĊ", "6"]


def test_specpc_answers_from_what_it_kept(engine: Engine) -> None:
    method = SpecPC(ratio=0.5, unit="sentence")
    answer = engine.answer(QUESTION, TEXTS, method=method, generation=SHORT)
    assert answer.context is not None
    assert answer.usage.prompt_tokens < answer.usage.original_prompt_tokens
    assert answer.text == _generated(engine, [p.text for p in answer.context.passages])
    assert "1884" in answer.text


def test_speckv_with_room_for_everything_changes_nothing(engine: Engine) -> None:
    answer = engine.answer(QUESTION, TEXTS, method=SpecKV(capacity=1000), generation=SHORT)
    assert answer.text == _generated(engine, TEXTS)


@pytest.mark.parametrize(
    "method",
    [
        SpecKV(ratio=0.5, lookahead_tokens=16),
        SpecKVPC(
            specpc=SpecPC(ratio=0.6, unit="sentence", lookahead_tokens=8), speckv=SpecKV(ratio=0.8)
        ),
    ],
)
def test_an_evicted_cache_still_answers(method: SpecKV | SpecKVPC, engine: Engine) -> None:
    passages = [Passage(text) for text in TEXTS]
    answer = engine.answer(QUESTION, passages, method=method, generation=SHORT)
    assert "1884" in answer.text
    assert answer.usage.cache_entries is not None
    assert answer.usage.cache_entries < answer.usage.prompt_tokens


@pytest.mark.parametrize("name", ["speckv", "2026-12"])
def test_a_guess_keeps_what_the_answer_needs(engine: Engine, name: str) -> None:
    """Behind SpecKV's cache the target strays less than half as far from its answer as SnapKV's."""
    pipeline = engine._need_pipeline()
    prompt = Prompt.from_question(QUESTION, TEXTS)
    ids = pipeline.pair.encoder.encode(prompt).ids
    said = greedy(engine.target, ids, 24)
    full = read_answer(engine.target, ids, said)
    ours = SpecKV(ratio=0.125) if name == "speckv" else SpecKV.preset(name, ratio=0.125)
    found = []
    for method in (ours, SpecKV(ratio=0.125, scorer="snapkv")):
        start = pipeline.begin(pipeline.prepare([prompt], method, [SHORT], "raise"))
        assert start is not None
        found.append(divergence(full, read_answer(engine.target, start, said)))
    assert found[0] < found[1] / 2

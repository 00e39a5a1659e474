"""What SpecKV promises, one line a test: peaks, caches in use, lookaheads, models that cannot."""

from __future__ import annotations

import gc
import io
import logging
import weakref
from contextlib import redirect_stdout
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5ForConditionalGeneration,
    TextStreamer,
)
from transformers import models as zoo

from draftsieve import Engine, Generation, Prompt, SpecKV, SpecKVPC, SpecPC
from draftsieve.core.compressor import Compressor
from draftsieve.core.errors import BudgetError, ModelError, PromptError
from draftsieve.core.generation.decode import next_tokens
from draftsieve.core.generation.eviction import MAX_LOOKAHEAD
from draftsieve.core.kv_cache.layers import EvictedLayer, cache_bytes
from draftsieve.core.speckv.evict import Eviction, evict
from draftsieve.core.types import Answer

from . import families
from .adapters_fixtures import QUESTION, TEMPLATE, TEXTS, tiny_engine, tiny_model, tiny_tokenizer

SHORT = Generation(max_new_tokens=8)
METHOD = SpecKV(ratio=0.6)
NOTHING = torch.tensor([], dtype=torch.int64)


def _llama() -> PreTrainedModel:
    return families.build("llama", "sdpa")


def _evict(length: int = 60, capacity: int = 20) -> tuple[torch.Tensor, Eviction]:
    prompt = families.ids(length)[0]
    return prompt, evict(_llama(), [prompt], [prompt[:4]], SpecKV(window_size=4), [capacity])


def test_no_two_layers_hold_their_full_keys_and_values_at_once() -> None:
    """Between layers no tensor with a vector for every prompt token and KV head is alive."""
    model, alive = _llama(), []
    prompt, guess = families.ids(203)[0], families.ids(6, seed=4)[0]

    def count(*_: Any) -> None:
        full = [
            o
            for o in gc.get_objects()
            # a list, as sizes that torch.compile left behind may be symbols without a hash
            if type(o) is torch.Tensor and list(o.shape) in ([1, 2, 209, 16], [1, 2, 203, 16])
        ]
        alive.append(len(full))

    hooks = [layer.register_forward_pre_hook(count) for layer in model.model.layers]
    hooks.append(model.model.norm.register_forward_pre_hook(count))
    try:
        done = evict(model, [prompt], [guess], SpecKV(window_size=4), [25])
        evicted, alive[:] = list(alive), []
        with torch.no_grad():
            model(torch.cat([prompt, guess]).unsqueeze(0), use_cache=True)
    finally:
        for hook in hooks:
            hook.remove()
    assert evicted == [0] * 5
    assert alive == [0, 2, 4, 6, 8]  # the plain cache, by the same count
    assert cache_bytes(done.start.cache) == 4 * 2 * 2 * 25 * 16 * 4


def test_a_bare_forward_pass_takes_an_evicted_cache() -> None:
    prompt, done = _evict()
    expected = [t for (t,) in next_tokens(_llama(), [prompt], SHORT, _evict()[1].start)]
    start, found = done.start, []
    feed, mask, positions = start.feed, start.mask, start.positions
    for _ in range(8):
        with torch.no_grad():
            logits = _llama()(
                input_ids=feed,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=start.cache,
            ).logits
        feed = logits[:, -1:].argmax(-1)
        found.append(int(feed))
        mask = torch.cat([mask, torch.ones_like(feed)], dim=1)
        positions = positions + 1
    assert found == expected


def test_generate_streams_and_stops_over_an_evicted_cache() -> None:
    engine, tokenizer = tiny_engine(), tiny_tokenizer()
    ids = torch.tensor(tokenizer(" ".join(TEXTS))["input_ids"])

    def start() -> dict[str, Any]:
        done = evict(engine.target, [ids], [NOTHING], SpecKV(window_size=4), [30])
        return {
            "input_ids": ids.unsqueeze(0),
            "attention_mask": torch.ones_like(ids).unsqueeze(0),
            "past_key_values": done.start.cache,
            "max_new_tokens": 8,
            "do_sample": False,
            "pad_token_id": 0,
        }

    done = evict(engine.target, [ids], [NOTHING], SpecKV(window_size=4), [30])
    ours = [t for (t,) in next_tokens(engine.target, [ids], SHORT, done.start)]
    written = io.StringIO()
    with redirect_stdout(written):
        theirs = engine.target.generate(
            **start(), streamer=TextStreamer(tokenizer, skip_prompt=True)
        )
    assert theirs[0, len(ids) :].tolist() == ours
    assert written.getvalue().strip() == tokenizer.decode(ours).strip()
    stop = tokenizer.decode(ours[2:4])
    stopped = engine.target.generate(**start(), stop_strings=[stop], tokenizer=tokenizer)
    assert stopped[0, len(ids) :].tolist() == ours[:4]


def test_rows_of_an_evicted_batch_can_be_selected_and_reordered() -> None:
    model = _llama()
    prompts = [families.ids(60, seed=s)[0] for s in (1, 2)]
    both = evict(model, prompts, [p[:4] for p in prompts], SpecKV(window_size=4), [20, 20]).start
    both.cache.reorder_cache(torch.tensor([1, 0]))
    both.cache.batch_select_indices(torch.tensor([0]))
    alone = evict(model, [prompts[1]], [prompts[1][:4]], SpecKV(window_size=4), [20]).start
    for theirs, ours in zip(both.cache.layers, alone.cache.layers, strict=True):
        torch.testing.assert_close(theirs.keys, ours.keys, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(theirs.values, ours.values, rtol=1e-5, atol=1e-6)
        assert theirs.get_seq_length() == ours.get_seq_length() == 59


def test_a_short_lookahead_changes_only_its_own_row() -> None:
    model = _llama()
    prompts = [families.ids(n, seed=n)[0] for n in (70, 60, 65)]
    guesses = [families.ids(9, seed=3)[0], families.ids(2, seed=4)[0], NOTHING]
    options = SpecKV(window_size=4)
    together = evict(model, prompts, guesses, options, [25] * 3)
    for row, (prompt, guess) in enumerate(zip(prompts, guesses, strict=True)):
        alone = evict(model, [prompt], [guess], options, [25])
        for found, expected in zip(together.kept, alone.kept, strict=True):
            assert (found[row] - together.pads[row]).tolist() == expected[0].tolist()


def test_nothing_is_left_for_autograd_or_on_the_model() -> None:
    model = _llama()
    before = model.config._attn_implementation
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    with torch.enable_grad():
        _, done = _evict()
    tensors = [t for la in done.start.cache.layers for t in (la.keys, la.values)]
    assert not any(t.requires_grad or t.grad_fn for t in [*tensors, *done.scores])
    assert model.config._attn_implementation == before
    assert hooks == sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def _lookahead(engine: Engine, **options: Any) -> tuple[Answer, int]:
    """An answer and the number of tokens that its lookahead had."""
    sizes: list[int] = []
    hook = engine.target.model.register_forward_pre_hook(
        lambda _m, _a, kwargs: sizes.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    answer = engine.answer(QUESTION, TEXTS, **options)
    hook.remove()
    return answer, sizes[0] - answer.usage.prompt_tokens


def test_the_lookahead_is_as_long_as_the_answer_may_be_up_to_a_cap() -> None:
    engine = tiny_engine()
    assert _lookahead(engine, method=METHOD, generation=SHORT)[1] == 8
    set_by_hand = SpecKV(ratio=0.6, lookahead_tokens=3)
    assert _lookahead(engine, method=set_by_hand, generation=SHORT)[1] == 3
    assert MAX_LOOKAHEAD == 256  # as docs/decisions.md says
    first = Generation(max_new_tokens=300, stop=("e", "a", "t", " "))
    assert _lookahead(engine, method=METHOD, generation=first)[1] == MAX_LOOKAHEAD


def test_a_lookahead_that_ends_early_is_used_as_it_is() -> None:
    draft = tiny_model(32, seed=1)
    engine = Engine(tiny_model(64, seed=2), tiny_tokenizer(), draft_model=draft)
    whole, length = _lookahead(engine, method=METHOD, generation=SHORT)
    assert length == 8
    assert engine.compressor is not None
    guess = engine.compressor.guess(Prompt.from_question(QUESTION, TEXTS), 8).tolist()
    draft.generation_config.eos_token_id = guess[2]
    ended, length = _lookahead(engine, method=METHOD, generation=SHORT)
    assert length == guess.index(guess[2]) + 1 < 8
    assert (whole.lookahead or "").startswith((ended.lookahead or "").rstrip("\ufffd"))


def _other_tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|im_end|>", "<|im_start|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["quite other words than theirs"], trainer)
    other = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")
    other.chat_template = TEMPLATE
    return other


def test_another_tokenizers_guess_is_carried_over_as_text() -> None:
    other, draft = _other_tokenizer(), tiny_model(32, seed=1)
    draft.resize_token_embeddings(len(other))
    engine = Engine(
        tiny_model(64, seed=2), tiny_tokenizer(), draft_model=draft, draft_tokenizer=other
    )
    answer, length = _lookahead(engine, method=METHOD, generation=SHORT)
    guessed = Compressor(draft, other).guess(Prompt.from_question(QUESTION, TEXTS), 8)
    text = other.decode(guessed.tolist(), skip_special_tokens=True)
    ids = engine.encode_text(text)
    assert ids != guessed.tolist()
    assert length == len(ids)
    assert answer.lookahead == tiny_tokenizer().decode(ids)


@pytest.mark.parametrize("method", [None, METHOD])
def test_a_cancelled_question_of_a_session_frees_its_cache(method: SpecKV | None) -> None:
    engine = Engine(tiny_model(64, seed=2), tiny_tokenizer(), draft_model=tiny_model(32, seed=1))
    session = engine.session(TEXTS)
    caches: list[weakref.ref[Any]] = []
    hook = engine.target.model.register_forward_pre_hook(
        lambda _m, _a, kwargs: caches.append(weakref.ref(kwargs["past_key_values"])),
        with_kwargs=True,
    )
    stream = session.stream(QUESTION, method=method, generation=Generation(max_new_tokens=300))
    next(stream)
    hook.remove()
    assert caches[-1]() is not None
    stream.close()  # type: ignore[attr-defined]
    gc.collect()
    assert not any(cache() for cache in caches)
    assert not any(type(o) is EvictedLayer for o in gc.get_objects())


def _build(config: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    model.generation_config.eos_token_id = None
    return model


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_mixtures_of_experts_are_evicted_like_the_rest(name: str) -> None:
    common = {**families.COMMON, "num_experts_per_tok": 2}
    config = (
        zoo.mixtral.MixtralConfig(**common, num_local_experts=4)
        if name == "mixtral"
        else zoo.qwen3_moe.Qwen3MoeConfig(**common, num_experts=4, moe_intermediate_size=24)
    )
    model, prompt = _build(config), families.ids(60)[0]
    done = evict(model, [prompt], [prompt[:4]], SpecKV(window_size=4), [59])
    found = [t for (t,) in next_tokens(model, [prompt], SHORT, done.start)]
    assert found == [t for (t,) in next_tokens(model, [prompt], SHORT)]
    few = evict(model, [prompt], [prompt[:4]], SpecKV(window_size=4), [20])
    assert {tuple(layer.shape) for layer in few.kept} == {(1, 2, 20)}
    assert len(list(next_tokens(model, [prompt], SHORT, few.start))) == 8


def test_layers_without_attention_are_refused_by_name() -> None:
    hybrid = zoo.qwen3_next.Qwen3NextConfig(
        **families.COMMON,
        layer_types=["linear_attention", "full_attention"] * 2,
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
        num_experts=4,
        num_experts_per_tok=1,
        moe_intermediate_size=24,
        shared_expert_intermediate_size=24,
    )
    mamba = zoo.mamba.MambaConfig(vocab_size=128, hidden_size=32, num_hidden_layers=2)
    for config in (hybrid, mamba):
        with pytest.raises(
            ModelError, match=r"this model has .*(Linear|Mamba|sliding).* Use SpecPC"
        ):
            evict(_build(config), [families.ids(40)[0]], [NOTHING], SpecKV(), [20])


@pytest.mark.parametrize("name", ["gptj", "bloom"])
def test_models_without_the_attention_interface_are_refused(name: str) -> None:
    config = (
        zoo.gptj.GPTJConfig(vocab_size=128, n_embd=32, n_layer=2, n_head=4, rotary_dim=8)
        if name == "gptj"
        else zoo.bloom.BloomConfig(vocab_size=128, hidden_size=32, n_layer=2, n_head=4)
    )
    with pytest.raises(ModelError, match=r"0 of 2 layers .*attention interface.*SpecPC"):
        evict(_build(config), [families.ids(40)[0]], [NOTHING], SpecKV(), [20])


def test_encoder_decoders_are_refused_at_construction() -> None:
    config = zoo.t5.T5Config(vocab_size=128, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4)
    model = T5ForConditionalGeneration(config)
    with pytest.raises(ModelError, match="no decoder-only language model"):
        Engine(model, tiny_tokenizer())
    with pytest.raises(ModelError, match="no decoder-only language model"):
        Engine(tiny_model(64, seed=2), tiny_tokenizer(), draft_model=model)
    headless = zoo.llama.LlamaModel(zoo.llama.LlamaConfig(**families.COMMON))
    with pytest.raises(ModelError, match="head that predicts tokens"):
        Compressor(headless, tiny_tokenizer())


@pytest.mark.parametrize("cascade", [False, True])
def test_a_cache_budget_that_cannot_hold_the_question_may_fall_back(
    cascade: bool, caplog: pytest.LogCaptureFixture
) -> None:
    engine = tiny_engine()
    cache = SpecKV(capacity=5)
    method = SpecKVPC(specpc=SpecPC(ratio=0.5), speckv=cache) if cascade else cache
    with pytest.raises(BudgetError, match="capacity=5"):
        engine.answer(QUESTION, TEXTS, method=method, generation=SHORT)
    with caplog.at_level(logging.WARNING):
        found = engine.answer(QUESTION, TEXTS, method=method, generation=SHORT, on_error="original")
    plain = SpecPC(ratio=0.5) if cascade else None
    assert found.text == engine.answer(QUESTION, TEXTS, method=plain, generation=SHORT).text
    assert found.fallback is not None
    assert found.fallback.startswith("BudgetError: SpecKV capacity=5")
    assert found.usage.cache_entries is None
    assert [record.exc_info for record in caplog.records] == [None]


def test_a_prompt_beyond_the_drafts_window_may_fall_back_alone() -> None:
    """The draft reads 120 tokens and cannot guess; the other request of the batch is evicted."""
    draft = tiny_model(32, seed=1)
    draft.config.max_position_embeddings = 120
    engine = Engine(tiny_model(64, seed=2), tiny_tokenizer(), draft_model=draft)
    long = Prompt.from_question(QUESTION, [*TEXTS, " ".join(TEXTS)])
    short = Prompt.from_question(QUESTION, TEXTS[:1])
    method = SpecKV(ratio=0.5)
    with pytest.raises(PromptError, match="cannot guess"):
        engine.generate_many([long, short], method=method, generation=SHORT)
    found = engine.generate_many(
        [long, short], method=method, generation=SHORT, on_error="original"
    )
    assert found[0].fallback is not None
    assert found[0].usage.cache_entries is None
    assert found[1].fallback is None
    alone = engine.generate(short, method=method, generation=SHORT)
    assert (found[1].text, found[1].lookahead) == (alone.text, alone.lookahead)

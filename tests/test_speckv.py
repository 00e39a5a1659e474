"""SpecKV through the engine: protection, batches, families, tokenizers, caches, errors."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from draftsieve import Engine, Generation, Prompt, SpecKV, SpecKVPC, SpecPC
from draftsieve.core.errors import BudgetError, ConfigError, ModelError
from draftsieve.core.generation import eviction
from draftsieve.core.generation.decode import next_tokens
from draftsieve.core.kv_cache.batch import join_evicted
from draftsieve.core.kv_cache.layers import EvictedLayer, cache_bytes
from draftsieve.core.kv_cache.prefill import pad_left
from draftsieve.core.prompt.encoder import PromptTokens
from draftsieve.core.speckv.evict import Eviction, evict
from draftsieve.core.speckv.lookahead import own_lookahead
from draftsieve.core.speckv.scorers import SCORERS, h2o, kvzip

from . import families
from .adapters_fixtures import QUESTION, TEMPLATE, TEXTS, tiny_engine, tiny_model, tiny_tokenizer

SHORT = Generation(max_new_tokens=10)
METHOD = SpecKV(ratio=0.6)


def _tokens(texts: list[str]) -> PromptTokens:
    compressor = tiny_engine().compressor
    assert compressor is not None
    return compressor.encoder.encode(Prompt.from_question(QUESTION, texts))


def test_an_answer_tells_what_was_evicted() -> None:
    engine = tiny_engine()
    answer = engine.answer(QUESTION, TEXTS, method=METHOD, generation=SHORT)
    fixed = int(_tokens(TEXTS).protected.sum())
    passages = answer.usage.prompt_tokens - fixed
    assert answer.usage.cache_entries == fixed + round(passages * 0.6)
    assert answer.lookahead
    assert answer.usage.completion_tokens == 10
    again = engine.answer(QUESTION, TEXTS, method=METHOD, generation=SHORT)
    assert again.text == answer.text


def test_all_but_the_passages_stays_by_position(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last token is fed again; of a prompt without passages the window stays."""
    found: list[Eviction] = []

    def recorded(*args: Any) -> Eviction:
        found.append(evict(*args))
        return found[-1]

    monkeypatch.setattr(eviction, "evict", recorded)
    engine, tokens = tiny_engine(), _tokens(TEXTS)
    story = Prompt.from_messages([{"role": "user", "content": "Tell me a long story. " * 8}])
    method = SpecKV(ratio=0.3, window_size=6)
    engine.answer(QUESTION, TEXTS, method=method, generation=SHORT)
    length = engine.generate(story, method=method, generation=SHORT).usage.prompt_tokens
    fixed = set(tokens.protected[:-1].nonzero()[:, 0].tolist())
    assert 0 < len(fixed) < len(tokens) - 1
    for done, stays in zip(found, (fixed, set(range(length - 7, length - 1))), strict=True):
        heads = [set(head.tolist()) for layer in done.entries(0) for head in layer]
        assert len(heads) == 4
        assert all(stays < head for head in heads)


def test_a_capacity_that_holds_everything_changes_nothing_and_skips_the_draft() -> None:
    engine = tiny_engine()
    plain = engine.answer(QUESTION, TEXTS, generation=SHORT)
    whole = engine.answer(QUESTION, TEXTS, method=SpecKV(capacity=5000), generation=SHORT)
    assert whole.text == plain.text
    assert whole.lookahead is None
    assert whole.usage.cache_entries is None
    alone = Engine(tiny_model(64, seed=2), tiny_tokenizer())
    method = SpecKV(capacity=5000)
    assert alone.answer(QUESTION, TEXTS, method=method, generation=SHORT).text == plain.text


@pytest.mark.parametrize("method", [METHOD, SpecKVPC(specpc=SpecPC(ratio=0.7), speckv=METHOD)])
def test_a_batch_gives_each_row_what_it_gets_alone(method: SpecKV | SpecKVPC) -> None:
    engine = tiny_engine()
    prompts = [
        Prompt.from_question(QUESTION, TEXTS),
        Prompt.from_question("Where are tickets sold?", TEXTS[:2]),
        Prompt.from_messages([{"role": "user", "content": "Tell me a long story. " * 8}]),
    ]
    alone = [engine.generate(p, method=method, generation=SHORT) for p in prompts]
    together = engine.generate_many(prompts, method=method, generation=SHORT)
    assert [a.text for a in together] == [a.text for a in alone]
    assert [a.usage for a in together] == [a.usage for a in alone]


@pytest.mark.parametrize("scorer", ["speckv", "snapkv"])
def test_a_batch_of_a_model_with_sliding_windows_is_decoded_row_by_row(scorer: str) -> None:
    target = families.build("gemma3", "sdpa", len(tiny_tokenizer()))
    engine = Engine(target, tiny_tokenizer(), draft_model=tiny_model(32, seed=1))
    questions = [QUESTION, "Where are tickets sold?", "When does the museum open?"]
    passages = [TEXTS, TEXTS[:2], TEXTS[1:]]
    method = SpecKV.model_validate({"ratio": 0.4, "window_size": 8, "scorer": scorer})
    options = Generation(max_new_tokens=10, temperature=1.0, seed=3)
    alone = [
        engine.answer(question, texts, method=method, generation=options)
        for question, texts in zip(questions, passages, strict=True)
    ]
    together = engine.answer_many(questions, passages, method=method, generation=options)
    assert [a.text for a in together] == [a.text for a in alone]
    assert [a.usage for a in together] == [a.usage for a in alone]
    assert all((a.usage.cache_entries or 999) < a.usage.prompt_tokens for a in alone)
    assert len({a.text for a in alone}) == 3


def test_streams_and_samples_work_on_evicted_caches() -> None:
    engine = tiny_engine()
    options = Generation(max_new_tokens=10, temperature=1.0, seed=3, repetition_penalty=1.2)
    answer = engine.answer(QUESTION, TEXTS, method=METHOD, generation=options)
    pieces = list(engine.stream(QUESTION, TEXTS, method=METHOD, generation=options))
    assert "".join(p.text for p in pieces) == answer.text


@pytest.mark.parametrize("name", sorted(SCORERS))
def test_protected_entries_always_stay_and_passages_compete(name: str) -> None:
    model = families.build("llama", "sdpa")
    prompt = families.ids(80)[0]
    protected = torch.zeros(80, dtype=torch.bool)
    protected[:10] = protected[60:] = True
    options = SpecKV.model_validate({"scorer": name, "window_size": 4})
    guessed = prompt[:0] if SCORERS[name].lookahead == "none" else prompt[:3]
    done = evict(model, [prompt], [guessed], options, [40], [protected])
    expected = set(range(10)) | set(range(60, 79))
    for layer in done.kept:
        for head in layer[0]:
            assert expected <= set(head.tolist())
            assert len(set(head.tolist())) == 40


def test_a_capacity_below_what_is_protected_is_refused() -> None:
    with pytest.raises(BudgetError, match="alone take"):
        tiny_engine().answer(QUESTION, TEXTS, method=SpecKV(capacity=20))


EVICTABLE = [case for case in families.CASES if case[0] not in ("mistral", "phi3")]


@pytest.mark.parametrize(("name", "implementation"), EVICTABLE)
def test_decoding_over_kept_entries_equals_a_masked_full_forward(
    name: str, implementation: str
) -> None:
    """The answer of an evicted cache equals full attention with the evicted keys masked."""
    model = families.build(name, implementation)
    prompt = families.ids(70)[0]
    done = evict(model, [prompt], [families.ids(4, seed=9)[0]], SpecKV(window_size=6), [30])
    found = [t for (t,) in next_tokens(model, [prompt], Generation(max_new_tokens=6), done.start)]
    masked = only_kept(families.build(name, "eager"), done, 70)
    assert found == _greedy(masked, prompt, 6)


@pytest.mark.parametrize("name", ["gemma3", "qwen3", "gpt_oss"])
def test_sliding_layers_forget_the_lookahead(name: str) -> None:
    model = families.build(name, "eager")
    prompt = families.ids(60)[0]
    done = evict(model, [prompt], [families.ids(8, seed=5)[0]], SpecKV(window_size=4), [59])
    found = [t for (t,) in next_tokens(model, [prompt], SHORT, done.start)]
    assert found == [t for (t,) in next_tokens(model, [prompt], SHORT)]
    with pytest.raises(ModelError, match="one by one"):
        evict(model, [prompt, prompt[:40]], [prompt[:2]] * 2, SpecKV(window_size=4), [20, 20])


def only_kept(model: PreTrainedModel, done: Eviction, columns: int) -> PreTrainedModel:
    """A copy with full attention: from the last prompt token on queries see only kept prompt keys.

    Args:
        model: The copy is to read whole sequences, without a cache.
        done: Of left-padded prompts.
        columns: Of the prompts with their padding.
    """
    rows = [(int(pad), done.entries(row)) for row, pad in enumerate(done.pads)]

    def masked(  # type: ignore[no-untyped-def]
        module, query, key, value, mask, scaling, sliding_window=None, softcap=None, s_aux=None, **_
    ):
        group = query.shape[1] // key.shape[1]
        count = key.shape[2]
        allowed = torch.ones(len(rows), key.shape[1], count, count).tril().bool()
        if sliding_window is not None:
            allowed &= ~torch.ones(count, count).tril(-sliding_window).bool()
        for row, (pad, layers) in enumerate(rows):
            allowed[row, :, pad:, :pad] = False
            for head, entries in enumerate(layers[module.layer_idx]):
                if len(entries):
                    blocked = torch.ones(columns - 1, dtype=torch.bool)
                    blocked[entries + pad] = False
                    allowed[row, head, columns - 1 :, : columns - 1] &= ~blocked
        keys, values = (x.repeat_interleave(group, 1) for x in (key, value))
        logits = query @ keys.transpose(-1, -2) * scaling
        if softcap is not None:
            logits = torch.tanh(logits / softcap) * softcap
        logits = logits.masked_fill(~allowed.repeat_interleave(group, 1), float("-inf"))
        if s_aux is not None:
            logits = torch.cat([logits, s_aux.view(1, -1, 1, 1).expand(*logits.shape[:3], 1)], -1)
        return (logits.softmax(-1)[..., :count] @ values).transpose(1, 2), None

    return families.with_attention(model, masked)


def _greedy(model: PreTrainedModel, prompt: torch.Tensor, steps: int) -> list[int]:
    """Greedy answer by a whole forward pass a token."""
    ids = prompt.unsqueeze(0)
    for _ in range(steps):
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
    return ids[0, prompt.numel() :].tolist()


def test_transformers_generate_takes_an_evicted_cache() -> None:
    model = families.build("llama", "sdpa")
    prompt = families.ids(60)[0]
    ids = prompt.unsqueeze(0)
    mask = torch.ones_like(ids)

    def run() -> Eviction:
        return evict(model, [prompt], [prompt[:4]], SpecKV(window_size=4), [20])

    done = run()
    ours = [t for (t,) in next_tokens(model, [prompt], SHORT, done.start)]
    masked = only_kept(model, done, 60)
    greedy: dict[str, object] = {"max_new_tokens": 10, "do_sample": False}
    sampled = {"do_sample": True, "temperature": 1.3, "top_p": 0.9, "repetition_penalty": 1.1}
    for options in (greedy, greedy | {"repetition_penalty": 1.5}, greedy | sampled):
        torch.manual_seed(0)
        cache = run().start.cache
        found = model.generate(ids, attention_mask=mask, past_key_values=cache, **options)
        torch.manual_seed(0)
        wanted = masked.generate(ids, attention_mask=mask, use_cache=False, **options)
        torch.manual_seed(0)
        plain = model.generate(ids, attention_mask=mask, **options)
        assert found.tolist() == wanted.tolist() != plain.tolist()
        if options is greedy:
            assert found[0, 60:].tolist() == ours


def test_transformers_generate_takes_an_evicted_batch() -> None:
    """Left-padded rows, one of which keeps all its entries and one fewer than the others."""
    model = families.build("llama", "sdpa")
    prompts = [families.ids(n, seed=n)[0] for n in (60, 15, 40)]
    options = SpecKV(window_size=4)
    done = evict(model, prompts, [prompt[:4] for prompt in prompts], options, [20, 20, 12])
    ids, mask = pad_left(prompts, model.device)
    greedy: dict[str, object] = {"max_new_tokens": 8, "do_sample": False}
    found = model.generate(
        ids,
        attention_mask=done.start.mask,
        position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
        past_key_values=done.start.cache,
        **greedy,
    )
    masked = only_kept(model, done, 60)
    wanted = masked.generate(ids, attention_mask=mask, use_cache=False, **greedy)
    plain = model.generate(ids, attention_mask=mask, **greedy)
    assert found.tolist() == wanted.tolist()
    same = (found == plain).all(1)  # (batch,)
    assert same.tolist() == [False, True, False]


def test_beams_work_after_repeating_the_batch() -> None:
    model = families.build("llama", "sdpa")
    prompt = families.ids(60)[0]
    done = evict(model, [prompt], [prompt[:4]], SpecKV(window_size=4), [20])
    cache = done.start.cache
    cache.batch_repeat_interleave(3)
    ids = prompt.unsqueeze(0)
    options = {"max_new_tokens": 6, "num_beams": 3, "do_sample": False}
    options["attention_mask"] = torch.ones_like(ids)
    found = model.generate(ids, past_key_values=cache, **options)
    wanted = only_kept(model, done, 60).generate(ids, use_cache=False, **options)
    assert found.tolist() == wanted.tolist() != model.generate(ids, **options).tolist()


def test_cropping_takes_back_only_what_was_generated() -> None:
    model = families.build("llama", "sdpa")
    prompt = families.ids(60)[0]
    done = evict(model, [prompt], [prompt[:4]], SpecKV(window_size=4), [20])
    layer = done.start.cache.layers[0]
    assert isinstance(layer, EvictedLayer)
    assert (layer.get_seq_length(), layer.keys.shape[-2]) == (59, 20)
    with pytest.raises(ModelError, match=r"crop 10 tokens .*: 0 came after"):
        done.start.cache.crop(-10)
    steps = next_tokens(model, [prompt], SHORT, done.start)
    next(steps)
    next(steps)
    assert layer.get_seq_length() == 61
    with pytest.raises(ModelError, match="evicted ones do not come back"):
        done.start.cache.crop(-3)
    done.start.cache.crop(-2)
    assert (layer.get_seq_length(), layer.keys.shape[-2]) == (59, 20)
    with pytest.raises(ModelError, match="0 came after"):
        done.start.cache.crop(-1)


def test_cropping_joined_and_sliding_layers_spares_the_prompt() -> None:
    model = families.build("llama", "sdpa")
    prompts = [families.ids(n)[0] for n in (60, 30)]
    alone = [evict(model, [p], [p[:4]], SpecKV(window_size=4), [20]) for p in prompts]
    joined = join_evicted([done.start.cache for done in alone], [[0], [1]])
    sliding = families.build("gemma3", "sdpa")
    prompt = families.ids(20)[0]  # below the window of 24
    window = evict(sliding, [prompt], [prompt[:4]], SpecKV(window_size=4), [8]).start.cache
    for cache, seen in ((joined, 59), (window, 19)):
        sizes = [layer.keys.shape for layer in cache.layers]
        with pytest.raises(ModelError, match="0 came after"):
            cache.crop(-1)
        assert [layer.keys.shape for layer in cache.layers] == sizes
        assert {layer.get_seq_length() for layer in cache.layers} == {seen}


def test_evicted_entries_share_no_storage_with_the_full_cache() -> None:
    model = families.build("llama", "sdpa")
    prompt = families.ids(200)[0]
    done = evict(model, [prompt], [prompt[:4]], SpecKV(window_size=4), [20])
    exact = sum(
        t.numel() * t.element_size() for la in done.start.cache.layers for t in (la.keys, la.values)
    )
    assert cache_bytes(done.start.cache) == exact


def test_the_draft_may_have_another_tokenizer() -> None:
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
    assert other.get_vocab() != tiny_tokenizer().get_vocab()
    draft = tiny_model(32, seed=1)
    draft.resize_token_embeddings(len(other))
    engine = Engine(
        tiny_model(64, seed=2), tiny_tokenizer(), draft_model=draft, draft_tokenizer=other
    )
    for method in (METHOD, SpecKVPC(specpc=SpecPC(ratio=0.7), speckv=METHOD)):
        answer = engine.answer(QUESTION, TEXTS, method=method, generation=SHORT)
        assert answer.lookahead
        assert answer.usage.completion_tokens == 10


def test_a_cancelled_stream_frees_its_cache() -> None:
    stream = tiny_engine().stream(
        QUESTION, TEXTS, method=METHOD, generation=Generation(max_new_tokens=300)
    )
    next(stream)
    layers = [weakref.ref(o) for o in gc.get_objects() if type(o) is EvictedLayer]
    assert layers
    stream.close()  # type: ignore[attr-defined]
    gc.collect()
    assert all(layer() is None for layer in layers)


def test_options_and_models_that_cannot() -> None:
    for bad in ({"kernel_size": 4}, {"capacity": 5, "ratio": 0.5}, {"pool": "avg"}):
        with pytest.raises(ValidationError):
            SpecKV.model_validate(bad)
    with pytest.raises(ConfigError, match="must be None"):
        SpecKVPC(speckv=SpecKV(lookahead_tokens=4))
    assert SpecKV().capacity == 512
    with pytest.raises(ModelError, match="nothing to evict"):
        evict(
            families.build("mistral", "sdpa"),
            [families.ids(50)[0]],
            [families.ids(2)[0]],
            SpecKV(),
            [20],
        )
    with pytest.raises(ModelError, match="no draft"):
        Engine(tiny_model(64, seed=2), tiny_tokenizer()).answer(
            QUESTION, TEXTS, method=SpecKV(ratio=0.5)
        )


@pytest.mark.parametrize("name", sorted(set(SCORERS) - {"speckv"}))
def test_baseline_scorers_need_no_draft_and_keep_exactly_the_capacity(name: str) -> None:
    model = families.build("llama", "sdpa")
    prompts = [families.ids(n, seed=n)[0] for n in (70, 90)]
    options = SpecKV.model_validate({"scorer": name, "window_size": 4})
    nothing = torch.tensor([], dtype=torch.int64)
    both = evict(model, prompts, [nothing, nothing], options, [30, 30])
    for row, prompt in enumerate(prompts):
        alone = evict(model, [prompt], [nothing], options, [30])
        for layer, (found, expected) in enumerate(zip(both.kept, alone.kept, strict=True)):
            assert (found[row] - both.pads[row]).tolist() == expected[0].tolist(), layer
            for head in expected[0].tolist():
                assert len(set(head)) == 30
                assert set(range(len(prompt) - 5, len(prompt) - 1)) <= set(head)
    engine = Engine(tiny_model(64, seed=2), tiny_tokenizer())
    method = SpecKV.model_validate({"scorer": name, "ratio": 0.5})
    answer = engine.answer(QUESTION, TEXTS, method=method, generation=SHORT)
    assert answer.usage.completion_tokens == 10
    ids = families.ids(80)
    traced = Engine(model, None).trace(ids, SpecKV.model_validate({"scorer": name, "capacity": 40}))
    assert [len(head) for layer in traced.kept_kv_indices for head in layer] == [40] * 8


def test_baseline_scores_against_plain_attention() -> None:
    """H2O, TOVA and SnapKV from attention matrices of an eager pass, key norms from its cache."""
    model, prompt = families.build("llama", "eager"), families.ids(300)[0]
    with torch.no_grad():
        read = model(input_ids=prompt.unsqueeze(0), output_attentions=True, use_cache=True)
    whole, known = read.attentions, read.past_key_values.layers
    nothing = torch.tensor([], dtype=torch.int64)
    for name in ("h2o", "tova", "snapkv", "key_norm"):
        options = SpecKV.model_validate({"scorer": name, "window_size": 8, "pool": None})
        done = evict(model, [prompt], [nothing], options, [100])
        for layer, attention in enumerate(whole):
            grouped = attention[0].view(2, 2, 300, 300)  # (kv_heads, group, queries, keys)
            expected = {
                "h2o": grouped.sum(dim=(1, 2)),
                "tova": attention[0, :, -1].mean(0).expand(2, -1),
                "snapkv": grouped[:, :, -9:].amax(dim=(1, 2)),
                "key_norm": -known[layer].keys[0].square().sum(-1).sqrt(),
            }[name]
            candidates = 300 - 8 - 1
            torch.testing.assert_close(
                done.scores[layer][0, :, :candidates],
                expected[:, :candidates],
                rtol=1e-4,
                atol=1e-6,
            )


@pytest.mark.parametrize("name", ["oracle", "laq"])
def test_a_target_looks_ahead_by_itself(name: str) -> None:
    """The oracle's guess is the target's greedy answer, LAQ's the answer of SnapKV's cache."""
    model, prompt = families.build("llama", "sdpa"), families.ids(70)[0]
    options = SpecKV.model_validate({"scorer": name, "window_size": 4})
    found = own_lookahead(model, prompt, options, 20, 8)
    plain = _greedy(model, prompt, 8)
    snapkv = SpecKV(scorer="snapkv", window_size=4)
    done = evict(model, [prompt], [prompt[:0]], snapkv, [20])
    evicted = _greedy(only_kept(model, done, 70), prompt, 8)
    assert plain != evicted
    assert found.tolist() == (plain if name == "oracle" else evicted)

    engine = tiny_engine()
    method = SpecKV.model_validate({"scorer": name, "ratio": 0.3})
    answer = engine.answer(QUESTION, TEXTS, method=method, generation=SHORT)
    other = None if name == "oracle" else SpecKV(ratio=0.3, scorer="snapkv")
    assert answer.lookahead == engine.answer(QUESTION, TEXTS, method=other, generation=SHORT).text


@pytest.mark.parametrize("name", sorted(SCORERS))
def test_no_scorer_forms_a_matrix_of_all_tokens(name: str) -> None:
    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(  # type: ignore[no-untyped-def]
            self, func, types, args=(), kwargs=None
        ):
            out = func(*args, **(kwargs or {}))
            for part in out if isinstance(out, tuple) else (out,):
                if isinstance(part, torch.Tensor) and part._base is None:
                    self.size = max(self.size, part.numel())
            return out

    model, prompt = families.build("llama", "sdpa"), families.ids(1500)[0]
    model.config.max_position_embeddings = 4096  # room for what a scorer repeats
    options = SpecKV.model_validate({"scorer": name, "window_size": 4})
    with Largest() as largest:
        evict(model, [prompt], [prompt[:4]], options, [100])
    heads, rows = 4, {"h2o": h2o.BLOCK, "kvzip": 2 * kvzip.BLOCK}.get(name, 10)
    assert largest.size <= max(heads * rows, 128) * 1504 < 1500**2


def test_streaming_keeps_sinks_and_the_newest() -> None:
    done = evict(
        families.build("llama", "sdpa"),
        [families.ids(60)[0]],
        [torch.tensor([], dtype=torch.int64)],
        SpecKV(scorer="streaming", window_size=4),
        [20],
    )
    for layer in done.kept:
        for head in layer[0]:
            assert head.tolist() == [0, 1, 2, 3, *range(43, 59)]


def test_random_entries_follow_the_seed() -> None:
    kept = {}
    for seed in (0, 0, 1):
        options = SpecKV(scorer="random", window_size=4, seed=seed)
        nothing = torch.tensor([], dtype=torch.int64)
        done = evict(
            families.build("llama", "sdpa"), [families.ids(60)[0]], [nothing], options, [20]
        )
        found = [layer.tolist() for layer in done.kept]
        assert kept.setdefault(seed, found) == found
    assert kept[0] != kept[1]

"""SpecKV through the engine: protection, batches, families, tokenizers, caches, errors."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from pydantic import ValidationError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedTokenizerFast
from transformers.masking_utils import eager_mask

from draftsieve import Engine, Generation, Prompt, SpecKV, SpecKVPC, SpecPC
from draftsieve.core.cache import EvictedLayer, cache_bytes
from draftsieve.core.decode import next_tokens
from draftsieve.core.errors import BudgetError, ModelError
from draftsieve.core.kv_scorers import SCORERS, h2o
from draftsieve.core.speckv import evict
from draftsieve.core.types import PromptTokens

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


def test_streams_and_samples_work_on_evicted_caches() -> None:
    engine = tiny_engine()
    options = Generation(max_new_tokens=10, temperature=1.0, seed=3, repetition_penalty=1.2)
    answer = engine.answer(QUESTION, TEXTS, method=METHOD, generation=options)
    pieces = list(engine.stream(QUESTION, TEXTS, method=METHOD, generation=options))
    assert "".join(p.text for p in pieces) == answer.text


def test_protected_entries_always_stay_and_passages_compete() -> None:
    model = families.build("llama", "sdpa")
    prompt = families.ids(80)[0]
    protected = torch.zeros(80, dtype=torch.bool)
    protected[:10] = protected[60:] = True
    done = evict(model, [prompt], [prompt[:3]], SpecKV(window_size=4), [40], [protected])
    expected = set(range(10)) | set(range(60, 79))
    for layer in done.kept:
        for head in layer[0]:
            assert expected <= set(head.tolist())
            assert len(set(head.tolist())) == 40
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
    kept = [layer[0] for layer in done.kept]  # per layer (kv_heads, 30), or 0 in sliding layers
    found = [t for (t,) in next_tokens(model, [prompt], Generation(max_new_tokens=6), done.start)]
    assert found == _masked_answer(families.build(name, "eager"), prompt, kept, 6)


@pytest.mark.parametrize("name", ["gemma3", "qwen3", "gpt_oss"])
def test_sliding_layers_forget_the_lookahead(name: str) -> None:
    model = families.build(name, "eager")
    prompt = families.ids(60)[0]
    done = evict(model, [prompt], [families.ids(8, seed=5)[0]], SpecKV(window_size=4), [59])
    found = [t for (t,) in next_tokens(model, [prompt], SHORT, done.start)]
    assert found == [t for (t,) in next_tokens(model, [prompt], SHORT)]
    with pytest.raises(ModelError, match="one by one"):
        evict(model, [prompt, prompt[:40]], [prompt[:2]] * 2, SpecKV(window_size=4), [20, 20])


def _masked_answer(
    model: torch.nn.Module, prompt: torch.Tensor, kept: list[torch.Tensor], steps: int
) -> list[int]:
    """Greedy answer where queries from the last prompt token on see only kept prompt keys."""
    size = prompt.numel()

    def masked(  # type: ignore[no-untyped-def]
        module, query, key, value, mask, scaling, sliding_window=None, softcap=None, s_aux=None, **_
    ):
        group = query.shape[1] // key.shape[1]
        count = key.shape[2]
        allowed = torch.ones(key.shape[1], count, count).tril().bool()
        if sliding_window is not None:
            allowed &= ~torch.ones(count, count).tril(-sliding_window).bool()
        for head, entries in enumerate(kept[module.layer_idx]):
            if len(entries):
                blocked = torch.ones(size - 1, dtype=torch.bool)
                blocked[entries] = False
                allowed[head, size - 1 :, : size - 1] &= ~blocked
        keys, values = (x.repeat_interleave(group, 1) for x in (key, value))
        logits = query @ keys.transpose(-1, -2) * scaling
        if softcap is not None:
            logits = torch.tanh(logits / softcap) * softcap
        logits = logits.masked_fill(~allowed.repeat_interleave(group, 0), float("-inf"))
        if s_aux is not None:
            logits = torch.cat([logits, s_aux.view(1, -1, 1, 1).expand(*logits.shape[:3], 1)], -1)
        return (logits.softmax(-1)[..., :count] @ values).transpose(1, 2), None

    AttentionInterface.register("masked_reference", masked)
    AttentionMaskInterface.register("masked_reference", eager_mask)
    before = model.config._attn_implementation
    model.config._attn_implementation_internal = "masked_reference"
    try:
        ids = prompt.unsqueeze(0)
        for _ in range(steps):
            with torch.no_grad():
                logits = model(input_ids=ids, use_cache=False).logits
            ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
    finally:
        model.config._attn_implementation_internal = before
    return ids[0, size:].tolist()


def test_transformers_generate_takes_an_evicted_cache() -> None:
    model = families.build("llama", "sdpa")
    prompt = families.ids(60)[0]

    def start() -> dict[str, object]:
        done = evict(model, [prompt], [prompt[:4]], SpecKV(window_size=4), [20])
        mask = torch.ones(1, 60, dtype=torch.int64)
        return {
            "input_ids": prompt.unsqueeze(0),
            "attention_mask": mask,
            "past_key_values": done.start.cache,
        }

    done = evict(model, [prompt], [prompt[:4]], SpecKV(window_size=4), [20])
    ours = [t for (t,) in next_tokens(model, [prompt], SHORT, done.start)]
    theirs = model.generate(**start(), max_new_tokens=10, do_sample=False)
    assert theirs[0, 60:].tolist() == ours
    torch.manual_seed(0)
    sampled = model.generate(
        **start(), max_new_tokens=10, do_sample=True, top_p=0.9, repetition_penalty=1.1
    )
    assert sampled.shape == (1, 70)


def test_beams_work_after_repeating_the_batch() -> None:
    model = families.build("llama", "sdpa")
    prompt = families.ids(60)[0]
    done = evict(model, [prompt], [prompt[:4]], SpecKV(window_size=4), [59])
    cache = done.start.cache
    cache.batch_repeat_interleave(3)
    ids = prompt.unsqueeze(0)
    mask = torch.ones_like(ids)
    options = {"max_new_tokens": 6, "num_beams": 3, "do_sample": False}
    found = model.generate(ids, attention_mask=mask, past_key_values=cache, **options)
    assert found.tolist() == model.generate(ids, attention_mask=mask, **options).tolist()


def test_cropping_takes_back_only_what_was_generated() -> None:
    model = families.build("llama", "sdpa")
    prompt = families.ids(60)[0]
    done = evict(model, [prompt], [prompt[:4]], SpecKV(window_size=4), [20])
    layer = done.start.cache.layers[0]
    assert isinstance(layer, EvictedLayer)
    assert (layer.get_seq_length(), layer.keys.shape[-2]) == (59, 20)
    steps = next_tokens(model, [prompt], SHORT, done.start)
    next(steps)
    next(steps)
    assert layer.get_seq_length() == 61
    done.start.cache.crop(-2)
    assert (layer.get_seq_length(), layer.keys.shape[-2]) == (59, 20)
    with pytest.raises(ModelError, match="evicted ones do not come back"):
        done.start.cache.crop(-20)


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
    with pytest.raises(ValidationError, match="must be None"):
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
    """H2O, TOVA and SnapKV from full attention matrices of an eager pass."""
    model, prompt = families.build("llama", "eager"), families.ids(300)[0]
    with torch.no_grad():
        whole = model(input_ids=prompt.unsqueeze(0), output_attentions=True).attentions
    nothing = torch.tensor([], dtype=torch.int64)
    for name in ("h2o", "tova", "snapkv"):
        options = SpecKV.model_validate({"scorer": name, "window_size": 8, "pool": None})
        done = evict(model, [prompt], [nothing], options, [100])
        for layer, attention in enumerate(whole):
            grouped = attention[0].view(2, 2, 300, 300)  # (kv_heads, group, queries, keys)
            expected = {
                "h2o": grouped.sum(dim=(1, 2)),
                "tova": attention[0, :, -1].mean(0).expand(2, -1),
                "snapkv": grouped[:, :, -9:].amax(dim=(1, 2)),
            }[name]
            rivals = 300 - 8 - 1
            torch.testing.assert_close(
                done.scores[layer][0, :, :rivals], expected[:, :rivals], rtol=1e-4, atol=1e-6
            )


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
    options = SpecKV.model_validate({"scorer": name, "window_size": 4})
    with Largest() as largest:
        evict(model, [prompt], [prompt[:4]], options, [100])
    heads, rows = 4, {"h2o": h2o.BLOCK}.get(name, 10)
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

"""The draft's guess from stored passages, against one pass with a mask of our own."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from draftsieve import (
    Compressor,
    Engine,
    Generation,
    PassageStore,
    Prompt,
    SpecKV,
    SpecKVPC,
    SpecPC,
)
from draftsieve.core.errors import ConfigError, PromptError
from draftsieve.core.prompt.encoder import PromptTokens
from draftsieve.core.specpc.stored.moving import differences
from draftsieve.core.store.codec import Codec

from . import families
from .adapters_fixtures import QUESTION, TEXTS, tiny_model, tiny_tokenizer

FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "phi3", "gemma2", "gemma3", "gpt_oss"]
PROMPT = Prompt.from_question(QUESTION, TEXTS)
CACHE = SpecKV(ratio=0.25, lookahead_tokens=6, window_size=8)


def _compressor(seed: int = 1, **options: Any) -> Compressor:
    model = tiny_model(32, seed=seed, layers=4)
    return Compressor(model, tiny_tokenizer(), progress=False, **options)


def _store(draft: Compressor, codec: Codec = "float16", texts: Any = TEXTS) -> PassageStore:
    store = PassageStore.open(":memory:", draft, codec=codec, layers="all", for_guesses=True)
    store.add(texts)
    return store


def _naive(model: Any, tokens: PromptTokens, count: int) -> list[int]:
    """Greedy by whole passes: passages see the beginning and themselves, the rest sees all."""
    model.set_attn_implementation("eager")
    own, size = tokens.passage, len(tokens)
    begin, behind = int((own < 0).long().argmin()), int((own >= 0).nonzero()[-1]) + 1
    lengths = torch.bincount(own[own >= 0])
    allowed = torch.ones(size + count, size + count).tril().bool()
    allowed[begin:behind, begin:behind] &= own[begin:behind, None] == own[None, begin:behind]
    positions = torch.arange(size + count)
    positions[begin:behind] = torch.cat([torch.arange(int(n)) for n in lengths]) + begin
    positions[behind:] = torch.arange(size + count - behind) + begin + int(lengths.max())
    ids = tokens.ids
    for _ in range(count):
        seen = len(ids)
        mask = torch.zeros(1, 1, seen, seen).masked_fill(
            ~allowed[:seen, :seen], torch.finfo(torch.float32).min
        )
        with torch.no_grad():
            logits = model(ids[None], attention_mask=mask, position_ids=positions[None, :seen])
        ids = torch.cat([ids, logits.logits[0, -1:].argmax(-1)])
    found: list[int] = ids[len(tokens) :].tolist()
    return found


def _behind_each_other(model: Any, tokens: PromptTokens, count: int) -> list[int]:
    """Greedy behind passages that were read alone with the beginning right in front of them."""
    model.set_attn_implementation("eager")
    own, ids = tokens.passage, tokens.ids
    begin, behind = int((own < 0).long().argmin()), int((own >= 0).nonzero()[-1]) + 1
    cache, first = DynamicCache(config=model.config), begin
    with torch.no_grad():
        model(ids[None, :begin], past_key_values=cache)
        for index in range(int(own.max()) + 1):
            passage, alone = ids[own == index], DynamicCache(config=model.config)
            places = torch.arange(begin + len(passage)) + first - begin
            both = torch.cat([ids[:begin], passage])[None]
            model(both, past_key_values=alone, position_ids=places[None])
            for layer, states in enumerate(alone.layers):
                cache.update(states.keys[:, :, begin:], states.values[:, :, begin:], layer)
            first += len(passage)
        asked, found = ids[None, behind:], []
        for _ in range(count):
            asked = model(asked, past_key_values=cache).logits[:, -1:].argmax(-1)
            found.append(int(asked))
    return found


@pytest.mark.parametrize("name", FAMILIES)
def test_a_guess_is_that_of_one_pass_with_passages_apart(name: str) -> None:
    draft = Compressor(families.without_sliding(name, 512), tiny_tokenizer(), progress=False)
    store = _store(draft)
    found = store.guess(PROMPT, 8, moved=False).tolist()
    assert found == _naive(draft.model, store.frame.tokens(TEXTS, QUESTION), 8)


@pytest.mark.parametrize("name", FAMILIES)
def test_passages_behind_each_other_are_those_read_with_the_beginning_there(name: str) -> None:
    """Against readings of beginning and passage, both so many positions later."""
    draft = Compressor(families.without_sliding(name, 512), tiny_tokenizer(), progress=False)
    store = _store(draft)
    assert store.can_move() == (name not in ("gemma3", "gpt_oss"))
    found = store.guess(PROMPT, 8).tolist()
    if not store.can_move():
        assert found == store.guess(PROMPT, 8, moved=False).tolist()
        return
    assert found == _behind_each_other(draft.model, store.frame.tokens(TEXTS, QUESTION), 8)


@pytest.mark.parametrize("seed", range(4))
def test_order_and_duplicates(seed: int) -> None:
    draft = _compressor(seed)
    store, texts = _store(draft), [TEXTS[2], TEXTS[0], TEXTS[2]]
    found = store.guess(Prompt.from_question(QUESTION, texts), 8).tolist()
    assert found == _behind_each_other(draft.model, store.frame.tokens(texts, QUESTION), 8)
    empty = Prompt.from_question(QUESTION, [texts[0], "", *texts[1:]])
    assert store.guesses(empty)
    assert store.guess(empty, 8).tolist() == found


def test_what_a_guess_of_a_single_passage_is_read_as() -> None:
    """One passage apart is the ordinary reading of the store's own prompt."""
    draft = _compressor()
    store = _store(draft)
    whole = store.frame.tokens(TEXTS[:1], QUESTION)
    (want,) = draft.draft.guess([whole], [8])
    assert store.guess(Prompt.from_question(QUESTION, TEXTS[:1]), 8).tolist() == want.tolist()


def test_a_stored_guess_ends_at_an_end_token_and_at_the_window() -> None:
    draft = _compressor()
    store = _store(draft)
    whole = store.guess(PROMPT, 8)
    draft.model.generation_config.eos_token_id = int(whole[3])
    assert (
        store.guess(PROMPT, 8).tolist() == whole[: whole.tolist().index(int(whole[3])) + 1].tolist()
    )
    long = Prompt.from_question("Why? " * 1000, TEXTS)
    with pytest.raises(PromptError, match="ask a shorter one"):
        store.guess(long, 8)


def test_passages_beyond_the_window_stay_where_they_were_read() -> None:
    draft = _compressor()
    texts = [f"{number}. {text}" for number in range(20) for text in TEXTS]
    store, prompt = _store(draft, texts=texts), Prompt.from_question(QUESTION, texts)
    assert draft.draft.context_window is not None
    assert store.stats().rows > draft.draft.context_window
    assert store.guesses(prompt)
    assert store.guess(prompt, 8).tolist() == store.guess(prompt, 8, moved=False).tolist()
    few = Prompt.from_question(QUESTION, texts[:9])
    assert store.guess(few, 8).tolist() != store.guess(few, 8, moved=False).tolist()


def test_how_far_tokens_move_that_were_read_in_pieces() -> None:
    assert differences((5, 0, 3), 2).tolist() == [0, 0, 2, 2, 4, 5, 5, 7]
    assert differences((), 2).tolist() == []


def test_models_whose_keys_cannot_be_turned_keep_their_positions() -> None:
    """Other frequencies for longer texts, a layer without positions, keys turned another way."""
    scaled = _compressor()
    scaled.model.get_decoder().rotary_emb.rope_type = "dynamic"
    assert not _store(scaled).can_move()
    draft = _compressor()
    assert _store(draft).can_move()
    layer: Any = draft.model.get_decoder().layers[2]  # type: ignore[index]
    layer.self_attn.forward = partial(_without_positions, layer.self_attn.forward)
    assert not _store(draft).can_move()


def _without_positions(forward: Any, *args: Any, **kwargs: Any) -> Any:
    cos, sin = kwargs["position_embeddings"]
    kwargs["position_embeddings"] = torch.ones_like(cos), torch.zeros_like(sin)
    return forward(*args, **kwargs)


def test_a_store_that_lacks_layers_says_so() -> None:
    draft = _compressor()
    store = PassageStore.open(":memory:", draft, first_layer=1, for_guesses=True)
    store.add(TEXTS)
    assert not store.guesses(PROMPT)
    with pytest.raises(ConfigError, match="first_layer=0"):
        store.guess(PROMPT, 8)


# ---------------------------------------------------------------- who asks for it


def _engine(draft: Compressor, store: PassageStore | None) -> Engine:
    target = tiny_model(32, seed=5)
    return Engine(target, tiny_tokenizer(), draft_model=draft.model, store=store, progress=False)


def _tokens_read(draft: Compressor) -> list[int]:
    """Tokens of each pass through the draft's first layer from now on."""
    seen: list[int] = []
    layer: Any = draft.model.get_decoder().layers[0]  # type: ignore[index]
    layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[:2].numel()))
    return seen


def test_speckv_looks_ahead_from_the_store_without_reading() -> None:
    draft = _compressor()
    store = _store(draft)
    engine, guess = _engine(draft, store), store.guess(PROMPT, 6)
    seen = _tokens_read(draft)
    engine.answer(QUESTION, TEXTS[:1], CACHE)
    assert seen[0] == len(store.frame.ids)  # read once
    seen.clear()
    answer = engine.answer(QUESTION, TEXTS, CACHE)
    assert seen == [len(store.frame.tail(QUESTION).ids), *[1] * 5]
    assert answer.lookahead == tiny_tokenizer().decode(guess.tolist(), skip_special_tokens=True)


@pytest.mark.parametrize("case", ["unknown passage", "no layers", "conversation", "no store"])
def test_other_prompts_are_read(case: str) -> None:
    draft = _compressor()
    store: PassageStore | None = _store(draft)
    turns: list[dict[str, str]] = []
    if case == "unknown passage":
        store = _store(draft, texts=TEXTS[1:])
    elif case == "no layers":
        store = PassageStore.open(":memory:", draft, first_layer=1, for_guesses=True)
        store.add(TEXTS)
    elif case == "no store":
        store = None
    else:
        turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Yes?"}]
    prompt = Prompt.from_messages([*turns, {"role": "user", "content": QUESTION}], TEXTS)
    assert store is None or not store.guesses(prompt)
    stored, plain = (_engine(draft, some).generate(prompt, CACHE) for some in (store, None))
    assert stored.lookahead == plain.lookahead
    assert stored.text == plain.text


def test_a_shortened_prompt_is_answered_from_the_whole_passages() -> None:
    draft = _compressor()
    store = _store(draft)
    first = SpecPC(ratio=0.6, unit="sentence", passages_apart=True)
    method = SpecKVPC(specpc=first, speckv=SpecKV(ratio=0.5, window_size=8))
    engine, short = _engine(draft, store), Generation(max_new_tokens=6)
    engine.answer(QUESTION, TEXTS, method, generation=short)
    seen = _tokens_read(draft)
    answer = engine.answer(QUESTION, TEXTS, method, generation=short)
    asked = len(store.frame.tail(QUESTION).ids)
    assert seen == [asked, asked, *[1] * 5]  # scores, then the guess
    guess = store.guess(PROMPT, 6).tolist()
    assert answer.lookahead == tiny_tokenizer().decode(guess, skip_special_tokens=True)


def test_batches_mix_stored_and_read_guesses() -> None:
    draft = _compressor()
    store = _store(draft, texts=TEXTS[:2])
    engine = _engine(draft, store)
    prompts = [(QUESTION, TEXTS[:2]), (QUESTION, TEXTS), ("Who sells tickets?", TEXTS[1::-1])]
    questions, passages = zip(*prompts, strict=True)
    together = engine.answer_many(questions, passages, CACHE)
    alone = [engine.answer(*each, CACHE) for each in prompts]
    assert [a.lookahead for a in together] == [a.lookahead for a in alone]
    assert [a.text for a in together] == [a.text for a in alone]


def test_guessed_answers_come_from_the_store_behind_the_default_system_text() -> None:
    draft = _compressor()
    store = _store(draft)
    stored = Compressor(draft.model, draft.tokenizer, store=store, progress=False)
    assert stored.guess(PROMPT, 6).tolist() == store.guess(PROMPT, 6).tolist()
    own = Prompt.from_question(QUESTION, TEXTS, system="Answer in rhymes.")
    assert stored.guess(own, 6).tolist() == draft.guess(own, 6).tolist()
    store.beginning()
    seen = _tokens_read(draft)
    assert (
        stored.guess_answer(QUESTION, TEXTS, 4) == draft.draft.text(store.guess(PROMPT, 4)).strip()
    )
    assert max(seen) == len(store.frame.tail(QUESTION).ids)

"""Sentences of the passages that the target reads behind the draft's guess."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from draftsieve import Engine, Generation, Passage, Prompt, SpecKV, SpecKVPC, SpecPC
from draftsieve.core.errors import ConfigError
from draftsieve.core.generation import eviction
from draftsieve.core.generation.related import related_sentences
from draftsieve.core.speckv.evict import Eviction, evict

from .adapters_fixtures import QUESTION, TEXTS, tiny_engine, tiny_model, tiny_tokenizer

SHORT = Generation(max_new_tokens=6)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[tuple[torch.Tensor, Eviction]]:
    """What each eviction was given to read behind its prompt, and what it made of it."""
    found: list[tuple[torch.Tensor, Eviction]] = []

    def recorded(*args: Any) -> Eviction:
        done = evict(*args)
        found.append((args[2][0], done))
        return done

    monkeypatch.setattr(eviction, "evict", recorded)
    return found


def test_the_best_sentences_come_first_and_strangers_not_at_all() -> None:
    texts = [
        "The mill stands idle. The ferry to Onda sails at seven.",
        "Bread is sold at noon. Onda has a ferry.",
    ]
    prompt = Prompt.from_question("When does the ferry to Onda sail?", texts)
    assert related_sentences(prompt, 1) == "The ferry to Onda sails at seven."
    both = "The ferry to Onda sails at seven.\nOnda has a ferry.\nThe mill stands idle."
    assert related_sentences(prompt, 9) == both
    assert related_sentences(Prompt.from_question("Zebras?", texts), 3) == ""


def test_the_target_reads_them_behind_the_guess(
    read: list[tuple[torch.Tensor, Eviction]],
) -> None:
    engine = tiny_engine()
    assert engine.tokenizer is not None
    for more in (0, 1):
        method = SpecKV(ratio=0.5, lookahead_sentences=more)
        answer = engine.answer(QUESTION, TEXTS, method=method, generation=SHORT)
        assert answer.lookahead  # the guess alone
    plain, longer = (behind for behind, _ in read)
    sentence = related_sentences(Prompt.from_question(QUESTION, TEXTS), 1)
    ids = engine.tokenizer(sentence, add_special_tokens=False)["input_ids"]
    assert longer.tolist() == [*plain.tolist(), *ids]
    assert any(
        not torch.equal(a, b) for a, b in zip(read[0][1].scores, read[1][1].scores, strict=True)
    )


def test_a_guess_that_says_nothing_still_keeps_what_the_sentence_needs() -> None:
    """Without a draft, snapkv with sentences is an eviction by the question and these."""
    engine = Engine(tiny_model(64, seed=2), tiny_tokenizer())
    kept = [
        engine.answer(QUESTION, TEXTS, method=method, generation=SHORT)
        for method in (
            SpecKV(scorer="snapkv", ratio=0.3, lookahead_sentences=2),
            SpecKV(scorer="tova", ratio=0.3, lookahead_sentences=2),
            SpecKV(scorer="tova", ratio=0.3),
        )
    ]
    assert len({answer.usage.cache_entries for answer in kept}) == 1
    assert kept[1].text == kept[2].text  # tova asks the last token alone


def test_batches_and_both_stages_get_what_each_gets_alone() -> None:
    engine = tiny_engine()
    speckv = SpecKV(ratio=0.5, lookahead_sentences=1)
    prompts = [
        Prompt.from_question(QUESTION, TEXTS),
        Prompt.from_question("Where are tickets sold?", TEXTS[:2]),
        Prompt.from_messages([{"role": "user", "content": "Tell me a long story. " * 8}]),
    ]
    for method in (speckv, SpecKVPC(specpc=SpecPC(ratio=0.7), speckv=speckv)):
        alone = [engine.generate(p, method=method, generation=SHORT) for p in prompts]
        together = engine.generate_many(prompts, method=method, generation=SHORT)
        assert [a.text for a in together] == [a.text for a in alone]


def test_what_is_read_behind_ends_with_the_targets_window(
    read: list[tuple[torch.Tensor, Eviction]], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = tiny_engine()
    method = SpecKV(ratio=0.5, lookahead_sentences=3)
    size = engine.answer(QUESTION, TEXTS, method=method, generation=SHORT).usage.prompt_tokens
    monkeypatch.setattr(engine.target.config, "max_position_embeddings", size + 9)
    narrow = Engine(engine.target, engine.tokenizer, draft_model=tiny_model(32, seed=1))
    narrow.answer(QUESTION, [Passage(text=t) for t in TEXTS], method=method, generation=SHORT)
    assert len(read[0][0]) > 9
    assert len(read[1][0]) == 9


def test_the_preset_is_an_option_like_others() -> None:
    assert SpecKV.preset("2026-12", ratio=0.3) == SpecKV(ratio=0.3, lookahead_sentences=1)
    assert SpecKV().lookahead_sentences == 0  # the paper's settings
    with pytest.raises(
        ConfigError, match=r"no preset '2020-01' of SpecKV; there are: \['2026-12'\]"
    ):
        SpecKV.preset("2020-01")

"""A known answer read in one pass, against token by token."""

from __future__ import annotations

import pytest
import torch

from draftsieve import SpecKV
from draftsieve.core.errors import PromptError
from draftsieve.core.evaluation.likelihood import AnswerReading, divergence, read_answer
from draftsieve.core.kv_cache.layers import attending
from draftsieve.core.kv_cache.prefill import Start
from draftsieve.core.kv_cache.prefix import read_memory
from draftsieve.core.speckv.evict import evict
from draftsieve.core.specpc.sparse_positions import start_at

from . import families

FAMILIES = ["llama", "qwen3", "gemma3"]
PROMPT, ANSWER = families.ids(40, seed=1)[0], families.ids(6, seed=2)[0]


def evicted(family: str, options: SpecKV, capacity: int) -> Start:
    model = families.build(family, "sdpa")
    return evict(model, [PROMPT], [families.ids(4, seed=9)[0]], options, [capacity]).start


def one_by_one(family: str, start: Start) -> torch.Tensor:
    """(answer, vocabulary) what is expected before each token, fed alone."""
    model = families.build(family, "sdpa")
    feed, mask, positions = start.feed, start.mask, start.positions
    rows = []
    for token in ANSWER.tolist():
        with torch.no_grad(), attending(model, start.cache):
            logits = model(
                input_ids=feed,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=start.cache,
                use_cache=True,
            ).logits[0, -1]
        rows.append(logits.log_softmax(-1))
        feed = torch.tensor([[token]])
        mask = torch.cat([mask, torch.ones_like(feed)], dim=1)
        positions = positions[:, -1:] + 1
    return torch.stack(rows)


@pytest.mark.parametrize("family", FAMILIES)
def test_one_pass_expects_what_passes_without_a_cache_expect(family: str) -> None:
    model = families.build(family, "sdpa")
    read = read_answer(model, PROMPT, ANSWER)
    for place in range(len(ANSWER)):
        with torch.no_grad():
            logits = model(torch.cat([PROMPT, ANSWER[:place]]).unsqueeze(0)).logits[0, -1]
        torch.testing.assert_close(read.expected[place], logits.log_softmax(-1), rtol=0, atol=1e-4)
    naive = sum(float(read.expected[i, token]) for i, token in enumerate(ANSWER.tolist()))
    assert read.log_likelihood == pytest.approx(naive / len(ANSWER))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "options",
    [SpecKV(window_size=6), SpecKV(window_size=6, head_budgets="adaptive")],
    ids=["even", "adaptive"],
)
def test_evicted_caches_are_read_as_when_decoding(family: str, options: SpecKV) -> None:
    model = families.build(family, "sdpa")
    read = read_answer(model, evicted(family, options, 15), ANSWER)
    naive = one_by_one(family, evicted(family, options, 15))
    torch.testing.assert_close(read.expected, naive, rtol=0, atol=1e-4)
    whole = read_answer(model, evicted(family, options, 60), ANSWER)
    full = read_answer(model, PROMPT, ANSWER)
    torch.testing.assert_close(whole.expected, full.expected, rtol=0, atol=1e-4)
    assert divergence(full, read) > 1e-4 > divergence(full, whole)


def test_a_known_beginning_changes_nothing() -> None:
    model = families.build("llama", "sdpa")
    start = read_memory(model, PROMPT[:30]).start(model, PROMPT)
    known, full = read_answer(model, start, ANSWER), read_answer(model, PROMPT, ANSWER)
    torch.testing.assert_close(known.expected, full.expected, rtol=0, atol=1e-4)


def test_tokens_at_old_positions_are_followed_by_the_next_one() -> None:
    places = torch.tensor([0, 1, 2, 11, 12, 30])
    model = families.build("llama", "sdpa")
    read = read_answer(model, start_at(model, [PROMPT[places]], [places]), ANSWER)
    naive = one_by_one("llama", start_at(model, [PROMPT[places]], [places]))
    torch.testing.assert_close(read.expected, naive, rtol=0, atol=1e-4)


def test_a_single_token_is_an_answer_and_none_is_not() -> None:
    model = families.build("llama", "sdpa")
    full = read_answer(model, PROMPT, ANSWER)
    first = read_answer(model, PROMPT, ANSWER[:1])
    torch.testing.assert_close(first.expected, full.expected[:1], rtol=0, atol=1e-4)
    with pytest.raises(PromptError, match="no token"):
        read_answer(model, PROMPT, ANSWER[:0])


def test_the_divergence_is_that_of_the_textbook() -> None:
    def reading(seed: int) -> AnswerReading:
        scores = torch.randn(6, 50, generator=torch.Generator().manual_seed(seed))
        return AnswerReading(ANSWER, scores.log_softmax(-1))

    full, other = reading(1), reading(2)
    expected = torch.nn.functional.kl_div(
        other.expected, full.expected, reduction="batchmean", log_target=True
    )
    assert divergence(full, other) == pytest.approx(float(expected), rel=1e-5)
    assert divergence(full, other) != pytest.approx(divergence(other, full), rel=1e-2)
    assert divergence(full, full) == 0

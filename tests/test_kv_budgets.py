"""Uneven budgets of SpecKV: heads that share a layer's entries, layers that share a cache's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from transformers import PreTrainedModel

from draftsieve import Engine, Generation, Prompt, SpecKV
from draftsieve.core.errors import ModelError
from draftsieve.core.generation.decode import next_tokens
from draftsieve.core.kv_cache import ragged as uneven
from draftsieve.core.kv_cache.layers import UnevenLayer, attending, cache_bytes
from draftsieve.core.kv_cache.prefill import Start
from draftsieve.core.speckv.budgets import choose_entries, layer_budgets
from draftsieve.core.speckv.evict import Eviction, evict
from draftsieve.core.speckv.scorers import SCORERS

from . import families
from .adapters_fixtures import QUESTION, TEXTS, tiny_engine

WINDOW = 6
ADAPTIVE = SpecKV(window_size=WINDOW, head_budgets="adaptive")
PYRAMID = SpecKV(window_size=WINDOW, layer_budgets="pyramid")
BOTH = SpecKV(window_size=WINDOW, head_budgets="adaptive", layer_budgets="pyramid")
EVEN = SpecKV(window_size=WINDOW)
NOTHING = torch.tensor([], dtype=torch.int64)


def run(
    options: SpecKV, capacity: int, prompt: torch.Tensor, model: PreTrainedModel | None = None
) -> Eviction:
    model = model or families.build("llama", "sdpa")
    return evict(model, [prompt], [families.ids(4, seed=9)[0]], options, [capacity])


def answer(model: PreTrainedModel, prompt: torch.Tensor, start: Start | None, n: int) -> list[int]:
    return [t for (t,) in next_tokens(model, [prompt], Generation(max_new_tokens=n), start)]


def sizes(done: Eviction, row: int = 0) -> list[list[int]]:
    """Entries per evicted layer and KV head."""
    return [[len(head) for head in layer] for layer in done.entries(row) if len(layer[0])]


def masked_logits(
    model: PreTrainedModel, ids: torch.Tensor, size: int, kept: list[list[torch.Tensor]]
) -> torch.Tensor:
    """Full cache, plain attention: tokens from the prompt's last one on see kept keys only."""

    def masked(  # type: ignore[no-untyped-def]
        module, query, key, value, mask, scaling, sliding_window=None, softcap=None, s_aux=None, **_
    ):
        group, count = query.shape[1] // key.shape[1], key.shape[2]
        allowed = torch.ones(key.shape[1], count, count).tril().bool()
        if sliding_window is not None:
            allowed &= ~torch.ones(count, count).tril(-sliding_window).bool()
        else:
            for head, entries in enumerate(kept[module.layer_idx]):
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

    reference = families.with_attention(model, masked)
    with torch.no_grad():
        return reference(input_ids=ids.unsqueeze(0), use_cache=False).logits[0, size - 1 :]


CASES = [("llama", "sdpa", ADAPTIVE), ("llama", "sdpa", PYRAMID)]
CASES += [
    (name, "eager" if name in ("llama", "gemma2", "gpt_oss") else "sdpa", BOTH)
    for name in ("llama", "qwen2", "qwen3", "gemma2", "gemma3", "gemma3n", "gemma4", "gpt_oss")
]


@pytest.mark.parametrize(("name", "implementation", "options"), CASES)
def test_logits_equal_a_full_cache_with_a_mask_per_head(
    name: str, implementation: str, options: SpecKV
) -> None:
    """Also below the sliding window (24): such layers keep all of theirs."""
    model, prompt = families.build(name, implementation), families.ids(70)[0]
    done = run(options, 18, prompt, model)
    answered = families.ids(5, seed=3)[0]
    fed = torch.cat([prompt[-1:], answered])
    cache, found = done.start.cache, []
    with torch.no_grad(), attending(model, cache):
        for first, last in ((0, 1), (1, 2), (2, 6)):  # token by token, then several at once
            ids = fed[first:last].unsqueeze(0)
            mask = torch.cat([done.start.mask, torch.ones(1, last - 1, dtype=torch.int64)], dim=1)
            places = torch.arange(69 + first, 69 + last).unsqueeze(0)
            found.append(
                model(
                    input_ids=ids, attention_mask=mask, position_ids=places, past_key_values=cache
                ).logits[0]
            )
    whole = torch.cat([prompt, answered])
    expected = masked_logits(families.build(name, "eager"), whole, 70, done.entries(0))
    torch.testing.assert_close(torch.cat(found), expected, rtol=1e-4, atol=1e-4)
    counts = [  # of layers with keys of their own that are no window
        [len(head) for head in layer]
        for layer, scores in zip(done.entries(0), done.scores, strict=True)
        if scores.shape[-1]
    ]
    assert sum(map(sum, counts)) == 18 * sum(map(len, counts))  # the total of even budgets
    assert all(n >= WINDOW for layer in counts for n in layer)
    assert len({n for layer in counts for n in layer}) > 1  # or the test shows nothing


def test_sliding_layers_of_an_even_cache_keep_their_window_too() -> None:
    model, prompt = families.build("gemma3", "sdpa"), families.ids(70)[0]
    done = run(EVEN, 10, prompt, model)
    found = answer(model, prompt, done.start, 6)
    whole = torch.cat([prompt, torch.tensor(found)])
    expected = masked_logits(families.build("gemma3", "eager"), whole, 70, done.entries(0))
    assert found == expected.argmax(-1)[:6].tolist()


def test_the_best_entries_of_all_heads_stay_above_a_floor() -> None:
    done = run(ADAPTIVE, 26, families.ids(90)[0])
    candidates = 90 - WINDOW - 1
    for scores, heads in zip(done.scores, done.entries(0), strict=True):
        chosen = [set(head.tolist()) for head in heads]
        assert sum(map(len, chosen)) == 26 * 2
        kept, dropped = [], []
        for head, mine in enumerate(chosen):
            assert set(range(candidates, 89)) <= mine
            order = scores[0, head, :candidates].argsort(descending=True, stable=True).tolist()
            assert set(order[:4]) <= mine  # 0.2 of the 20 beyond the window
            kept += [float(scores[0, head, i]) for i in order[4:] if i in mine]
            dropped += [float(scores[0, head, i]) for i in order if i not in mine]
        assert min(kept) >= max(dropped)


def test_a_head_takes_the_bytes_of_its_entries_and_no_more() -> None:
    prompt = families.ids(200)[0]
    even = cache_bytes(run(EVEN, 40, prompt).start.cache)
    for options in (ADAPTIVE, PYRAMID, BOTH):
        done = run(options, 40, prompt)
        assert cache_bytes(done.start.cache) == even
        stored = [
            tensor
            for layer in done.start.cache.layers
            for group in layer.groups
            for tensor in (group.keys, group.values)
        ]
        assert sum(t.untyped_storage().nbytes() for t in stored) == even
        assert even == sum(map(sum, sizes(done))) * 16 * 4 * 2  # head_dim, float32, key and value


@pytest.mark.parametrize("scorer", sorted(SCORERS))
def test_settings_that_move_nothing_equal_even_budgets(scorer: str) -> None:
    prompt = families.ids(80)[0]
    even = run(SpecKV.model_validate({"scorer": scorer, "window_size": 4}), 30, prompt)
    for changes in (
        {"head_budgets": "adaptive", "head_floor": 1.0},
        {"layer_budgets": "pyramid", "pyramid_slope": 0.0},
    ):
        options = SpecKV.model_validate({"scorer": scorer, "window_size": 4, **changes})
        done = run(options, 30, prompt)
        for found, expected in zip(done.kept, even.kept, strict=True):
            assert torch.equal(found, expected)


@pytest.mark.parametrize("scorer", sorted(SCORERS))
def test_every_scorer_shares_a_layers_entries(scorer: str) -> None:
    prompt = families.ids(80)[0]
    options = SpecKV.model_validate({**BOTH.model_dump(), "scorer": scorer})
    done = run(options, 30, prompt)
    counts = sizes(done)
    assert sum(map(sum, counts)) == 30 * 8
    if scorer in ("streaming", "tova"):  # equal scores in all heads: shared out evenly
        assert all(max(layer) - min(layer) <= 1 for layer in counts)
    assert len(answer(families.build("llama", "sdpa"), prompt, done.start, 3)) == 3


@pytest.mark.parametrize("options", [ADAPTIVE, PYRAMID, BOTH])
def test_a_capacity_that_holds_everything_changes_nothing(options: SpecKV) -> None:
    model, prompt = families.build("llama", "sdpa"), families.ids(60)[0]
    plain = answer(model, prompt, None, 10)
    for capacity in (59, 60, 5000):
        done = run(options, capacity, prompt)
        assert answer(model, prompt, done.start, 10) == plain
        assert sizes(done) == [[59, 59]] * 4


@pytest.mark.parametrize("exact", [uneven.EXACT, 0])
def test_a_left_padded_batch_gives_each_row_what_it_gets_alone(
    exact: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where lengths are so many that nearly equal ones are stored together."""
    model = families.build("llama", "sdpa")
    prompts = [families.ids(n, seed=n)[0] for n in (24, 90, 55)]
    guesses = [families.ids(3)[0], NOTHING, families.ids(5, seed=1)[0]]
    capacities = [30, 30, 20]  # the first row keeps everything
    monkeypatch.setattr(uneven, "EXACT", exact)
    monkeypatch.setattr(uneven, "SLACK", 3)  # these heads are short: a third, not a 16th
    both = evict(model, prompts, guesses, BOTH, capacities)
    rows = list(next_tokens(model, prompts, Generation(max_new_tokens=10), both.start))
    total = 0
    for row, prompt in enumerate(prompts):
        alone = evict(model, [prompt], [guesses[row]], BOTH, [capacities[row]])
        assert [r[row] for r in rows] == answer(model, prompt, alone.start, 10)
        expected = [[head.tolist() for head in layer] for layer in alone.entries(0)]
        assert [[head.tolist() for head in layer] for layer in both.entries(row)] == expected
        total += 8 * min(capacities[row], len(prompt) - 1)
    kept = [g.keys.shape[:2] for la in both.start.cache.layers for g in la.groups]
    stored = sum(heads * entries for heads, entries in kept)
    assert stored == total if exact else total < stored <= total * 3 / 2  # nor are rows padded


def test_protected_entries_stay_in_every_head_and_layer() -> None:
    model, prompt = families.build("llama", "sdpa"), families.ids(80)[0]
    protected = torch.zeros(80, dtype=torch.bool)
    protected[:10] = protected[60:] = True
    options = SpecKV.model_validate({**BOTH.model_dump(), "head_floor": 0.0, "pyramid_slope": 1.0})
    done = evict(model, [prompt], [prompt[:3]], options, [40], [protected])
    for layer in done.entries(0):
        for head in layer:
            assert set(range(10)) | set(range(60, 79)) <= set(head.tolist())
    assert [sum(layer) for layer in sizes(done)] == [2 * n for n in (51, 44, 36, 29)]


def test_the_engine_answers_streams_batches_and_traces() -> None:
    engine = tiny_engine()
    method = SpecKV(ratio=0.5, head_budgets="adaptive", layer_budgets="pyramid")
    short = Generation(max_new_tokens=8)
    prompts = [
        Prompt.from_question(QUESTION, TEXTS),
        Prompt.from_question("Where are tickets sold?", TEXTS[:2]),
    ]
    alone = [engine.generate(p, method=method, generation=short) for p in prompts]
    together = engine.generate_many(prompts, method=method, generation=short)
    assert [a.text for a in together] == [a.text for a in alone]
    assert alone[0].usage.cache_entries is not None
    pieces = list(engine.stream(QUESTION, TEXTS, method=method, generation=short))
    assert "".join(p.text for p in pieces) == alone[0].text
    session = engine.session(TEXTS)
    assert session.answer(QUESTION, method=method, generation=short).text == alone[0].text

    model, ids = families.build("llama", "sdpa"), families.ids(80)
    options = {**BOTH.model_dump(), "scorer": "snapkv", "capacity": 30}
    found = Engine(model, None).trace(ids, SpecKV.model_validate(options), 5)
    lengths = [[len(head) for head in layer] for layer in found.kept_kv_indices]
    assert sum(map(sum, lengths)) == 30 * 8
    assert len({n for layer in lengths for n in layer}) > 1
    for layer in found.kept_kv_indices:
        for head in layer:
            assert head.tolist() == sorted(set(head.tolist()))
            assert set(range(73, 79)) <= set(head.tolist())


@pytest.mark.parametrize("exact", [uneven.EXACT, 0])
def test_rows_can_be_repeated_reordered_selected_and_cropped(
    exact: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = families.build("llama", "sdpa")
    prompts = [families.ids(60, seed=n)[0] for n in (1, 2)]
    alone = [answer(model, p, evict(model, [p], [NOTHING], BOTH, [20]).start, 6) for p in prompts]

    monkeypatch.setattr(uneven, "EXACT", exact)
    monkeypatch.setattr(uneven, "SLACK", 3)

    def start() -> Start:
        return evict(model, prompts, [NOTHING] * 2, BOTH, [20, 20]).start

    def rows(start: Start, order: list[int]) -> list[list[int]]:
        chosen = [prompts[i] for i in order]
        feed, mask, places = (x[order] for x in (start.feed, start.mask, start.positions))
        begin = Start(start.cache, feed, mask, places)
        steps = list(next_tokens(model, chosen, Generation(max_new_tokens=6), begin))
        return [list(row) for row in zip(*steps, strict=True)]

    repeated, reordered, selected = start(), start(), start()
    repeated.cache.batch_repeat_interleave(2)
    assert rows(repeated, [0, 0, 1, 1]) == [alone[i] for i in (0, 0, 1, 1)]
    reordered.cache.reorder_cache(torch.tensor([1, 1]))
    assert rows(reordered, [1, 1]) == [alone[1]] * 2
    selected.cache.batch_select_indices(torch.tensor([1]))
    rows_taken = cache_bytes(start().cache) / cache_bytes(selected.cache)
    assert rows_taken == 2 if exact else rows_taken > 1.5
    assert rows(selected, [1]) == [alone[1]]

    layer = selected.cache.layers[0]
    assert layer.get_seq_length() == 59 + 6
    selected.cache.crop(-6)
    assert layer.get_seq_length() == 59
    assert rows(selected, [1]) == [alone[1]]
    with pytest.raises(ModelError, match="6 came after the eviction"):
        selected.cache.crop(-7)
    selected.cache.reset()
    assert (layer.get_seq_length(), layer.groups) == (0, ())


def test_only_passes_inside_attending_are_allowed() -> None:
    model, prompt = families.build("llama", "sdpa"), families.ids(60)[0]
    expected = answer(model, prompt, run(BOTH, 20, prompt).start, 6)
    given: dict[str, Any] = {
        "attention_mask": torch.ones(1, 60, dtype=torch.int64),
        "max_new_tokens": 6,
        "do_sample": False,
    }
    cache = run(BOTH, 20, prompt).start.cache
    with pytest.raises(ModelError, match="forward pass inside"):
        model.generate(prompt.unsqueeze(0), past_key_values=cache, **given)
    cache = run(BOTH, 20, prompt).start.cache
    with attending(model, cache):
        found = model.generate(prompt.unsqueeze(0), past_key_values=cache, **given)
    assert found[0, 60:].tolist() == expected
    assert model.config._attn_implementation == "sdpa"
    assert not any(layer.attended for layer in cache.layers if isinstance(layer, UnevenLayer))


def test_layers_divide_the_budget_to_the_entry() -> None:
    assert layer_budgets(100, 20, 500, 5, 0.5) == [140, 120, 100, 80, 60]
    assert layer_budgets(100, 20, 500, 1, 0.5) == [100]
    assert layer_budgets(100, 20, 90, 3, 1.0) == [110, 110, 80]  # full layers hand on the rest
    for capacity in (20, 21, 33, 64, 119, 120, 500):
        for layers in (1, 2, 3, 7, 32):
            for slope in (0.0, 0.3, 0.95, 1.0):
                found = layer_budgets(capacity, 20, 100, layers, slope)
                assert sum(found) == min(capacity, 120) * layers
                assert found == sorted(found, reverse=True)
                assert 20 <= min(found) <= max(found) <= 120


def test_a_head_can_win_everything_beyond_the_floor() -> None:
    scores = torch.tensor([[[9.0, 8.0, 7.0, 6.0, -torch.inf], [4.0, 3.0, 2.0, 1.0, -torch.inf]]])
    fixed = torch.tensor([[False, False, False, False, True]])
    budgets = torch.tensor([3])
    for floor, sure in ((0.0, 0), (0.5, 1), (1.0, 2)):
        kept, counts = choose_entries(scores, fixed, budgets, floor)
        assert counts.tolist() == [[5 - sure, 1 + sure]]
        assert kept[0, 0, -5 + sure :].tolist() == [*range(4 - sure), 4]
        assert kept[0, 1, -1 - sure :].tolist() == [*range(sure), 4]
    nothing = torch.zeros(1, 2, 6), torch.zeros(1, 6, dtype=torch.bool)
    assert choose_entries(*nothing, budgets, 0.0)[1].tolist() == [[3, 3]]  # a tie of all


def test_options_are_checked() -> None:
    for bad in (
        {"head_budgets": "uneven"},
        {"head_floor": 1.5},
        {"layer_budgets": "cone"},
        {"pyramid_slope": -0.1},
    ):
        with pytest.raises(ValidationError):
            SpecKV.model_validate(bad)
    assert not SpecKV().uneven

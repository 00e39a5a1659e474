"""SpecKV against every number recorded from the authors' code (tests/parity)."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from transformers import DynamicCache

from draftsieve import Engine, Generation, SpecKV, SpecKVPC, SpecPC
from draftsieve.core.generation.decode import next_tokens
from draftsieve.core.kv_cache.layers import cache_bytes, evicting_cache
from draftsieve.core.kv_cache.prefill import Start
from draftsieve.core.speckv.evict import evict

from . import recorded

RECORD = json.loads((recorded.PARITY / "speckv_llama.json").read_text())
MARGINS = json.loads((recorded.PARITY / "margins.json").read_text())
ARRAYS = np.load(recorded.PARITY / "speckv_llama.npz")
CASCADE = json.loads((recorded.PARITY / "speckvpc_llama.json").read_text())
CASCADE_ARRAYS = np.load(recorded.PARITY / "speckvpc_llama.npz")
CASES = range(len(RECORD["cases"]))
COMPRESSED = [n for n in CASES if RECORD["cases"][n]["compressed"]]
# What is kept follows from the scores only where no pooled scores are equal.
TIED = [n for n in COMPRESSED if not MARGINS[f"speckv_llama/{n}"][1]]
CASCADES = range(len(CASCADE["cases"]))
CASCADES_COMPRESSED = [n for n in CASCADES if CASCADE["cases"][n]["compressed"]]
CASCADES_TIED = [n for n in CASCADES if not MARGINS[f"speckvpc_llama/{n}"][1]]


def test_how_many_cases_are_compared_how() -> None:
    """What the README says: end to end without ties, and from the recorded entries with them."""
    assert (len(CASES), len(COMPRESSED), len(TIED)) == (90, 80, 40)
    assert (len(CASCADES), len(CASCADES_COMPRESSED), len(CASCADES_TIED)) == (18, 15, 12)


def options(setting: int, capacity: int) -> SpecKV:
    theirs = RECORD["settings"][setting]
    return SpecKV(
        capacity=capacity,
        window_size=theirs["window_size"],
        kernel_size=theirs["kernel_size"],
        pool=theirs["pool_type"],
        reduction=theirs["reduction_type"],
        lookahead_tokens=theirs["lookahead_tokens"],
    )


def cascade_options(case: dict[str, Any]) -> SpecKVPC:
    pc, kv = case["specpc"], case["speckv"]
    return SpecKVPC(
        specpc=SpecPC(
            capacity=pc["max_capacity_prompt"],
            window_size=pc["window_size"],
            kernel_size=pc["kernel_size"],
            pool="mean" if pc["pool_type"] == "avg" else pc["pool_type"],
            reduction=pc["reduction_type"],
            neighbor_tokens=pc["neighbor_tokens"],
            starting_layer=pc["starting_layer_index"],
            lookahead_tokens=pc["lookahead_tokens"],
            weighted_query=pc["weighted_query"],
        ),
        speckv=SpecKV(
            capacity=kv["max_capacity_prompt"],
            window_size=kv["window_size"],
            kernel_size=kv["kernel_size"],
            pool=kv["pool_type"],
            reduction=kv["reduction_type"],
        ),
    )


def is_a_top_set(scores: np.ndarray, kept: np.ndarray) -> bool:
    """True if no dropped score beats a kept one beyond rounding."""
    dropped = np.setdiff1d(np.arange(len(scores)), kept)
    if not len(kept) or not len(dropped):
        return True
    return bool(scores[kept].min() >= scores[dropped].max() * (1 - 1e-5))


def decoded(prompt: torch.Tensor, kept: np.ndarray, window: int) -> list[int]:
    """The answer from a cache of the entries that the record kept, and the window.

    Args:
        prompt: (tokens,) int64.
        kept: (layers, kv_heads, entries), without the window.
        window: Entries before the last token, which always stay.
    """
    model, seen = recorded.model("llama-target"), len(prompt) - 1
    full = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=prompt[None, :-1], past_key_values=full)
    cache = evicting_cache(model)
    newest = np.broadcast_to(np.arange(seen - window, seen), (*kept.shape[:2], window))
    columns = torch.from_numpy(np.concatenate([np.sort(kept), newest], axis=2)).long()
    for layer, read, chosen in zip(cache.layers, full.layers, columns, strict=True):
        counts = torch.full((1, len(chosen)), chosen.shape[1])
        layer.keep(read.keys, read.values, chosen[None], seen, counts)
    mask = torch.arange(len(prompt))[None] >= seen - columns.shape[2]
    start = Start(cache, prompt[None, -1:], mask.long(), torch.tensor([[seen]]))
    steps = next_tokens(model, [prompt], Generation(max_new_tokens=16), start)
    return [token for (token,) in steps]


def kept_arrays(number: int) -> np.ndarray:
    case = RECORD["cases"][number]
    kept = ARRAYS[f"kept_p{case['prompt']}_s{case['setting']}_c{case['capacity']}"]
    return np.sort(kept)


@pytest.mark.parametrize("number", COMPRESSED)
def test_scores_and_kept_entries_equal_the_record(number: int) -> None:
    case = RECORD["cases"][number]
    method = options(case["setting"], case["capacity"])
    prompt = recorded.prompt(case["prompt"])[0]
    lookahead = torch.tensor(case["lookahead_ids"])
    model = recorded.model("llama-target")
    done = evict(model, [prompt], [lookahead], method, [case["capacity"]])
    candidates = len(prompt) - method.window_size - 1
    scores = torch.stack([layer[0, :, :candidates] for layer in done.scores])
    expected = ARRAYS[f"score_p{case['prompt']}_s{case['setting']}"]
    torch.testing.assert_close(scores, torch.from_numpy(expected), rtol=1e-4, atol=1e-8)
    theirs = kept_arrays(number)
    for layer, heads in enumerate(expected):
        for head, head_scores in enumerate(heads):
            kept = done.kept[layer][0, head].numpy()
            assert len(set(kept)) == case["capacity"]
            assert list(kept) == sorted(kept)
            assert set(range(candidates, len(prompt) - 1)) <= set(kept)
            assert is_a_top_set(head_scores, kept[kept < candidates])
            assert is_a_top_set(head_scores, theirs[layer, head])  # the rule holds for the record
            if number not in TIED:
                assert kept[kept < candidates].tolist() == theirs[layer, head].tolist()


@pytest.mark.parametrize("number", CASES)
def test_traces_equal_the_record(number: int) -> None:
    """Draft and target together, short prompts too; the answer where nothing ties."""
    case = RECORD["cases"][number]
    engine = Engine(recorded.model("llama-target"), None, draft_model=recorded.model("llama-draft"))
    found = engine.trace(
        recorded.prompt(case["prompt"]), options(case["setting"], case["capacity"]), 16
    )
    assert found.lookahead_ids is not None
    assert found.lookahead_ids.tolist() == case["lookahead_ids"]
    assert bool(found.kept_kv_indices) == case["compressed"]
    if number not in TIED:
        assert found.output_ids.tolist() == case["output_ids"]


@pytest.mark.parametrize("number", COMPRESSED)
def test_recorded_entries_give_the_recorded_answer(number: int) -> None:
    """With ties too: from the entries that the record kept, token for token."""
    case = RECORD["cases"][number]
    window = RECORD["settings"][case["setting"]]["window_size"]
    found = decoded(recorded.prompt(case["prompt"])[0], kept_arrays(number), window)
    assert found == case["output_ids"]


@pytest.mark.parametrize("number", CASCADES)
def test_cascade_equals_the_record(number: int) -> None:
    """SpecPC, then SpecKV: what the draft makes of the prompt; the answer where nothing ties."""
    case = CASCADE["cases"][number]
    target, draft = recorded.model("llama-target"), recorded.model("llama-draft")
    ids = recorded.prompt(case["prompt"])
    found = Engine(target, None, draft_model=draft).trace(ids, cascade_options(case), 16)
    assert found.lookahead_ids is not None
    assert found.draft_scores is not None
    assert found.lookahead_ids.tolist() == case["lookahead_ids"]
    expected = torch.from_numpy(CASCADE_ARRAYS[f"attn_p{case['prompt']}_s{case['setting']}"])
    torch.testing.assert_close(found.draft_scores, expected, rtol=1e-4, atol=1e-9)
    assert bool(found.kept_kv_indices) == case["compressed"]
    if number not in CASCADES_TIED:
        assert found.output_ids.tolist() == case["output_ids"]


@pytest.mark.parametrize("number", CASCADES_COMPRESSED)
def test_second_stage_of_the_cascade_equals_the_record(number: int) -> None:
    """From the recorded short prompt: scores and kept entries; the answer from recorded entries."""
    case = CASCADE["cases"][number]
    method = cascade_options(case).speckv
    assert method.capacity is not None
    place = f"p{case['prompt']}_s{case['setting']}"
    short = recorded.prompt(case["prompt"])[0, torch.tensor(case["pc_indices"])]
    lookahead = torch.tensor(case["lookahead_ids"])
    model = recorded.model("llama-target")
    done = evict(model, [short], [lookahead], method, [method.capacity])
    scores = torch.from_numpy(CASCADE_ARRAYS[f"score_{place}"])
    candidates = scores.shape[-1]
    assert candidates == len(short) - method.window_size - 1
    for layer, heads in enumerate(scores):
        found = done.scores[layer][0, :, :candidates]
        torch.testing.assert_close(found, heads, rtol=1e-4, atol=1e-8)
        for head, head_scores in enumerate(heads.numpy()):
            kept = done.kept[layer][0, head].numpy()
            assert is_a_top_set(head_scores, kept[kept < candidates])
    kept = CASCADE_ARRAYS[f"kept_{place}"]
    assert decoded(short, kept, method.window_size) == case["output_ids"]


@pytest.mark.parametrize("number", sorted(set(CASCADES) - set(CASCADES_COMPRESSED)))
def test_short_prompts_of_the_cascade_are_answered_like_the_record(number: int) -> None:
    """A second stage that holds the whole short prompt changes nothing."""
    case = CASCADE["cases"][number]
    short = recorded.prompt(case["prompt"])[:, torch.tensor(case["pc_indices"])]
    answer = Engine(recorded.model("llama-target"), None).trace(short, None, 16)
    assert answer.output_ids.tolist() == case["output_ids"]


@pytest.mark.parametrize("length", [200, 512])
def test_a_cache_that_keeps_everything_equals_the_full_cache(length: int) -> None:
    model, prompt = recorded.model("llama-target"), recorded.prompt(length)[0]
    plain = Engine(model, None).trace(prompt.unsqueeze(0), None, 16).output_ids.tolist()
    for capacity in (length - 1, length, 5000):
        done = evict(model, [prompt], [torch.tensor([5, 6])], SpecKV(), [capacity])
        steps = next_tokens(model, [prompt], Generation(max_new_tokens=16), done.start)
        assert [token for (token,) in steps] == plain


def test_bytes_are_really_freed() -> None:
    model, prompt = recorded.model("llama-target"), recorded.prompt(512)[0]
    sizes = {}
    for capacity in (64, 128, 511):
        done = evict(model, [prompt], [torch.tensor([5, 6, 7])], SpecKV(), [capacity])
        sizes[capacity] = cache_bytes(done.start.cache)
    assert sizes[64] * 2 == sizes[128]
    assert sizes[511] / sizes[64] == 511 / 64


def test_a_left_padded_batch_gives_each_row_what_it_gets_alone() -> None:
    model = recorded.model("llama-target")
    prompts = [recorded.prompt(512)[0][:n] for n in (40, 512, 130)]
    guesses = [torch.tensor([5, 6, 7]), torch.tensor([9]), torch.tensor([], dtype=torch.int64)]
    method, capacity = SpecKV(window_size=16), 64
    together = evict(model, prompts, guesses, method, [capacity] * 3)
    rows = list(next_tokens(model, prompts, Generation(max_new_tokens=12), together.start))
    for row, (prompt, guess) in enumerate(zip(prompts, guesses, strict=True)):
        alone = evict(model, [prompt], [guess], method, [capacity])
        steps = next_tokens(model, [prompt], Generation(max_new_tokens=12), alone.start)
        assert [step[row] for step in rows] == [token for (token,) in steps]
        slots = int(together.slots[row].sum())
        for layer in range(4):
            found = together.kept[layer][row, :, -slots:] - together.pads[row]
            assert found.tolist() == alone.kept[layer][0].tolist()


@pytest.mark.parametrize("capacity", [1, 10, 16])
def test_capacities_up_to_the_window_keep_the_newest_entries(capacity: int) -> None:
    model, prompt = recorded.model("llama-target"), recorded.prompt(200)[0]
    done = evict(model, [prompt], [torch.tensor([3])], SpecKV(window_size=16), [capacity])
    for layer in done.kept:
        for head in layer[0]:
            assert head.tolist() == list(range(199 - capacity, 199))

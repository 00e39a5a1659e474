"""SpecKV against every number recorded from the authors' code (tests/parity)."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from draftsieve import Engine, Generation, SpecKV, SpecKVPC, SpecPC
from draftsieve.core.generation.decode import next_tokens
from draftsieve.core.kv_cache.layers import cache_bytes
from draftsieve.core.speckv.evict import evict

from . import recorded

RECORD = json.loads((recorded.PARITY / "speckv_llama.json").read_text())
MARGINS = json.loads((recorded.PARITY / "margins.json").read_text())
ARRAYS = np.load(recorded.PARITY / "speckv_llama.npz")
CASCADE = json.loads((recorded.PARITY / "speckvpc_llama.json").read_text())
CASCADE_ARRAYS = np.load(recorded.PARITY / "speckvpc_llama.npz")
CASES = [i for i, case in enumerate(RECORD["cases"]) if case["compressed"]]


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


def is_a_top_set(scores: np.ndarray, kept: np.ndarray) -> bool:
    """True if no dropped score beats a kept one beyond rounding."""
    dropped = np.setdiff1d(np.arange(len(scores)), kept)
    if not len(kept) or not len(dropped):
        return True
    return bool(scores[kept].min() >= scores[dropped].max() * (1 - 1e-5))


@pytest.mark.parametrize("number", CASES)
def test_scores_kept_entries_and_answers_equal_the_record(number: int) -> None:
    case = RECORD["cases"][number]
    method = options(case["setting"], case["capacity"])
    model = recorded.model("llama-target")
    prompt = recorded.prompt(case["prompt"])[0]
    lookahead = torch.tensor(case["lookahead_ids"])
    done = evict(model, [prompt], [lookahead], method, [case["capacity"]])
    rivals = len(prompt) - method.window_size - 1
    scores = torch.stack([layer[0, :, :rivals] for layer in done.scores])
    expected = ARRAYS[f"score_p{case['prompt']}_s{case['setting']}"]
    torch.testing.assert_close(scores, torch.from_numpy(expected), rtol=1e-4, atol=1e-8)
    for layer, heads in enumerate(expected):
        for head, head_scores in enumerate(heads):
            kept = done.kept[layer][0, head].numpy()
            assert len(set(kept)) == case["capacity"]
            assert list(kept) == sorted(kept)
            assert set(range(rivals, len(prompt) - 1)) <= set(kept)
            assert is_a_top_set(head_scores, kept[kept < rivals])
    steps = next_tokens(model, [prompt], Generation(max_new_tokens=16), done.start)
    found = [token for (token,) in steps]
    gap, tie_free = MARGINS[f"speckv_llama/{number}"]
    assert found == case["output_ids"] or not (tie_free and gap > 1e-3)


@pytest.mark.parametrize("number", range(len(RECORD["cases"])))
def test_traces_equal_the_record(number: int) -> None:
    """Draft and target together, prompts that fit the capacity too."""
    case = RECORD["cases"][number]
    engine = Engine(recorded.model("llama-target"), None, draft_model=recorded.model("llama-draft"))
    found = engine.trace(
        recorded.prompt(case["prompt"]), options(case["setting"], case["capacity"]), 16
    )
    assert found.lookahead_ids is not None
    assert found.lookahead_ids.tolist() == case["lookahead_ids"]
    assert bool(found.kept_kv_indices) == case["compressed"]
    gap, tie_free = MARGINS[f"speckv_llama/{number}"]
    assert found.output_ids.tolist() == case["output_ids"] or not (tie_free and gap > 1e-3)


@pytest.mark.parametrize("number", range(len(CASCADE["cases"])))
def test_cascade_equals_the_record(number: int) -> None:
    """SpecKV-PC: the compressed prompt, the scores on it, the kept entries and the answer."""
    case = CASCADE["cases"][number]
    pc, kv = case["specpc"], case["speckv"]
    method = SpecKVPC(
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
    target, draft = recorded.model("llama-target"), recorded.model("llama-draft")
    ids = recorded.prompt(case["prompt"])
    found = Engine(target, None, draft_model=draft).trace(ids, method, 16)
    assert found.lookahead_ids is not None
    assert found.draft_scores is not None
    assert found.lookahead_ids.tolist() == case["lookahead_ids"]
    place = f"p{case['prompt']}_s{case['setting']}"
    expected = torch.from_numpy(CASCADE_ARRAYS[f"attn_{place}"])
    torch.testing.assert_close(found.draft_scores, expected, rtol=1e-4, atol=1e-9)
    gap, tie_free = MARGINS[f"speckvpc_llama/{number}"]
    if tie_free and gap > 1e-3:
        assert found.output_ids.tolist() == case["output_ids"]
    assert bool(found.kept_kv_indices) == case["compressed"]
    if not case["compressed"]:
        return
    # Ties are free in the first stage, so the second one starts from the recorded prompt.
    short = ids[0, torch.tensor(case["pc_indices"])]
    done = evict(target, [short], [found.lookahead_ids], method.speckv, [method.speckv.capacity])
    scores = torch.from_numpy(CASCADE_ARRAYS[f"score_{place}"])
    rivals = scores.shape[-1]
    assert rivals == len(short) - method.speckv.window_size - 1
    for layer, heads in enumerate(scores):
        torch.testing.assert_close(done.scores[layer][0, :, :rivals], heads, rtol=1e-4, atol=1e-8)
        for head, head_scores in enumerate(heads.numpy()):
            kept = done.kept[layer][0, head].numpy()
            assert is_a_top_set(head_scores, kept[kept < rivals])
    steps = next_tokens(target, [short], Generation(max_new_tokens=16), done.start)
    assert [t for (t,) in steps] == case["output_ids"] or not (tie_free and gap > 1e-3)


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

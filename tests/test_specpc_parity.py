"""SpecPC against every number recorded from the authors' code (tests/parity)."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from draftsieve import Engine, SpecPC
from draftsieve.core.specpc.draft_scores import read_draft
from draftsieve.core.specpc.ranking import pool
from draftsieve.core.specpc.selection import select
from draftsieve.core.types import DraftReading

from . import recorded

LENGTHS = (200, 512, 1500)
# selections without ties, of 1,536 each
UNTIED = {200: 864, 512: 609, 1500: 536}
RECORD = json.loads((recorded.PARITY / "specpc_llama.json").read_text())
MARGINS = json.loads((recorded.PARITY / "margins.json").read_text())
ARRAYS = np.load(recorded.PARITY / "specpc_llama.npz")


def options(aggregate: dict[str, Any], selection: dict[str, Any]) -> SpecPC:
    """Our names for the authors' settings."""
    pool_type = selection["pool_type"]
    return SpecPC(
        capacity=selection["max_capacity_prompt"],
        window_size=aggregate["window_size"],
        kernel_size=selection["kernel_size"],
        pool="mean" if pool_type in ("avg", "mean") else pool_type,
        reduction=aggregate["reduction_type"],
        neighbor_tokens=selection["neighbor_tokens"],
        starting_layer=aggregate["starting_layer_index"],
        lookahead_tokens=aggregate["lookahead_tokens"],
        weighted_query=aggregate["weighted_query"],
    )


@cache
def reading(length: int, setting: int) -> DraftReading:
    aggregate = RECORD["aggregate_settings"][setting]
    chosen = options(aggregate, RECORD["selection_settings"][0])
    # The capacity must not cut the window here: scores are recorded before selection.
    chosen = chosen.model_copy(update={"capacity": 10_000})
    return read_draft(
        recorded.model("llama-draft"),
        recorded.prompt(length),
        chosen,
        lookahead_tokens=aggregate["lookahead_tokens"],
    )[0]


def recorded_scores(length: int, setting: int) -> torch.Tensor:
    return torch.from_numpy(ARRAYS[f"attn_p{length}"][setting])


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("setting", range(len(RECORD["aggregate_settings"])))
def test_scores_and_lookahead_equal_the_record(length: int, setting: int) -> None:
    found = reading(length, setting)
    torch.testing.assert_close(found.scores, recorded_scores(length, setting), rtol=1e-4, atol=1e-9)
    ids = RECORD["lookahead"][str(length)]
    assert found.lookahead_ids.tolist() == ids[: len(found.lookahead_ids)]
    assert len(found.lookahead_ids) == RECORD["aggregate_settings"][setting]["lookahead_tokens"]


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("kernel", [7, 32])
@pytest.mark.parametrize(("name", "how"), [("max", "max"), ("avg", "mean")])
def test_pooling_equals_the_record(length: int, kernel: int, name: str, how: Any) -> None:
    scores = recorded_scores(length, 0)
    expected = torch.from_numpy(ARRAYS[f"pooled0_{name}{kernel}_p{length}"])
    torch.testing.assert_close(pool(scores, kernel, how), expected, rtol=1e-6, atol=1e-9)


def recorded_selection(length: int, setting: int, number: int) -> set[int]:
    bits = np.unpackbits(ARRAYS[f"sel_p{length}"][setting, number])[:length]
    return set(np.nonzero(bits)[0].tolist())


@pytest.mark.parametrize("length", LENGTHS)
def test_selections_equal_the_record_up_to_ties(length: int) -> None:
    """Index for index where no scores are equal; else every order inside a tie is right."""
    compared = 0
    for setting, aggregate in enumerate(RECORD["aggregate_settings"]):
        scores, theirs = reading(length, setting).scores, recorded_scores(length, setting)
        for number, chosen in enumerate(RECORD["selection_settings"]):
            method = options(aggregate, chosen)
            capacity = chosen["max_capacity_prompt"]
            pooled = pool(theirs, method.kernel_size, method.pool).numpy()
            must, may = recorded.selection_bounds(
                pooled, method.window_size, capacity, method.neighbors
            )
            kept = select(scores, method).indices.tolist()
            expected = recorded_selection(length, setting, number)
            assert must <= expected <= may, (setting, number)  # the bounds hold for the record
            assert must <= set(kept) <= may, (setting, number)
            assert kept == sorted(kept)
            assert len(kept) == len(expected) == min(length, capacity)
            compared += must == may
    assert compared == UNTIED[length]


def test_how_many_selections_there_are() -> None:
    """What the README says of the test above."""
    sets = len(LENGTHS) * len(RECORD["aggregate_settings"])
    assert (sets, sets * len(RECORD["selection_settings"])) == (96, 4608)
    assert sum(UNTIED.values()) == 2009


# The entries that the record keeps follow from its scores only where no scores are equal.
TIE_FREE = [n for n in range(len(RECORD["end_to_end"])) if MARGINS[f"specpc_llama/{n}"][1]]


def test_how_many_answers_are_compared_from_end_to_end() -> None:
    assert (len(TIE_FREE), len(RECORD["end_to_end"])) == (17, 36)


@pytest.mark.parametrize("number", TIE_FREE)
def test_answers_equal_the_record(number: int) -> None:
    """Kept tokens and answer, token for token."""
    case = RECORD["end_to_end"][number]
    engine = Engine(recorded.model("llama-target"), None, draft_model=recorded.model("llama-draft"))
    method = options(case["config"], case["config"])
    trace = engine.trace(recorded.prompt(case["prompt"]), method, max_new_tokens=16)
    assert trace.kept_prompt_indices is not None
    assert trace.kept_prompt_indices.tolist() == case["indices"]
    assert trace.output_ids.tolist() == case["output_ids"]


@pytest.mark.parametrize("number", range(len(RECORD["end_to_end"])))
def test_recorded_tokens_give_the_recorded_answer(number: int) -> None:
    """With ties too: what the record kept, answered token for token."""
    case = RECORD["end_to_end"][number]
    short = recorded.prompt(case["prompt"])[:, torch.tensor(case["indices"])]
    answer = Engine(recorded.model("llama-target"), None).trace(short, None, 16)
    assert answer.output_ids.tolist() == case["output_ids"]

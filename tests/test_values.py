"""Frozen values that hold tensors can be compared, and say clearly that they are no keys."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

import draftsieve.core
from draftsieve.core.compressor import Compressor
from draftsieve.core.prompt.encoder import PromptTokens
from draftsieve.core.prompt.messages import Prompt
from draftsieve.core.specpc.ranking import RankedUnits
from draftsieve.core.types import DraftReading, Selection, TensorValue, Trace

PROMPT = Prompt.from_question("Where is the kiln?", ["The kiln stands in barn 4."])


def changed(value: Any) -> Iterator[Any]:
    """Copies of a value that each differ in one element of one tensor or array."""
    for field in dataclasses.fields(value):
        column = getattr(value, field.name)
        if isinstance(column, torch.Tensor | np.ndarray):
            other = column + 0
            other.reshape(-1)[-1] += 1
            yield dataclasses.replace(value, **{field.name: other})


def test_prompt_tokens_are_equal_where_every_column_is() -> None:
    encode = Compressor.load("builtin:draft", progress=False).encoder.encode
    tokens, again = encode(PROMPT), encode(PROMPT)
    assert tokens is not again
    assert tokens == again
    others = list(changed(tokens))
    assert len(others) == 5
    assert all(tokens != other for other in others)
    assert tokens != encode(PROMPT.with_texts(["The kiln."]))
    assert tokens != "tokens"


@pytest.mark.parametrize(
    "make",
    [
        lambda: DraftReading(torch.rand(3), torch.tensor([1, 2])),
        lambda: Selection(torch.tensor([0, 2]), torch.rand(3)),
        lambda: Trace(torch.tensor([7]), draft_scores=torch.rand(3), kv_scores=[torch.rand(2, 4)]),
        lambda: RankedUnits(*(np.arange(3) for _ in range(4))),
    ],
)
def test_values_are_compared_by_their_elements(make: Any) -> None:
    torch.manual_seed(1)
    value = make()
    torch.manual_seed(1)
    assert value == make()
    assert all(value != other for other in changed(value))
    with pytest.raises(TypeError, match="unhashable"):
        hash(value)


def test_nested_tensors_shapes_and_types_count() -> None:
    ids = torch.tensor([7])
    kept = Trace(ids, kept_kv_indices=[[torch.tensor([1, 2])]])
    assert kept == Trace(ids, kept_kv_indices=[[torch.tensor([1, 2])]])
    assert kept != Trace(ids, kept_kv_indices=[[torch.tensor([1, 3])]])
    assert kept != Trace(ids, kept_kv_indices=[[torch.tensor([1, 2])], []])
    assert kept != Trace(ids.to(torch.int32), kept_kv_indices=kept.kept_kv_indices)
    assert kept != Trace(ids.expand(2), kept_kv_indices=kept.kept_kv_indices)
    assert PromptTokens(*[ids] * 5) != PromptTokens(*[ids.unsqueeze(0)] * 5)


def test_no_dataclass_of_the_core_asks_a_tensor_for_its_truth() -> None:
    """The equality that `dataclass` writes is left to classes without tensors."""
    seen = []
    for module in pkgutil.walk_packages(draftsieve.core.__path__, "draftsieve.core."):
        for cls in vars(importlib.import_module(module.name)).values():
            if not (isinstance(cls, type) and dataclasses.is_dataclass(cls)):
                continue
            kinds = [str(field.type) for field in dataclasses.fields(cls)]
            if any("Tensor" in kind.split("Callable")[0] or "ndarray" in kind for kind in kinds):
                seen.append(cls)
                assert cls.__eq__ in (object.__eq__, TensorValue.__eq__), cls
    assert PromptTokens in seen

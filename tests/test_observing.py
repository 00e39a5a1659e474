"""Watching a model's attention: nothing it says changes, and nothing stays behind."""

from __future__ import annotations

from threading import Barrier, Thread

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from draftsieve import SpecPC
from draftsieve.core.errors import ModelError
from draftsieve.core.models.attention_capture import AttentionCall, observing
from draftsieve.core.specpc.draft_scores import read_draft

from . import families


class Layers:
    """Callback that notes which layers it has seen."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def __call__(self, call: AttentionCall) -> None:
        self.seen.append(call.layer)


def said(model: PreTrainedModel) -> torch.Tensor:
    """(1, 42, vocabulary) logits of a prompt and of two tokens behind it."""
    ids, cache = families.ids(42), DynamicCache(config=model.config)
    with torch.no_grad():
        parts = [model(ids[:, a:b], past_key_values=cache).logits for a, b in ((0, 40), (40, 42))]
    return torch.cat(parts, dim=1)


def untouched() -> bool:
    """Whether transformers' registry is as it was made."""
    own = "get_interface" not in vars(ALL_ATTENTION_FUNCTIONS)
    return own and ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa_attention_forward


@pytest.mark.parametrize(("name", "implementation"), families.CASES + families.SPARSE_CASES)
def test_a_watched_model_says_exactly_what_it_says_alone(name: str, implementation: str) -> None:
    model, layers = families.build(name, implementation), Layers()
    alone = said(model)
    with observing(model, layers):
        assert model.config._attn_implementation == implementation
        watched = said(model)
    assert torch.equal(watched, alone)
    assert layers.seen == [*range(model.config.num_hidden_layers)] * 2
    assert untouched()


def test_keys_that_stand_for_several_tokens_are_refused() -> None:
    model, layers = families.build_from(families.with_compressed_keys(), "eager"), Layers()
    alone = said(model)
    with observing(model, layers):
        assert torch.equal(said(model), alone)
    with pytest.raises(ModelError, match=r"Layer 3 .* at 75 keys after 60 tokens"):
        read_draft(model, families.ids(60), SpecPC(starting_layer=0), lookahead_tokens=1)
    assert untouched()


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_other_models_go_on_unseen(implementation: str) -> None:
    watched = families.build("llama", implementation)
    other, layers = families.build("gemma3", implementation), Layers()
    with observing(watched, layers):
        said(other)
        thread = Thread(target=said, args=(watched,))
        thread.start()
        thread.join()
    assert layers.seen == []


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_the_first_to_leave_does_not_blind_the_others(implementation: str) -> None:
    model, layers, barrier = families.build("llama", implementation), Layers(), Barrier(2)

    def stay() -> None:
        with observing(model, layers):
            barrier.wait()
            barrier.wait()  # the other has left
            said(model)

    thread = Thread(target=stay)
    thread.start()
    barrier.wait()
    with observing(model, Layers()):
        pass
    barrier.wait()
    thread.join()
    assert len(layers.seen) == 8
    assert untouched()

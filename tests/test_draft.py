"""The draft reading against attentions of a plain eager forward pass, for every family."""

from __future__ import annotations

from shutil import which
from threading import Thread

import pytest
import torch
from transformers import PreTrainedModel

from draftsieve import SpecPC
from draftsieve.core.errors import ModelError
from draftsieve.core.models.attention_capture import observing
from draftsieve.core.specpc.draft_scores import read_draft

from . import families

COMPILERS = [name for name in ("c++", "g++", "clang++") if which(name)]


def naive_reading(
    model: PreTrainedModel, ids: torch.Tensor, options: SpecPC, lookahead: int
) -> tuple[torch.Tensor, list[int]]:
    """Algorithm 2 with loops over full attention matrices of an eager model."""
    count = ids.shape[1]
    window = min(options.window_size, count)
    rows: list[tuple[int, float, torch.Tensor]] = []  # layer, weight, (heads, count)
    guesses: list[int] = []
    for step in range(lookahead):
        with torch.no_grad():
            out = model(input_ids=ids, output_attentions=True, use_cache=False)
        newest = range(count - window, count) if step == 0 else [count + step - 1]
        for layer, attention in enumerate(out.attentions):
            if layer < (options.starting_layer or 0):
                continue
            for place, row in enumerate(newest):
                weighted = options.weighted_query and step == 0
                weight = place / max(1, window - 1) if weighted and window > 1 else 1.0
                rows.append((layer, weight, attention[0, :, row, :count]))
        guesses.append(int(out.logits[0, -1].argmax()))
        ids = torch.cat([ids, torch.tensor([[guesses[-1]]])], dim=1)
    scores = torch.zeros(count)
    for _, weight, heads in rows:
        for head in heads:
            weighted_head = weight * head
            scores = (
                torch.maximum(scores, weighted_head)
                if options.reduction == "max"
                else scores + weighted_head
            )
    return scores, guesses


@pytest.mark.parametrize(("reduction", "lookahead"), [("max", 1), ("mean", 4)])
@pytest.mark.parametrize(("name", "implementation"), families.CASES + families.SPARSE_CASES)
def test_reading_equals_naive_reference(
    name: str, implementation: str, reduction: str, lookahead: int
) -> None:
    options = SpecPC(window_size=12, reduction=reduction, starting_layer=1)
    ids = families.ids(61)
    expected, guesses = naive_reading(families.build(name, "eager"), ids, options, lookahead)
    model = families.build(name, implementation)
    found = read_draft(model, ids, options, lookahead_tokens=lookahead)[0]
    torch.testing.assert_close(found.scores, expected, rtol=2e-4, atol=1e-6)
    assert found.lookahead_ids.tolist() == guesses
    assert model.config._attn_implementation == implementation


@pytest.mark.parametrize("lookahead", [1, 3])
@pytest.mark.parametrize(("name", "implementation"), families.CASES)
def test_left_padded_batch_gives_each_row_what_it_gets_alone(
    name: str, implementation: str, lookahead: int
) -> None:
    options = SpecPC(window_size=12, starting_layer=0)
    model = families.build(name, implementation)
    prompts = [families.ids(length, seed=length) for length in (5, 40, 57)]  # 5 is below the window
    together = read_draft(model, [p[0] for p in prompts], options, lookahead_tokens=lookahead)
    for prompt, found in zip(prompts, together, strict=True):
        alone = read_draft(model, prompt, options, lookahead_tokens=lookahead)[0]
        torch.testing.assert_close(found.scores, alone.scores, rtol=1e-4, atol=1e-6)
        assert found.lookahead_ids.tolist() == alone.lookahead_ids.tolist()


def check_flex_attention(name: str) -> None:
    options = SpecPC(window_size=12, starting_layer=0)
    prompts = [families.ids(length, seed=length) for length in (40, 57)]
    model = families.build(name, "flex_attention")
    found = read_draft(model, [p[0] for p in prompts], options, lookahead_tokens=1)
    for prompt, row in zip(prompts, found, strict=True):
        expected, _ = naive_reading(families.build(name, "eager"), prompt, options, 1)
        torch.testing.assert_close(row.scores, expected, rtol=2e-4, atol=1e-6)


@pytest.mark.skipif(not COMPILERS, reason="torch.compile needs a C++ compiler on CPU")
def test_flex_attention_drafts() -> None:
    """As transformers runs it, compiled; that takes a while, so it is tried on one family."""
    check_flex_attention("llama")


# learned sinks need flex attention on CUDA
@pytest.mark.parametrize("name", [name for name in families.NAMES if name != "gpt_oss"])
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
def test_flex_attention_drafts_that_are_not_compiled(name: str) -> None:
    with torch.compiler.set_stance("force_eager"):
        check_flex_attention(name)


def test_an_end_token_shortens_only_its_own_row() -> None:
    model = families.fresh("llama", "sdpa")
    options = SpecPC(window_size=8, starting_layer=0)
    prompts = [families.ids(30, seed=1), families.ids(30, seed=2)]
    free = [read_draft(model, p, options, lookahead_tokens=6)[0].lookahead_ids for p in prompts]
    end = int(free[0][1])
    assert end not in free[1].tolist(), "choose other seeds"
    model.generation_config.eos_token_id = [end]
    both = read_draft(model, torch.cat(prompts), options, lookahead_tokens=6)
    alone = read_draft(model, prompts[0], options, lookahead_tokens=6)[0]
    cut = free[0].tolist().index(end) + 1
    assert both[0].lookahead_ids.tolist() == free[0].tolist()[:cut]
    assert both[1].lookahead_ids.tolist() == free[1].tolist()
    torch.testing.assert_close(both[0].scores, alone.scores, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["llama", "gemma3n", "gemma4"])
def test_scoring_never_forms_all_logits(name: str) -> None:
    model = families.build(name, "sdpa")
    shapes = []
    hook = model.lm_head.register_forward_hook(lambda _m, _i, out: shapes.append(out.shape))
    try:
        read_draft(model, families.ids(50), SpecPC(), lookahead_tokens=2)
    finally:
        hook.remove()
    assert [shape[1] for shape in shapes] == [1, 1]


def test_nothing_stays_on_the_model_after_an_exception() -> None:
    model = families.build("qwen3", "sdpa")

    def fail(*_args: object, **_kwargs: object) -> None:
        raise RuntimeError("stop here")

    with pytest.raises(RuntimeError, match="stop here"), observing(model, fail):
        model(input_ids=families.ids(8))
    assert model.config._attn_implementation == "sdpa"
    calls = []
    with torch.no_grad():
        model(input_ids=families.ids(8))
    assert calls == []


def test_one_observer_does_not_see_another_threads_pass() -> None:
    model = families.build("llama", "sdpa")
    options = [SpecPC(window_size=w, starting_layer=s) for w, s in ((4, 0), (16, 1), (32, 2))]
    prompts = [families.ids(40 + 9 * i, seed=i) for i in range(3)]
    expected = [
        read_draft(model, p, o, lookahead_tokens=3)[0].scores
        for p, o in zip(prompts, options, strict=True)
    ]
    wrong: list[int] = []

    def work(index: int) -> None:
        for _ in range(8):
            found = read_draft(model, prompts[index], options[index], lookahead_tokens=3)[0]
            if not torch.allclose(found.scores, expected[index], rtol=1e-5, atol=1e-7):
                wrong.append(index)

    threads = [Thread(target=work, args=(i % 3,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_errors_name_the_problem() -> None:
    model = families.build("llama", "sdpa")
    with pytest.raises(ModelError, match="only 4 layers"):
        read_draft(model, families.ids(8), SpecPC(starting_layer=4), lookahead_tokens=1)

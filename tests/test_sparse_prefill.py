"""Vertical-slash sparse prefill against dense attention with a plain mask."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from draftsieve import Engine, Generation, Prompt, SpecKV, SpecKVPC, SpecPC
from draftsieve.core.errors import ConfigError
from draftsieve.core.generation.decode import next_tokens
from draftsieve.core.kv_cache.prefix import read_memory
from draftsieve.core.speckv import sparse_prefill
from draftsieve.core.speckv.evict import Eviction, evict
from draftsieve.core.speckv.scorers import SCORERS
from draftsieve.core.speckv.sparse_prefill import choose_columns, is_worth, sparse_attention
from examples.benchmarks.sparse_flex import flex_sparse_attention

from . import families
from .adapters_fixtures import QUESTION, TEXTS, tiny_engine, tiny_model, tiny_tokenizer

SHORT = Generation(max_new_tokens=6)
SPARSE = SpecKV(window_size=4, prefill_vertical_size=20, prefill_window_size=64)
DENSE = SpecKV(window_size=4)


@pytest.fixture
def everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read sparsely whatever the length, as long as the sizes do not cover it."""
    monkeypatch.setattr(sparse_prefill, "SHORTEST", {"cpu": 0, "cuda": 0})
    monkeypatch.setattr(sparse_prefill, "WORTH", float("inf"))


def _visible(columns: torch.Tensor, tokens: int, window: int) -> torch.Tensor:
    """(kv_heads, tokens, tokens) bool: causal, and a column or in the band."""
    row = torch.arange(tokens).unsqueeze(1)
    place = torch.arange(tokens)
    picked = torch.zeros(columns.shape[0], 1, tokens, dtype=torch.bool)
    for head, chosen in enumerate(columns):
        picked[head, 0, chosen] = True
    return (picked | (place >= row // 64 * 64 - window)) & (place <= row)


def _naive(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    visible: torch.Tensor,
    scaling: float,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """The whole matrix: (heads, tokens, dim) and visible (kv_heads, tokens, tokens)."""
    group = query.shape[0] // key.shape[0]
    keys, values, seen = (x.repeat_interleave(group, 0) for x in (key, value, visible))
    logits = query @ keys.transpose(-1, -2) * scaling
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    logits = logits.masked_fill(~seen, float("-inf"))
    if sinks is not None:
        column = sinks.view(-1, 1, 1).expand(-1, logits.shape[1], 1)
        logits = torch.cat([logits, column], dim=-1)
    return logits.softmax(-1)[..., : keys.shape[1]] @ values


def _states(tokens: int, heads: int = 4, kv_heads: int = 2) -> list[torch.Tensor]:
    """Query, key, value of one sequence; values are narrower than keys."""
    generator = torch.Generator().manual_seed(tokens)
    shapes = ((heads, 16), (kv_heads, 16), (kv_heads, 16))
    return [torch.randn(h, tokens, d, generator=generator) * 2 for h, d in shapes]


def _random_columns(kv_heads: int, count: int, tokens: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(count)
    picked = [torch.randperm(tokens, generator=generator)[:count] for _ in range(kv_heads)]
    return torch.stack(picked).sort(-1).values


@pytest.mark.parametrize(
    ("tokens", "count", "window", "kv_heads"),
    [(700, 60, 128, 2), (513, 40, 50, 1), (1100, 9, 64, 4), (640, 0, 192, 2), (300, 30, 300, 2)],
)
def test_columns_and_band_equal_a_dense_mask(
    tokens: int, count: int, window: int, kv_heads: int
) -> None:
    states = _states(tokens, kv_heads=kv_heads)
    columns = _random_columns(kv_heads, count, tokens)
    expected = _naive(*states, _visible(columns, tokens, window), 0.3)
    found = sparse_attention(*states, columns, window, 0.3)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    rounded = [part.bfloat16() for part in states]
    coarse = sparse_attention(*rounded, columns, window, 0.3)
    assert coarse.dtype == torch.bfloat16
    expected = _naive(*(part.float() for part in rounded), _visible(columns, tokens, window), 0.3)
    torch.testing.assert_close(coarse.float(), expected, rtol=2e-2, atol=3e-2)


def test_soft_caps_and_sinks_equal_a_dense_mask() -> None:
    states, columns = _states(300), _random_columns(2, 25, 300)
    visible, sinks = _visible(columns, 300, 64), torch.tensor([2.0, -1.0, 0.5, 3.0])
    for extra in ((1.5, None), (None, sinks), (1.5, sinks)):
        expected = _naive(*states, visible, 0.3, *extra)
        found = sparse_attention(*states, columns, 64, 0.3, *extra)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*flex_attention.*torch.compile:UserWarning")
def test_flex_attention_computes_the_same() -> None:
    states, columns = _states(300), _random_columns(2, 25, 300)
    expected = sparse_attention(*states, columns, 64, 0.3)
    found = flex_sparse_attention(*states, columns, 64, 0.3)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_both_ways_agree_on_cuda() -> None:
    states = [part.repeat(1, 1, 4).cuda().bfloat16() for part in _states(1100)]
    columns = _random_columns(2, 100, 1100).cuda()
    expected = sparse_attention(*states, columns, 128, 0.1)
    found = flex_sparse_attention(*states, columns, 128, 0.1)
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=3e-2)


def test_no_matrix_of_all_tokens_is_formed() -> None:
    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(  # type: ignore[no-untyped-def]
            self, func, types, args=(), kwargs=None
        ):
            out = func(*args, **(kwargs or {}))
            for part in out if isinstance(out, tuple) else (out,):
                if isinstance(part, torch.Tensor) and part._base is None:
                    self.size = max(self.size, part.numel())
            return out

    tokens, block = 3000, sparse_prefill.BLOCK
    states, columns = _states(tokens, heads=2), _random_columns(2, 100, tokens)
    with Largest() as largest:
        sparse_attention(*states, columns, 128, 0.3)
    assert largest.size <= max(block * (100 + 128 + block), 2 * tokens * 16) < tokens**2 / 8


def test_protected_columns_come_first_and_the_window_never() -> None:
    scores = torch.rand(2, 300, generator=torch.Generator().manual_seed(0))
    scores[:, 290:] = float("-inf")  # the window and the last token
    nothing = torch.zeros(300, dtype=torch.bool)
    found = choose_columns(scores, nothing, tokens=310, vertical=12, window=64)
    assert found.tolist() == scores.topk(12).indices.sort().values.tolist()
    protected = nothing.clone()
    protected[[3, 7, 100, 295]] = True  # the last one lies in the band of every later query
    found = choose_columns(scores, protected, tokens=310, vertical=12, window=64)
    for head, row in enumerate(found.tolist()):
        best = scores[head].masked_fill(protected, -1.0).topk(9).indices.tolist()
        assert row == sorted([3, 7, 100, *best])
    few = choose_columns(scores, protected, tokens=310, vertical=2, window=64)
    assert few.tolist() == [[3, 7], [3, 7]]
    assert choose_columns(scores, nothing, 310, 400, 64).shape == (2, 290)


def test_sparse_reading_only_where_it_saves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse_prefill, "SHORTEST", {"cpu": 4096, "cuda": 65536})
    monkeypatch.setattr(sparse_prefill, "WORTH", 0.5)
    assert not is_worth(4095, 256, 256, "cpu")
    assert is_worth(4096, 256, 256, "cpu")
    assert not is_worth(4096, 256, 257, "cpu")  # more than half of what a dense query sees
    assert not is_worth(32768, 256, 256, "cuda")
    assert not is_worth(32768, 256, 256, "xpu")
    monkeypatch.setattr(sparse_prefill, "SHORTEST", {"cpu": 0, "cuda": 0})
    monkeypatch.setattr(sparse_prefill, "WORTH", float("inf"))
    assert not is_worth(4096, 2048, 2048, "cpu")  # the paper's condition
    assert is_worth(4097, 2048, 2048, "cpu")


def _same(one: Eviction, other: Eviction) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.scores, other.scores, strict=True))


def test_sizes_that_cover_all_and_short_prompts_are_read_dense(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Bit for bit: the model's own attention runs."""
    model, prompt, guess = families.build("llama", "sdpa"), families.ids(180)[0], families.ids(6)[0]
    plain = evict(model, [prompt], [guess], DENSE, [40])
    assert _same(evict(model, [prompt], [guess], SPARSE, [40]), plain)  # too short to gain
    monkeypatch.setattr(sparse_prefill, "SHORTEST", {"cpu": 0, "cuda": 0})
    monkeypatch.setattr(sparse_prefill, "WORTH", float("inf"))
    covering = SpecKV(window_size=4, prefill_vertical_size=122, prefill_window_size=64)
    assert _same(evict(model, [prompt], [guess], covering, [40]), plain)
    sparse = evict(model, [prompt], [guess], SPARSE, [40])
    torch.testing.assert_close(sparse.scores[0], plain.scores[0])  # scores are dense ...
    assert not torch.allclose(sparse.scores[1], plain.scores[1])  # ... of what was read sparsely
    everything = evict(model, [prompt], [guess], SPARSE, [179])  # nothing is evicted
    found = [t for (t,) in next_tokens(model, [prompt], SHORT, everything.start)]
    assert found == [t for (t,) in next_tokens(model, [prompt], SHORT)]


def _reference(
    model: PreTrainedModel, prompt: torch.Tensor, guess: torch.Tensor, options: SpecKV
) -> list[torch.Tensor]:
    """Pooled scores (kv_heads, candidates) of every full layer, from full matrices and masks."""
    size, total = prompt.numel(), prompt.numel() + guess.numel()
    candidates, found = size - 1 - options.window_size, []

    def attention(  # type: ignore[no-untyped-def]
        module, query, key, value, mask, scaling, sliding_window=None, softcap=None, s_aux=None, **_
    ):
        states = query[0], key[0], value[0]
        seen = torch.ones(key.shape[1], total, total).tril().bool()
        if sliding_window is not None:
            seen &= ~torch.ones(total, total).tril(-sliding_window).bool()
            return _naive(*states, seen, scaling, softcap, s_aux).transpose(0, 1)[None], None
        eye = torch.eye(total).expand(key.shape[1], -1, -1)
        dense = _naive(query[0], key[0], eye, seen, scaling, softcap, s_aux)
        rows = dense[:, candidates:].unflatten(0, (key.shape[1], -1)).amax((1, 2))
        half = options.kernel_size // 2
        padded = torch.nn.functional.pad(rows[:, :candidates], (half, half), value=-1.0)
        found.append(padded.unfold(-1, options.kernel_size, 1).amax(-1))
        order = found[-1].argsort(dim=-1, descending=True, stable=True)  # ties: the oldest first
        columns = order[:, : options.prefill_vertical_size]
        seen = _visible(columns, total, options.prefill_window_size)
        return _naive(*states, seen, scaling, softcap, s_aux).transpose(0, 1)[None], None

    reference = families.with_attention(model, attention)
    with torch.no_grad():
        reference(input_ids=torch.cat([prompt, guess]).unsqueeze(0), use_cache=False)
    return found


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize(
    ("name", "implementation"),
    [("llama", "sdpa"), ("llama", "eager"), ("gemma2", "eager"), ("gpt_oss", "eager"),
     ("qwen3", "sdpa"), ("gemma3", "sdpa")],
)  # fmt: skip
def test_every_layer_equals_full_matrices_with_masks(name: str, implementation: str) -> None:
    """Full-attention layers are sparse, sliding-window layers as ever."""
    model = families.build(name, implementation)
    prompt, guess = families.ids(200)[0], families.ids(6, seed=5)[0]
    options = SpecKV(window_size=4, kernel_size=3, prefill_vertical_size=30, prefill_window_size=40)
    done = evict(model, [prompt], [guess], options, [50])
    found = [scores[0, :, : 200 - 5] for scores in done.scores if scores.shape[-1]]
    expected = _reference(model, prompt, guess, options)
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)
    assert model.config._attn_implementation == implementation


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize(
    "changes", [{}, {"scorer": "h2o"}, {"scorer": "key_norm"}, {"head_budgets": "adaptive"}]
)
def test_padded_rows_get_what_they_get_alone(changes: dict[str, str]) -> None:
    """Two sparse rows, one that the sizes cover, one of which nothing is evicted."""
    model = families.build("llama", "sdpa")
    prompts = [families.ids(n, seed=n)[0] for n in (150, 210, 70, 120)]
    guesses = [families.ids(n + 1, seed=n)[0][:n] for n in (5, 2, 7, 0)]
    capacities = [40, 40, 40, 120]
    options = SpecKV.model_validate({**SPARSE.model_dump(exclude_unset=True), **changes})
    together = evict(model, prompts, guesses, options, capacities)
    tokens = list(next_tokens(model, prompts, SHORT, together.start))
    for row, prompt in enumerate(prompts):
        single = evict(model, [prompt], [guesses[row]], options, [capacities[row]])
        for ours, theirs in zip(together.entries(row), single.entries(0), strict=True):
            assert [head.tolist() for head in ours] == [head.tolist() for head in theirs]
        alone = list(next_tokens(model, [prompt], SHORT, single.start))
        assert [step[row] for step in tokens] == [step[0] for step in alone]


@pytest.mark.usefixtures("everywhere")
def test_engines_read_sparsely_with_protection_scorers_and_batches(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    windows: list[int] = []

    def counted(*args: Any) -> torch.Tensor:
        windows.append(args[4])
        return sparse_attention(*args)

    monkeypatch.setattr(sparse_prefill, "sparse_attention", counted)
    engine = tiny_engine()
    sizes = {"prefill_vertical_size": 16, "prefill_window_size": 8}
    speckv = SpecKV.model_validate({"ratio": 0.5, **sizes})
    prompts = [Prompt.from_question(QUESTION, TEXTS), Prompt.from_question("Dogs?", TEXTS[:2])]
    for method in (speckv, SpecKVPC(specpc=SpecPC(ratio=0.8), speckv=speckv)):
        alone = [engine.generate(p, method=method, generation=SHORT) for p in prompts]
        together = engine.generate_many(prompts, method=method, generation=SHORT)
        assert [a.text for a in together] == [a.text for a in alone]
        assert [a.usage.cache_entries for a in together] == [a.usage.cache_entries for a in alone]
    target_only = Engine(tiny_model(64, seed=2), tiny_tokenizer())
    for name in sorted(set(SCORERS) - {"speckv"}):
        other = SpecKV.model_validate({"ratio": 0.5, "scorer": name, **sizes})
        windows.clear()
        answer = target_only.answer(QUESTION, TEXTS, method=other, generation=SHORT)
        assert answer.usage.completion_tokens == 6
        assert windows.count(8) >= 2  # both layers


@pytest.mark.usefixtures("everywhere")
def test_prompts_of_a_session_are_read_dense() -> None:
    model, prompt, guess = families.build("llama", "sdpa"), families.ids(180)[0], families.ids(6)[0]
    memory = read_memory(model, prompt[:150])
    found = evict(model, [prompt], [guess], SPARSE, [40], memory=memory)
    plain = evict(model, [prompt], [guess], DENSE, [40], memory=memory)
    assert _same(found, plain)


@pytest.mark.usefixtures("everywhere")
def test_an_error_leaves_nothing_on_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompt = families.build("llama", "eager"), families.ids(180)[0]
    plain = evict(model, [prompt], [prompt[:3]], DENSE, [40])

    def fail(*_: Any, **__: Any) -> torch.Tensor:
        raise RuntimeError("stop here")

    monkeypatch.setattr(sparse_prefill, "sparse_attention", fail)
    with pytest.raises(RuntimeError, match="stop here"):
        evict(model, [prompt], [prompt[:3]], SPARSE, [40])
    assert model.config._attn_implementation == "eager"
    assert _same(evict(model, [prompt], [prompt[:3]], DENSE, [40]), plain)


def test_both_sizes_are_given_or_none() -> None:
    for one in ({"prefill_vertical_size": 64}, {"prefill_window_size": 64}):
        with pytest.raises(ValidationError, match="give both"):
            SpecKV.model_validate(one)
    with pytest.raises(ConfigError):
        SpecKV(prefill_vertical_size=0, prefill_window_size=64)
    assert SpecKV().prefill_vertical_size is None

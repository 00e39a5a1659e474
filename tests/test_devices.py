"""SpecKV on every device there is: the same tests on the CPU and, where it exists, on CUDA."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import pytest
import torch

from draftsieve import Engine, Generation, Prompt, SpecKV, SpecKVPC, SpecPC
from draftsieve.core.config import Method
from draftsieve.core.generation.decode import next_tokens
from draftsieve.core.kv_cache.layers import cache_bytes
from draftsieve.core.kv_cache.prefill import from_scratch
from draftsieve.core.speckv.evict import evict
from draftsieve.core.speckv.scorers import SCORERS

from . import families
from .adapters_fixtures import QUESTION, TEXTS, tiny_model, tiny_tokenizer

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=needs_cuda)]
SHORT = Generation(max_new_tokens=8)
METHODS: list[Method | None] = [
    None,
    SpecPC(ratio=0.5, lookahead_tokens=4),
    SpecKV(ratio=0.5),
    SpecKV(ratio=0.5, head_budgets="adaptive", layer_budgets="pyramid"),
    SpecKVPC(specpc=SpecPC(ratio=0.7, lookahead_tokens=4), speckv=SpecKV(ratio=0.6)),
]


@cache
def engine(device: str) -> Engine:
    """A tiny random pair in float32."""
    return Engine(
        tiny_model(64, seed=2).to(device),
        tiny_tokenizer(),
        draft_model=tiny_model(32, seed=1).to(device),
        progress=False,
    )


@pytest.fixture(autouse=True)
def exact_products() -> Iterator[None]:
    """Without TF32, as float32 is on a CPU."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("method", METHODS)
def test_batches_sessions_and_streams_answer_as_alone(method: Method | None, device: str) -> None:
    pair = engine(device)
    prompts = [
        Prompt.from_question(QUESTION, TEXTS),
        Prompt.from_question("Where are tickets sold?", TEXTS[:2]),
        Prompt.from_question("Who is the keeper?", TEXTS[1:]),
    ]
    alone = [pair.generate(prompt, method=method, generation=SHORT) for prompt in prompts]
    together = pair.generate_many(prompts, method=method, generation=SHORT)
    assert [answer.text for answer in together] == [answer.text for answer in alone]
    assert [answer.lookahead for answer in together] == [answer.lookahead for answer in alone]
    pieces = pair.stream(QUESTION, TEXTS, method=method, generation=SHORT)
    assert "".join(piece.text for piece in pieces) == alone[0].text
    if method is None or (isinstance(method, SpecKV) and not method.uneven):
        asked = pair.session(TEXTS).answer(QUESTION, method=method, generation=SHORT)
        assert asked.text == alone[0].text


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", sorted(SCORERS))
def test_every_scorer_keeps_the_capacity_on_the_models_device(name: str, device: str) -> None:
    pair = engine(device)
    method = SpecKV.model_validate({"scorer": name, "ratio": 0.5})
    answer = pair.answer(QUESTION, TEXTS, method=method, generation=SHORT)
    entries = answer.usage.cache_entries
    config = pair.target.config
    width = config.hidden_size // config.num_attention_heads
    heads = config.num_hidden_layers * config.num_key_value_heads
    assert entries is not None
    assert answer.cache_bytes == entries * heads * width * 2 * 4


@needs_cuda
def test_the_peak_on_cuda_is_one_layers_full_keys_and_values() -> None:
    """What the allocator saw while a prompt was read into an evicted and into a full cache."""
    torch.manual_seed(0)
    model = tiny_model(64, seed=2, layers=16).to("cuda")
    model.config.max_position_embeddings = 8192
    prompt = torch.randint(5, 100, (4096,))
    peaks = {}
    for name in ("warm", "full", "evicted"):
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        if name == "evicted":
            cache_ = evict(model, [prompt], [prompt[:8]], SpecKV(), [256]).start.cache
        else:
            start = from_scratch(model, [prompt])
            next(next_tokens(model, [prompt], SHORT, start))
            cache_ = start.cache
        peaks[name] = torch.cuda.max_memory_allocated() - before
        held = cache_bytes(cache_)
        del cache_
    full = 4096 * 16 * 2 * 16 * 2 * 4
    assert held * 16 == full
    assert peaks["full"] - peaks["evicted"] > full / 2


@needs_cuda
@pytest.mark.parametrize(("name", "implementation"), families.CASES)
def test_families_read_the_same_on_cuda(name: str, implementation: str) -> None:
    """Evicted answers of the CPU and of the device, token for token."""
    if name in ("mistral", "phi3"):
        pytest.skip("sliding windows only: nothing to evict")
    prompt = families.ids(70)[0]
    found = {}
    for device in ("cpu", "cuda"):
        model = families.fresh(name, implementation).to(device)
        done = evict(model, [prompt], [prompt[:4]], SpecKV(window_size=6), [30])
        steps = next_tokens(model, [prompt], SHORT, done.start)
        found[device] = [token for (token,) in steps]
    assert found["cuda"] == found["cpu"]

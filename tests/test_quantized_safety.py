"""Quantised models: first requests at once, saving, sessions, and what they weigh."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from threading import Barrier

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from draftsieve import Engine, Generation, Quantization, SpecKV, SpecPC
from draftsieve.core.config import Method
from draftsieve.core.errors import ModelError
from draftsieve.core.models.footprint import footprint
from draftsieve.core.models.loading import fingerprint, load_model
from draftsieve.core.models.names import resolve

QUESTION = "Which badge was issued to Mira Tolen?"
TEXTS = [
    "Badge AK-731 was issued to Mira Tolen. She plays chess on Sundays. Her room is 214.",
    "Calls for Jonas Perrick go to 555-0173. The pass made out to him is marked D-4410.",
]
SHORT = Generation(max_new_tokens=6)
METHODS: list[Method | None] = [None, SpecKV(ratio=0.5), SpecPC(ratio=0.5)]


def _load(bits: int) -> Engine:
    weights = Quantization.model_validate({"bits": bits})
    return Engine.load(
        "builtin:target",
        "builtin:draft",
        quantization=weights,
        draft_quantization=weights,
        device="cpu",
        progress=False,
    )


def _cold(bits: int) -> Engine:
    """Models that transformers has just loaded and nobody has run, given as objects."""
    options = (
        BitsAndBytesConfig(load_in_8bit=True)
        if bits == 8
        else BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
        )
    )
    models = [
        AutoModelForCausalLM.from_pretrained(
            resolve(f"builtin:{role}"),
            quantization_config=options,
            dtype=torch.float32,
            device_map={"": "cpu"},
        )
        for role in ("target", "draft")
    ]
    tokenizer = AutoTokenizer.from_pretrained(resolve("builtin:target"))
    return Engine(models[0], tokenizer, draft_model=models[1], progress=False)


def _ask(engine: Engine, method: Method | None) -> str:
    return engine.answer(QUESTION, TEXTS, method=method, generation=SHORT).text


@cache
def _one_by_one(bits: int) -> list[str]:
    engine = _load(bits)
    return [_ask(engine, method) for method in METHODS]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("make", [_load, _cold])
def test_first_requests_at_once_give_the_serial_answers(
    make: Callable[[int], Engine], bits: int
) -> None:
    engine, start = make(bits), Barrier(4)

    def at_once(method: Method | None) -> str:
        start.wait()
        return _ask(engine, method)

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(at_once, [*METHODS, None]))
    assert found == [*_one_by_one(bits), _one_by_one(bits)[0]]


def _weighs(module: torch.nn.Module) -> bool:
    return isinstance(getattr(module, "weight", None), torch.Tensor)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("make", "role"), [(_load, "draft"), (_cold, "target"), (_cold, "draft")])
def test_a_saved_quantised_model_is_right_or_refused(
    make: Callable[[int], Engine], role: str, bits: int, tmp_path: Path
) -> None:
    """On CPUs where bitsandbytes repacks 4-bit weights, writing them out would be wrong."""
    model = getattr(make(bits), role)
    ids = torch.arange(10, 40).unsqueeze(0)
    with torch.no_grad():
        before = model(ids).logits
    states = [getattr(m.weight, "quant_state", None) for m in model.modules() if _weighs(m)]
    assert max(len(m._state_dict_pre_hooks) for m in model.modules()) == (bits == 4)
    if any(getattr(state, "packing_format_for_cpu", False) for state in states):
        with pytest.raises(ModelError, match="cannot be saved"):
            model.save_pretrained(tmp_path)
        assert not list(tmp_path.glob("*.safetensors"))
    else:
        model.save_pretrained(tmp_path)
        again = AutoModelForCausalLM.from_pretrained(tmp_path, device_map={"": "cpu"}).eval()
        with torch.no_grad():
            torch.testing.assert_close(again(ids).logits, before, rtol=1e-3, atol=1e-3)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, before)  # asking has changed nothing


def test_repacked_weights_are_not_saved(tmp_path: Path) -> None:
    """As bitsandbytes marks them on CPUs with AVX-512; this one may have none."""
    model = _load(4).draft
    assert model is not None
    states = [getattr(m.weight, "quant_state", None) for m in model.modules() if _weighs(m)]
    state = next(state for state in states if state is not None)
    state.packing_format_for_cpu = True
    with pytest.raises(ModelError, match="cannot be saved"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("scorer", ["speckv", "h2o"])
def test_quantised_streams_are_the_sampled_answer(scorer: str, bits: int) -> None:
    engine = _load(bits)
    method = SpecKV.model_validate({"ratio": 0.5, "scorer": scorer})
    options = Generation(max_new_tokens=6, temperature=1.0, top_p=0.9, seed=3)
    answer = engine.answer(QUESTION, TEXTS, method=method, generation=options)
    assert (answer.usage.cache_entries or 999) < answer.usage.prompt_tokens
    pieces = list(engine.stream(QUESTION, TEXTS, method=method, generation=options))
    assert "".join(piece.text for piece in pieces) == answer.text != ""


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_sessions_answer_like_a_new_reading(bits: int, tmp_path: Path) -> None:
    engine = _load(bits)
    session = engine.session(TEXTS)
    method = SpecKV(ratio=0.5)
    fresh = engine.answer(QUESTION, TEXTS, method=method, generation=SHORT)
    assert session.answer(QUESTION, method=method, generation=SHORT).text == fresh.text
    session.save(tmp_path)
    plain = Engine.load("builtin:target", device="cpu", progress=False)
    with pytest.raises(ModelError, match="quantisation"):
        plain.load_session(tmp_path)


def test_the_footprint_counts_the_scales_of_4_bit_weights() -> None:
    """64 weights share a float32 scale, or an 8-bit one that 256 share another float32 for."""
    plain = load_model("builtin:target", device="cpu", progress=False).model
    linear = [m.weight for n, m in plain.named_modules() if isinstance(m, nn.Linear)]
    packed = sum(w.numel() for w in linear) - plain.get_output_embeddings().weight.numel()
    found = {}
    for double in (False, True):
        loaded = load_model(
            "builtin:target",
            quantization=Quantization(bits=4, double_quant=double),
            device="cpu",
            dtype="float32",
            progress=False,
        )
        found[double] = footprint(loaded.model)
    assert footprint(plain) >= 4 * plain.num_parameters()
    rest = footprint(plain) - 4 * packed  # embeddings, norms, buffers
    blocks = packed // 64
    few = 7 * 8 * 4096  # tables of code values, at most 4 kB a layer's matrix
    assert 0 <= found[False] - (rest + packed // 2 + 4 * blocks) < few
    assert 0 <= found[True] - (rest + packed // 2 + blocks + 4 * (blocks // 256)) < few


def test_footprints_shrink_with_the_bits() -> None:
    sizes = {
        bits: load_model(
            "builtin:target",
            quantization=None if bits == 32 else Quantization.model_validate({"bits": bits}),
            device="cpu",
            progress=False,
        )
        for bits in (4, 8, 32)
    }
    weights = {
        bits: Engine(loaded.model, loaded.tokenizer).footprint for bits, loaded in sizes.items()
    }
    assert all(set(found) == {"target"} for found in weights.values())
    assert weights[4]["target"] < weights[8]["target"] < weights[32]["target"]
    plain = sizes[32].model
    assert weights[32]["target"] >= 4 * plain.num_parameters()
    assert len({fingerprint(loaded.model) for loaded in sizes.values()}) >= 2
    half = load_model("builtin:target", device="cpu", dtype="bfloat16", progress=False)
    assert fingerprint(half.model) == fingerprint(plain)  # a bfloat16 checkpoint

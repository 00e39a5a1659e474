"""Loading: bundled pair, folders, quantised weights, devices, dtypes, errors."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as transformers_logging

from draftsieve import Compressor, Engine, Generation, Quantization, SpecKV, SpecKVPC, SpecPC
from draftsieve.core.errors import ModelError, ModelNotFoundError
from draftsieve.core.models.devices import (
    SMALLEST,
    auto_dtype,
    multiplies_bfloat16,
    pick_dtype,
)
from draftsieve.core.models.loading import load_model, load_tokenizer
from draftsieve.integrations._shared.options import EngineOptions
from draftsieve.retrievers.options import DraftOptions
from examples.benchmarks import dtype_cpu

QUESTION = "Which badge was issued to Mira Tolen?"
TEXTS = [
    "Badge AK-731 was issued to Mira Tolen. She plays chess on Sundays. Her room is 214.",
    "Calls for Jonas Perrick go to 555-0173. The pass made out to him is marked D-4410.",
]
SHORT = Generation(max_new_tokens=8)
METHODS = (
    None,
    SpecPC(ratio=0.5),
    SpecKV(ratio=0.5),
    SpecKV(ratio=0.5, scorer="laq"),
    SpecKV(ratio=0.5, head_budgets="adaptive", layer_budgets="pyramid"),
    SpecKVPC(specpc=SpecPC(ratio=0.7, lookahead_tokens=4), speckv=SpecKV(ratio=0.6)),
)


def test_the_bundled_pair_loads_in_float32_on_a_cpu() -> None:
    target = load_model("builtin:target", device="cpu", progress=False)
    draft = load_model("builtin:draft", device="cpu", progress=False)
    assert target.model.dtype == draft.model.dtype == torch.float32
    assert not target.model.training
    assert target.model.num_parameters() < SMALLEST  # also where the processor has bfloat16
    assert 4 < target.model.num_parameters() / draft.model.num_parameters() < 10
    assert target.tokenizer.get_vocab() == draft.tokenizer.get_vocab()
    assert len(target.tokenizer) == target.model.config.vocab_size


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_pairs_answer_on_a_cpu(bits: int) -> None:
    plain = Engine.load("builtin:target", "builtin:draft", device="cpu", progress=False)
    quantised = Engine.load(
        "builtin:target",
        "builtin:draft",
        quantization=Quantization(bits=bits),
        draft_quantization=Quantization(bits=bits),
        device="cpu",
        progress=False,
    )
    for small, big in ((quantised.target, plain.target), (quantised.draft, plain.draft)):
        assert small is not None
        assert big is not None
        assert small.get_memory_footprint() < big.get_memory_footprint()  # type: ignore[no-untyped-call]
    ids = torch.tensor([plain.encode_text(" ".join(TEXTS))])
    with torch.no_grad():
        exact, close = plain.target(ids).logits, quantised.target(ids).logits
    error = (exact - close).float().norm() / exact.norm()
    assert 0 < error < (0.35 if bits == 4 else 0.1)
    for method in METHODS:
        answer = quantised.answer(QUESTION, TEXTS, method=method, generation=SHORT)
        assert answer.usage.completion_tokens > 0
        assert (answer.cache_bytes is not None) == isinstance(method, SpecKV | SpecKVPC)
        again = quantised.answer(QUESTION, TEXTS, method=method, generation=SHORT)
        assert again.text == answer.text
        many = quantised.answer_many([QUESTION] * 2, [TEXTS] * 2, method=method, generation=SHORT)
        assert all(row.usage.completion_tokens > 0 for row in many)


def test_a_fresh_quantised_model_takes_several_threads_at_once() -> None:
    """The first 4-bit pass on a CPU repacks weights in place; loading runs it before anyone."""
    engine = Engine.load(
        "builtin:target", quantization=Quantization(bits=4), device="cpu", progress=False
    )
    with ThreadPoolExecutor(4) as pool:
        answers = list(
            pool.map(lambda _: engine.answer(QUESTION, TEXTS, generation=SHORT).text, range(8))
        )
    assert len(set(answers)) == 1


def test_a_quantised_batch_stays_close_to_single_rows() -> None:
    loaded = load_model(
        "builtin:target", quantization=Quantization(bits=8), device="cpu", progress=False
    )
    rows = [torch.arange(10, 40), torch.arange(60, 80)]
    from draftsieve.core.kv_cache.prefill import pad_left

    ids, mask = pad_left(rows, torch.device("cpu"))
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        both = loaded.model(ids, attention_mask=mask, position_ids=positions).logits[:, -1]
        for index, row in enumerate(rows):
            alone = loaded.model(row.unsqueeze(0)).logits[0, -1]
            assert (both[index] - alone).norm() / alone.norm() < 0.05


def test_folders_load_like_bundled_models(tmp_path: Path) -> None:
    loaded = load_model("builtin:draft", device="cpu", progress=False)
    loaded.model.save_pretrained(tmp_path)
    loaded.tokenizer.save_pretrained(tmp_path)
    method = SpecPC(ratio=0.5)
    texts = {
        Compressor.load(name, device="cpu", progress=False).compress(QUESTION, TEXTS, method).text
        for name in (tmp_path, str(tmp_path), "builtin:draft")
    }
    assert len(texts) == 1


def test_only_safetensors_are_read(tmp_path: Path) -> None:
    loaded = load_model("builtin:draft", device="cpu", progress=False)
    loaded.model.config.save_pretrained(tmp_path)
    loaded.tokenizer.save_pretrained(tmp_path)
    torch.save(loaded.model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelNotFoundError, match="safetensors"):
        load_model(tmp_path, progress=False)


@pytest.mark.parametrize(
    ("stored", "parameters", "expected"),
    [
        (torch.bfloat16, 135_000_000, torch.bfloat16),
        (torch.float16, 50_000_000, torch.bfloat16),
        (torch.bfloat16, 49_999_999, torch.float32),
        (torch.float32, 7_000_000_000, torch.float32),
        (None, 7_000_000_000, torch.float32),
    ],
)
def test_large_half_precision_checkpoints_stay_small_on_an_able_cpu(
    stored: torch.dtype | None, parameters: int, expected: torch.dtype
) -> None:
    assert auto_dtype(stored, parameters) == expected


def test_a_processor_says_whether_it_multiplies_bfloat16() -> None:
    assert multiplies_bfloat16({"amx_bf16": True, "avx512_bf16": False})
    assert multiplies_bfloat16({"avx512_bf16": True})
    assert not multiplies_bfloat16({"avx512_f": True, "amx_bf16": False, "neon": True})
    assert not multiplies_bfloat16({})
    able = multiplies_bfloat16(torch.cpu.get_capabilities())
    assert multiplies_bfloat16() == able
    assert pick_dtype("auto", "cpu") == ("auto" if able else torch.float32)
    assert pick_dtype("auto", "cuda:1") == "auto"
    assert pick_dtype("bfloat16", "cpu") == torch.bfloat16


def test_an_able_cpu_loads_large_models_in_bfloat16(tmp_path: Path) -> None:
    """In a process whose torch claims AMX, and that finds 100,000 parameters many."""
    for name, vocabulary in (("large", 2_000), ("small", 500)):
        config = LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=64,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            tie_word_embeddings=True,
        )
        LlamaForCausalLM(config).bfloat16().save_pretrained(tmp_path / name)
        load_tokenizer("builtin:draft").save_pretrained(tmp_path / name)
    code = """
import sys, torch
torch.cpu.get_capabilities = lambda: {"amx_bf16": True}
from draftsieve import Quantization
from draftsieve.core.models import devices
from draftsieve.core.models.loading import load_model
devices.SMALLEST = 100_000
four = Quantization(bits=4)
for folder, options in (
    ("large", {}),
    ("large", {"dtype": "float32"}),
    ("large", {"quantization": four}),
    ("small", {}),
):
    path = f"{sys.argv[1]}/{folder}"
    print(load_model(path, device="cpu", progress=False, **options).model.dtype)
"""
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["torch.bfloat16", *["torch.float32"] * 3]


def test_the_benchmark_of_types_runs(capsys: pytest.CaptureFixture[str]) -> None:
    dtype_cpu.main(["--sizes", "64x1", "--lengths", "16", "--repeats", "1"])
    said = capsys.readouterr().out.splitlines()
    assert said[1].count("|") == said[-1].count("|") == 12
    assert said[-1].endswith("| float32 |")


def test_dtypes_and_devices() -> None:
    half = load_model("builtin:draft", dtype="bfloat16", device="cpu", progress=False)
    assert half.model.dtype == torch.bfloat16
    with pytest.raises(ModelError, match="no dtype"):
        load_model("builtin:draft", dtype="float33", progress=False)
    with pytest.raises(ModelError, match="no device"):
        load_model("builtin:draft", device="toaster", progress=False)
    if not torch.cuda.is_available():
        with pytest.raises(ModelError, match="sees no CUDA"):
            load_model("builtin:draft", device="cuda", progress=False)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_the_attention_implementation_can_be_chosen(implementation: str) -> None:
    other = "sdpa" if implementation == "eager" else "eager"
    engine = Engine.load(
        "builtin:target",
        "builtin:draft",
        device="cpu",
        attn_implementation=implementation,
        draft_attn_implementation=other,
        progress=False,
    )
    assert engine.draft is not None
    assert engine.target.config._attn_implementation == implementation
    assert engine.draft.config._attn_implementation == other
    compressor = Compressor.load(
        "builtin:draft", device="cpu", attn_implementation=implementation, progress=False
    )
    assert compressor.model.config._attn_implementation == implementation
    adapted = EngineOptions(
        draft="builtin:draft",
        device="cpu",
        attn_implementation=implementation,
        draft_attn_implementation=other,
    ).loaded
    assert adapted.draft is not None
    assert adapted.target.config._attn_implementation == implementation
    assert adapted.draft.config._attn_implementation == other
    sieve = DraftOptions(device="cpu", attn_implementation=implementation).loaded
    assert sieve.model.config._attn_implementation == implementation
    with pytest.raises(ModelError, match="Cannot load the model"):
        load_model("builtin:draft", attn_implementation="no_such", device="cpu", progress=False)


def test_a_model_that_reads_and_answers_is_loaded_once() -> None:
    """A draft of the target's name is the target, unless it is loaded otherwise."""
    name, quiet = "builtin:draft", {"device": "cpu", "progress": False}
    engine = Engine.load(name, name, **quiet)
    assert engine.draft is engine.target
    answer = engine.answer(QUESTION, TEXTS, method=SpecPC(ratio=0.5), generation=SHORT)
    apart = Engine.load(name, name, draft_attn_implementation="eager", **quiet)
    assert apart.draft is not apart.target
    assert apart.answer(QUESTION, TEXTS, method=SpecPC(ratio=0.5), generation=SHORT).text == (
        answer.text
    )
    adapted = EngineOptions(model=name, draft=name, **quiet).loaded
    assert adapted.draft is adapted.target
    assert EngineOptions(model=name, draft=name, dtype="bfloat16", **quiet).loaded.draft is not (
        adapted.draft
    )


def test_cut_off_weights_are_told(tmp_path: Path) -> None:
    loaded = load_model("builtin:draft", device="cpu", progress=False)
    loaded.model.save_pretrained(tmp_path)
    loaded.tokenizer.save_pretrained(tmp_path)
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelError, match="Cannot load the model"):
        load_model(tmp_path, device="cpu", progress=False)


def test_a_revision_of_a_hub_repository_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two revisions in a hub cache, as the hub's client leaves them there; no network."""
    loaded = load_model("builtin:draft", device="cpu", progress=False)
    home = tmp_path / "models--someone--tiny"
    commits = {"main": "a" * 40, "v2": "b" * 40}
    for branch, commit in commits.items():
        (home / "refs").mkdir(parents=True, exist_ok=True)
        (home / "refs" / branch).write_text(commit)
        if branch == "v2":
            with torch.no_grad():
                loaded.model.get_input_embeddings().weight[0] += 1.0
        loaded.model.save_pretrained(home / "snapshots" / commit)
        loaded.tokenizer.save_pretrained(home / "snapshots" / commit)
    code = f"""
from draftsieve import Compressor, Engine
from draftsieve.core.models.loading import fingerprint, load_model
quiet = dict(device="cpu", progress=False)
name = "someone/tiny"
new = fingerprint(load_model(name, revision="v2", **quiet).model)
old = fingerprint(load_model(name, **quiet).model)
assert new != old
assert fingerprint(load_model(name, revision="{commits["v2"]}", **quiet).model) == new
assert fingerprint(Compressor.load(name, revision="v2", **quiet).model) == new
engine = Engine.load(name, name, draft_revision="v2", **quiet)
assert fingerprint(engine.target) == old
assert fingerprint(engine.draft) == new
engine = Engine.load(name, name, revision="v2", **quiet)
assert fingerprint(engine.target) == new
assert fingerprint(engine.draft) == old
from draftsieve.integrations._shared.options import EngineOptions
from draftsieve.integrations.langchain import DraftCompressionMiddleware
from draftsieve.retrievers.options import DraftOptions
engine = EngineOptions(model=name, draft=name, draft_revision="v2", **quiet).loaded
assert fingerprint(engine.target) == old
assert fingerprint(engine.draft) == new
assert fingerprint(EngineOptions(model=name, revision="v2", **quiet).loaded.target) == new
assert fingerprint(DraftOptions(model=name, revision="v2", **quiet).loaded.model) == new
sieve = DraftCompressionMiddleware(name, revision="v2", **quiet)
assert fingerprint(sieve.compressor.model) == new
"""
    settings = {**os.environ, "HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(
        [sys.executable, "-c", code], env=settings, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr


def test_a_ready_configuration_of_transformers_quantises() -> None:
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4")
    engine = Engine.load(
        "builtin:target",
        "builtin:draft",
        quantization=config,
        draft_quantization=BitsAndBytesConfig(load_in_8bit=True),
        device="cpu",
        progress=False,
    )
    assert engine.draft is not None
    layer = engine.target.get_submodule("model.layers.0.self_attn.q_proj")
    assert layer.weight.quant_state.quant_type == "fp4"  # type: ignore[union-attr]
    assert engine.draft.is_loaded_in_8bit
    answer = engine.answer(QUESTION, TEXTS, method=SpecPC(ratio=0.5), generation=SHORT)
    assert answer.usage.completion_tokens > 0
    ready = Compressor.load("builtin:draft", quantization=config, device="cpu", progress=False)
    assert ready.model.is_loaded_in_4bit
    assert DraftOptions(quantization=config, device="cpu").loaded.model.is_loaded_in_4bit
    options = EngineOptions(
        draft="builtin:draft", quantization=config, draft_quantization=config, device="cpu"
    )
    assert options.loaded.target.is_loaded_in_4bit
    assert options.loaded.draft is not None
    assert options.loaded.draft.is_loaded_in_4bit


@pytest.mark.parametrize("shown", [True, False])
def test_loading_bars_can_be_turned_off(shown: bool, capfd: pytest.CaptureFixture[str]) -> None:
    before = transformers_logging.is_progress_bar_enabled()
    load_model("builtin:draft", device="cpu", progress=shown)
    assert ("it/s" in capfd.readouterr().err) == shown
    assert transformers_logging.is_progress_bar_enabled() == before


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("bits", [None, 4, 8])
def test_on_cuda(bits: int | None) -> None:
    weights = None if bits is None else Quantization.model_validate({"bits": bits})
    engine = Engine.load(
        "builtin:target", "builtin:draft", quantization=weights, device="cuda", progress=False
    )
    for method in METHODS:
        answer = engine.answer(QUESTION, TEXTS, method=method, generation=SHORT)
        assert answer.usage.completion_tokens > 0

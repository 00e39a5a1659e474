"""Weights quantised by torchao instead of bitsandbytes."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from draftsieve import Engine, Generation, Quantization, SpecKV, SpecPC
from draftsieve.core.errors import MissingExtraError
from draftsieve.core.models.loading import fingerprint, load_model

from . import tiny_gguf

INT8 = Quantization(bits=8, backend="torchao")
TEXTS = ["Badge AK-731 was issued to Mira Tolen. Her room is 214.", "Calls go to 555-0173."]
needs_torchao = pytest.mark.skipif(
    find_spec("torchao") is None, reason='needs pip install "draftsieve[torchao]"'
)


def test_what_it_cannot_do_is_refused() -> None:
    for options in ({"bits": 4}, {"bits": 8, "double_quant": True}):
        with pytest.raises(ValueError, match="give bits=8"):
            Quantization.model_validate({**options, "backend": "torchao"})


@pytest.mark.skipif(find_spec("torchao") is not None, reason="torchao is installed")
def test_the_missing_package_is_named_with_its_command() -> None:
    with pytest.raises(MissingExtraError, match=r'pip install "draftsieve\[torchao\]"'):
        load_model("builtin:draft", quantization=INT8, progress=False)


@needs_torchao
def test_it_is_closer_than_bitsandbytes_and_answers() -> None:
    plain = load_model("builtin:target", device="cpu", dtype="float32", progress=False).model
    ids = torch.arange(5, 60).unsqueeze(0)
    errors = []
    for weights in (INT8, Quantization(bits=8)):
        small = load_model(
            "builtin:target", device="cpu", dtype="float32", quantization=weights, progress=False
        )
        with torch.no_grad():
            exact, near = plain(ids).logits, small.model(ids).logits
        errors.append(float((exact - near).norm() / exact.norm()))
    assert 0 < errors[0] < errors[1]
    engine = Engine.load(
        "builtin:target",
        "builtin:draft",
        quantization=INT8,
        draft_quantization=INT8,
        device="cpu",
        progress=False,
    )
    for method in (None, SpecPC(ratio=0.6), SpecKV(ratio=0.8)):
        answer = engine.answer(
            "Which badge was issued to Mira Tolen?",
            TEXTS,
            method=method,
            generation=Generation(max_new_tokens=8),
        )
        assert answer.usage.completion_tokens > 0


@needs_torchao
def test_an_unpacked_gguf_file_can_be_quantised_so(tmp_path: Path) -> None:
    file = tiny_gguf.write(tmp_path / "tiny.gguf")
    small = load_model(file, device="cpu", dtype="float32", quantization=INT8).model
    ids = torch.arange(5, 60).unsqueeze(0)
    with torch.no_grad():
        exact, near = tiny_gguf.model()(ids).logits, small(ids).logits
    assert 0 < (exact - near).norm() / exact.norm() < 0.05


@needs_torchao
def test_quantised_weights_have_a_fingerprint_of_their_own(tmp_path: Path) -> None:
    """What sessions on disk and results of an evaluation are told apart by."""
    models = (
        ("builtin:draft", INT8),
        ("builtin:draft", None),
        ("builtin:target", INT8),
        ("builtin:draft", INT8),
    )
    found = [
        fingerprint(load_model(name, quantization=weights, device="cpu", progress=False).model)
        for name, weights in models
    ]
    assert len(set(found)) == 3
    assert found[0] == found[3]
    engine = Engine.load(
        "builtin:target", "builtin:draft", draft_quantization=INT8, device="cpu", progress=False
    )
    engine.session(TEXTS).save(tmp_path / "session")
    assert engine.load_session(tmp_path / "session").stats.draft_bytes > 0

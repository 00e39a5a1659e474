"""Linear layers in int8 by plain torch, for drafts on a CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from draftsieve import Compressor, Quantization, SpecPC
from draftsieve.core.errors import ModelError
from draftsieve.core.models.int8 import Int8Linear, quantise, require_exact_products, to_int8
from draftsieve.core.models.loading import load_model

INT8 = Quantization(bits=8, backend="torch")


@pytest.mark.parametrize("shape", [(1, 24), (3, 100, 24), (2, 0, 24)])
@pytest.mark.parametrize("bias", [True, False])
def test_it_multiplies_the_rounded_values_exactly(shape: tuple[int, ...], bias: bool) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(24, 10, bias=bias)
    values = torch.randn(shape) * torch.logspace(-3, 3, 24)  # a few large channels
    found = Int8Linear(linear)(values)
    rows, by_row = quantise(values.reshape(-1, 24))
    weights, by_channel = quantise(linear.weight.detach())
    sums = (rows.long() @ weights.long().T).double() * by_row * by_channel.T
    wanted = sums + (0 if linear.bias is None else linear.bias.detach())
    assert found.shape == (*shape[:-1], 10)
    assert torch.allclose(found.reshape(-1, 10).double(), wanted, rtol=1e-5, atol=1e-5)


def test_rounding_is_to_half_a_step_and_nothing_divides_by_zero() -> None:
    values = torch.cat([torch.randn(5, 33), torch.zeros(1, 33)])
    whole, scale = quantise(values)
    assert ((whole * scale - values).abs() <= scale / 2 + 1e-7).all()
    assert (whole[-1] == 0).all()


def test_more_tokens_than_a_part_holds_are_read_alike() -> None:
    layer = Int8Linear(nn.Linear(16, 8))
    values = torch.randn(300, 16)
    single = torch.cat([layer(row[None]) for row in values])
    assert torch.allclose(layer(values), single, atol=1e-6)


def test_every_linear_layer_but_the_head_is_replaced_and_the_model_stays_near() -> None:
    plain = load_model("builtin:target", device="cpu", dtype="float32", progress=False).model
    small = load_model(
        "builtin:target", device="cpu", dtype="float32", quantization=INT8, progress=False
    ).model
    left = [name for name, m in small.named_modules() if type(m) is nn.Linear]
    assert left == [] or small.get_output_embeddings() is dict(small.named_modules())[left[0]]
    ids = torch.arange(5, 60).unsqueeze(0)
    with torch.no_grad():
        exact, near = plain(ids).logits, small(ids).logits
    assert 0 < (exact - near).norm() / exact.norm() < 0.15


def test_a_draft_reads_with_it() -> None:
    compressor = Compressor.load(
        "builtin:draft", quantization=INT8, device="cpu", dtype="float32", progress=False
    )
    passages = [
        "She plays chess on Sundays. Badge AK-731 was issued to Mira Tolen. Her room is 214.",
        "Project Halvora began on 3 May 2041. Its budget is 420 crowns.",
    ]
    question = "Which badge was issued to Mira Tolen?"
    context = compressor.compress(question, passages, SpecPC.preset("2026-11", ratio=0.4))
    assert "AK-731" in context.passages[0].text


def test_quantised_weights_are_not_saved(tmp_path: Path) -> None:
    small = load_model(
        "builtin:draft", device="cpu", dtype="float32", quantization=INT8, progress=False
    )
    with pytest.raises(ModelError, match="cannot be saved"):
        small.model.save_pretrained(tmp_path)


def test_this_processor_multiplies_exactly_or_says_so() -> None:
    left = torch.full((64, 64), 127, dtype=torch.int8)
    exact = bool((torch._int_mm(left, -left) == -64 * 127 * 127).all())
    if exact:
        require_exact_products()
    else:
        with pytest.raises(ModelError, match="not exact"):
            require_exact_products()


def test_it_is_for_cpus() -> None:
    model = load_model("builtin:draft", device="cpu", dtype="float32", progress=False).model
    with pytest.raises(ModelError, match="is for CPUs"):
        to_int8(model.to("meta"))  # stands for any other device


def test_four_bits_are_refused() -> None:
    with pytest.raises(ValueError, match='backend="torch" quantises to 8 bits'):
        Quantization.model_validate({"bits": 4, "backend": "torch"})

"""The recipe of the bundled pair: its arithmetic, its labels, its repeatability."""

from __future__ import annotations

import random
import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

import draftsieve.core.evaluation.world as world
from examples.train_builtin.batches import TYPES, Batch, make_batch
from examples.train_builtin.distil import Teacher, distil_loss
from examples.train_builtin.generator import make_row
from examples.train_builtin.grow import grow
from examples.train_builtin.import_weights import lean_weights
from examples.train_builtin.links import LINK_KINDS
from examples.train_builtin.model import (
    SHAPES,
    ChunkedAttention,
    LeanLlama,
    causal_mask,
    link_attention,
    link_loss,
    rope_tables,
)
from examples.train_builtin.questions import MAKERS, index_scene
from examples.train_builtin.scenes import SceneOptions, make_scene

BUILTIN = Path(__file__).parents[1] / "core" / "builtin"
RAG_256 = 3  # number of the phase


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as `train.py` wants it: the pair's tokenizer, the package's sentences."""
    folder = tmp_path_factory.mktemp("work")
    for name in ("tokenizer", "corpus"):
        (folder / name).mkdir()
    tokenizer = (BUILTIN / "draft" / "tokenizer.json").read_bytes()
    (folder / "tokenizer" / "tokenizer.json").write_bytes(tokenizer)
    sentences = Path(world.__path__[0]) / "sentences.txt"
    lines = sentences.read_text(encoding="utf-8").splitlines()[1:]
    for name in ("sentences.txt", "running.txt"):
        (folder / "corpus" / name).write_text("\n".join(lines), encoding="utf-8")
    return folder


@pytest.mark.parametrize("name", ["draft", "target"])
@pytest.mark.parametrize("length", [32, 256])
def test_lean_model_equals_transformers(name: str, length: int) -> None:
    lean = LeanLlama(SHAPES[name])
    lean.load_state_dict(
        lean_weights(load_file(BUILTIN / name / "model.safetensors"), SHAPES[name])
    )
    llama = AutoModelForCausalLM.from_pretrained(BUILTIN / name, dtype=torch.float32)
    ids = torch.randint(4, 4096, (2, length), generator=torch.Generator().manual_seed(1))
    picked = torch.arange(2 * length)
    ours, _ = lean(ids, *rope_tables(SHAPES[name], length), picked)
    theirs = llama(ids).logits.flatten(0, 1)
    torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=1e-4)
    ours.logsumexp(-1).mean().backward()
    theirs.logsumexp(-1).mean().backward()
    torch.testing.assert_close(
        lean.embedding.weight.grad, llama.model.embed_tokens.weight.grad, atol=1e-5, rtol=1e-3
    )


@pytest.mark.parametrize(("length", "chunk"), [(32, 32), (384, 128)])
def test_chunked_attention_equals_sdpa(length: int, chunk: int) -> None:
    torch.manual_seed(0)
    kv, groups, size = 3, 2, 8
    q = torch.randn(kv, groups, length, size, requires_grad=True)
    k, v = (torch.randn(kv, length, size, requires_grad=True) for _ in range(2))
    given = torch.randn(kv, groups, length, size)
    plain = F.scaled_dot_product_attention(q, k[:, None], v[:, None], is_causal=True)
    wanted = torch.autograd.grad(plain, (q, k, v), given)

    def chunks(x: torch.Tensor) -> torch.Tensor:
        x = x.view(kv, groups, length // chunk, chunk, size).transpose(1, 2)
        return x.reshape(kv, length // chunk, groups * chunk, size)

    mask = causal_mask(chunk, groups, torch.float32)
    ours = ChunkedAttention.apply(chunks(q * size**-0.5), k, v, mask)
    torch.testing.assert_close(ours, chunks(plain))
    for got, expected in zip(
        torch.autograd.grad(ours, (q, k, v), chunks(given)), wanted, strict=True
    ):
        torch.testing.assert_close(got, expected)


def test_link_attention_equals_softmax() -> None:
    torch.manual_seed(0)
    batch, kv, groups, chunk, length, size = 2, 2, 3, 4, 8, 5
    q = torch.randn(batch * kv, length // chunk, groups * chunk, size)
    k = torch.randn(batch * kv, length, size)
    links = torch.tensor([[0, 3, 1, 0], [0, 7, 0, 4], [1, 5, 5, 5]])
    got = link_attention(q, k, links, batch)
    for number, (row, asking, found, _) in enumerate(links.tolist()):
        for head in range(kv * groups):
            layer_row = row * kv + head // groups
            query = q[layer_row, asking // chunk, head % groups * chunk + asking % chunk]
            weights = torch.softmax(k[layer_row, : asking + 1] @ query, 0)
            assert got[number, head].exp() == pytest.approx(float(weights[found]), rel=1e-4)


def test_link_loss_wants_one_head_for_a_kind() -> None:
    links = torch.tensor([[0, 9, 1, 4], [0, 9, 2, 4]])
    seen = torch.full((2, 4, 2), -5.0)
    seen[0, 3, 0] = seen[1, 3, 1] = 0.0  # each link has a perfect head, but not the same one
    assert link_loss(seen, links) == pytest.approx(2.5)
    seen[1, 3, 0] = 0.0
    assert link_loss(seen, links) == pytest.approx(0.0)
    assert link_loss(seen, links * torch.tensor([1, 1, 1, 0])) == pytest.approx(5.0)  # wrong layer


def read(tokenizer: Tokenizer, batch: Batch, row: int, start: int, end: int) -> str:
    return str(tokenizer.decode(batch.ids[row][start:end].tolist(), skip_special_tokens=False))


def test_links_point_at_the_answer(work: Path) -> None:
    tokenizer = Tokenizer.from_file(str(work / "tokenizer" / "tokenizer.json"))
    batch = make_batch(0, 1, RAG_256 + 1, 24576, work)
    names = {name: number for number, name in enumerate(LINK_KINDS)}
    assert set(batch.links[:, 3].tolist()) == set(names.values())
    following = dict(zip(batch.picked.tolist(), batch.wanted.tolist(), strict=True))
    length = batch.ids.shape[1]

    def text(row: int, start: int, end: int) -> str:
        return read(tokenizer, batch, row, start, end).strip()

    for row, asking, found, kind in batch.links.tolist():
        assert found < asking
        name, before = LINK_KINDS[kind], text(row, asking - 8, asking + 1)
        if name == "key word":
            asked, seen = (text(row, n, n + 1).lower() for n in (asking, found))
            assert asked.endswith(seen) or seen.endswith(asked)
        elif name == "fact to passage number":
            assert re.search(r"\[\d+\]$", text(row, found - 3, found + 1))
        elif name in ("what follows a quotation", "word beside key words"):
            assert before.endswith("assistant\n...")
        if name in ("value", "rest of value", *LINK_KINDS[7:9]) and not before.endswith("\n["):
            # what is looked at comes next in the answer
            wanted = tokenizer.decode([following[row * length + asking]]).strip()
            assert re.search(r"\n\[\d$", before) or text(row, found, found + 1)[:1] == wanted[:1]


def test_batches_repeat(work: Path) -> None:
    first, again, other = (make_batch(n, 1, RAG_256, 1024, work) for n in (5, 5, 6))
    assert np.array_equal(first.ids, again.ids)
    assert np.array_equal(first.links, again.links)
    assert not np.array_equal(first.ids, other.ids)


def test_natural_text_is_asked_about(work: Path) -> None:
    seen = {
        TYPES[kind] for n in range(6) for kind in make_batch(n, 1, 4, 4096, work).types.tolist()
    }
    assert {"cloze", "quotation", "one-fact"} <= seen


def test_natural_rows_hold_no_facts(work: Path) -> None:
    tokenizer = Tokenizer.from_file(str(work / "tokenizer" / "tokenizer.json"))
    lines = (work / "corpus" / "running.txt").read_text(encoding="utf-8").splitlines()
    made = make_row(random.Random(3), tokenizer, lines, 512, False, "natural")
    assert {kind for kind, _, _ in made.answers} <= {"cloze", "quotation", "unanswerable"}
    assert len(made.answers) > 3
    text = tokenizer.decode(made.ids)
    neighbours = [f"{a} {b}" for a, b in pairwise(lines)]
    assert sum(pair in text for pair in neighbours) > 3


def test_chains_are_answered_step_by_step() -> None:
    rng = random.Random(1)
    turns = []
    while len(turns) < 20:
        scene = make_scene(rng, SceneOptions(2000, natural_share=0.0), [])
        turn = MAKERS["two-hop"][1](rng, index_scene(scene))
        turns += [turn] if turn else []
    for turn in turns:
        way, found = turn.evidence
        assert found.stated.fact.entity == way.stated.fact.value
        assert turn.answer[found.start :] == found.stated.fact.value
        assert turn.answer.startswith(f"{found.stated.fact.entity}: ")
        assert found.stated.fact.entity not in turn.question


def test_the_teacher_answers_as_the_exported_target() -> None:
    teacher = Teacher(BUILTIN / "target", torch.device("cpu"))
    llama = AutoModelForCausalLM.from_pretrained(BUILTIN / "target", dtype=torch.float32)
    tokenizer = Tokenizer.from_file(str(BUILTIN / "target" / "tokenizer.json"))
    sentence = "The ferry to Holm leaves at seven in the morning and returns at noon."
    ids = torch.tensor([tokenizer.encode(sentence).ids[:16]] * 2)
    picked = torch.tensor([3, 15, 30])
    theirs = llama(ids).logits.flatten(0, 1)[picked]
    ours = teacher.logits(ids, picked)  # rounded to bfloat16 on its way
    assert distil_loss(ours, theirs) < 1e-3
    pupil = torch.zeros_like(theirs, requires_grad=True)
    before = distil_loss(pupil, theirs)
    (step,) = torch.autograd.grad(before, pupil)
    assert distil_loss(pupil - step, theirs) < before
    assert distil_loss(pupil[:0], theirs[:0]) == 0


def test_grown_model_gives_the_small_one_s_logits() -> None:
    small = LeanLlama(SHAPES["draft"])
    small.load_state_dict(
        lean_weights(load_file(BUILTIN / "draft" / "model.safetensors"), SHAPES["draft"])
    )
    big = LeanLlama(SHAPES["target"])
    big.load_state_dict(grow(small.state_dict(), SHAPES["draft"], SHAPES["target"]))
    ids = torch.randint(4, 4096, (1, 64), generator=torch.Generator().manual_seed(2))
    picked = torch.arange(64)
    ours, _ = big(ids, *rope_tables(SHAPES["target"], 64), picked)
    theirs, _ = small(ids, *rope_tables(SHAPES["draft"], 64), picked)
    logs = ours.log_softmax(-1), theirs.log_softmax(-1)
    assert F.kl_div(*logs, reduction="batchmean", log_target=True) < 0.01
    assert (ours.argmax(-1) == theirs.argmax(-1)).float().mean() > 0.9

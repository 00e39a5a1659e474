"""The recipe of the bundled pair: its arithmetic, its labels, its repeatability."""

from __future__ import annotations

import json
import random
import re
import sys
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
from examples.train_builtin import model as recipe
from examples.train_builtin import train as training
from examples.train_builtin.batches import TYPES, Batch, make_batch
from examples.train_builtin.card import HERE, curve_note, curve_table, goals_text
from examples.train_builtin.distil import Teacher, distil_loss
from examples.train_builtin.generator import make_row
from examples.train_builtin.grow import grow
from examples.train_builtin.import_weights import lean_weights
from examples.train_builtin.links import LINK_KINDS
from examples.train_builtin.model import (
    SHAPES,
    ChunkedAttention,
    LeanLlama,
    Shape,
    causal_mask,
    link_attention,
    link_loss,
    rope_tables,
)
from examples.train_builtin.questions import MAKERS, index_scene
from examples.train_builtin.scenes import SceneOptions, make_scene

BUILTIN = Path(__file__).parents[1] / "core" / "builtin"
RAG_256 = 3  # number of the phase
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=needs_cuda)]


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


# ---------------------------------------------------------------- train.py


def start(
    monkeypatch: pytest.MonkeyPatch, work: Path, out: Path, device: str, seed: int = 1
) -> training.Run:
    """A run of a tiny model, as the command line makes it."""
    monkeypatch.setitem(SHAPES, "tiny", Shape(hidden=32, layers=4, heads=4, kv_heads=2, ffn=64))
    line = ["train", "--model", "tiny", "--work", str(work), "--out", str(out), "--no-compile"]
    line += ["--tokens", "1e6", "--batch", "1024", "--rate", "5e-2", "--links", "0.3"]
    line += ["--device", device, "--seed", str(seed)]
    monkeypatch.setattr(sys, "argv", line)
    return training.Run(training.parse())


@pytest.mark.parametrize("device", DEVICES)
def test_training_learns_and_goes_on_from_its_checkpoint(
    monkeypatch: pytest.MonkeyPatch, work: Path, tmp_path: Path, device: str
) -> None:
    run = start(monkeypatch, work, tmp_path, device)
    assert {p.device.type for p in run.model.parameters()} == {device}
    muon, adam = run.optimisers
    assert isinstance(muon, torch.optim.Muon)
    assert isinstance(adam, torch.optim.AdamW)
    held = [id(p) for o in (muon, adam) for group in o.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in run.model.parameters())
    run.phase = RAG_256
    before = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
    batch = make_batch(0, 1, RAG_256, 1024, work)
    losses = []
    for _ in range(8):
        run.train_batch(batch)
        with torch.no_grad():
            losses.append(float(run.predict(batch)[0].mean()))
    assert losses[-1] < losses[0] - 0.3
    assert run.link_loss > 0
    after = run.model.state_dict()
    assert not [name for name, tensor in before.items() if torch.equal(tensor, after[name])]
    assert set(run.develop(1)) <= set(TYPES)
    # another start, the same state
    run.save()
    again = start(monkeypatch, work, tmp_path, device, seed=2)
    assert not torch.equal(again.model.embedding.weight, run.model.embedding.weight)
    again.load()
    same = {"rtol": 0, "atol": 0}
    torch.testing.assert_close(again.model.state_dict(), run.model.state_dict(), **same)
    for one, other in zip(again.optimisers, run.optimisers, strict=True):
        torch.testing.assert_close(one.state_dict()["state"], other.state_dict()["state"], **same)
    counters = [[getattr(r, name) for name in training.COUNTERS] for r in (again, run)]
    assert counters[0] == counters[1]
    # and the same next step; sums on CUDA have no fixed order
    following = make_batch(1, 1, RAG_256, 1024, work)
    for each in (run, again):
        each.train_batch(following)
    near = same if device == "cpu" else {"rtol": 0, "atol": 1e-4}
    torch.testing.assert_close(again.model.state_dict(), run.model.state_dict(), **near)
    assert (again.step, again.tokens) == (run.step, run.tokens) == (9, 9 * 1024)


@pytest.mark.parametrize("device", DEVICES)
def test_processes_have_a_fitting_backend(
    monkeypatch: pytest.MonkeyPatch, work: Path, tmp_path: Path, device: str
) -> None:
    begun: list[str] = []
    monkeypatch.setattr(training.distributed, "init_process_group", begun.append)
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    run = start(monkeypatch, work, tmp_path, device)
    assert begun == ["nccl" if device == "cuda" else "gloo"]
    assert run.device == torch.device("cuda:0" if device == "cuda" else "cpu")


def test_every_process_has_its_own_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert training.own_device("cuda", 8) == torch.device("cuda:3")
    assert training.own_device("cuda", 1) == torch.device("cuda")
    assert training.own_device("cpu", 8) == torch.device("cpu")


def test_attention_weights_of_autocast_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """There softmax gives float32, and the backward pass must still multiply equal types."""
    torch.manual_seed(0)
    parts = [torch.randn(2, 8, 4, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
    mask = causal_mask(4, 1, torch.bfloat16)
    softmax = torch.softmax

    def gradients() -> tuple[torch.Tensor, ...]:
        q, k, v = parts
        out = ChunkedAttention.apply(q.view(2, 2, 4, 4), k, v, mask)
        return torch.autograd.grad(out.float().sum(), parts)

    plain = gradients()
    monkeypatch.setattr(recipe.torch, "softmax", lambda x, dim: softmax(x, dim, torch.float32))
    torch.testing.assert_close(gradients(), plain, rtol=0.02, atol=0.02)


# ---------------------------------------------------------------- the model card


def test_the_card_holds_what_was_measured() -> None:
    card = (BUILTIN / "MODEL_CARD.md").read_text(encoding="utf-8")
    lines = (HERE / "learning_curve.jsonl").read_text(encoding="utf-8").splitlines()
    curve = [json.loads(line) for line in lines]
    assert curve_table(curve) in card
    assert curve_note(curve) in card
    results = json.loads((HERE / "results.json").read_text(encoding="utf-8"))
    goals = goals_text(results)
    assert goals in card
    # one cell that falls short more is one more that is named
    cell = results["models"]["target"]["two-hop, 1,000 tokens"]
    named = "two-hop, 1,000 tokens (target 80.0 %, goal 85 %)"
    assert named not in " ".join(goals.split())
    cell["exact"] = 0.8
    assert named in " ".join(goals_text(results).split())

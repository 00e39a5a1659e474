"""Learned head weights, candidates beyond the paper, and draft against target attention."""

from __future__ import annotations

import json
import math
from copy import deepcopy
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from draftsieve import Compressor, Engine, Generation, Prompt, SpecKVPC, SpecPC
from draftsieve.core.errors import (
    ConfigError,
    MissingExtraError,
    ModelError,
    ModelNotFoundError,
    PromptError,
)
from draftsieve.core.evaluation import scorers
from draftsieve.core.evaluation.calibration import SEED, calibrate
from draftsieve.core.evaluation.tasks import EvalItem, make_items
from draftsieve.core.models.loading import fingerprint
from draftsieve.core.specpc.draft_scores import read_draft, reduce_rows
from draftsieve.core.specpc.head_weights import (
    HeadWeights,
    head_weights,
    norms_of,
    read_heads,
    weights_path,
)
from draftsieve.integrations import cli

from . import families
from .adapters_fixtures import QUESTION, TEXTS, tiny_compressor, tiny_model, tiny_tokenizer


def weights_for(model: Any, seed: int = 0) -> HeadWeights:
    config = model.config
    generator = torch.Generator().manual_seed(seed)
    heads = torch.randn(config.num_hidden_layers, config.num_attention_heads, generator=generator)
    return HeadWeights(heads, -1.0, fingerprint(model))


def eager_attention(name: str, ids: torch.Tensor) -> torch.Tensor:
    """(layers, heads, tokens, tokens) of a plain pass."""
    with torch.no_grad():
        out = families.build(name, "eager")(input_ids=ids, output_attentions=True)
    return torch.stack(out.attentions)[:, 0]


# ---------------------------------------------------------------- reading


@pytest.mark.parametrize(("name", "implementation"), families.CASES)
def test_heads_are_those_of_an_eager_pass(name: str, implementation: str) -> None:
    ids = families.ids(45)
    weights = torch.linspace(0, 1, 9)
    found = read_heads(families.build(name, implementation), ids[0], weights)
    expected = (eager_attention(name, ids)[:, :, -9:] * weights[:, None]).amax(2)
    torch.testing.assert_close(found, expected, rtol=2e-4, atol=1e-6)


def test_scores_are_the_logistic_model_of_weighed_heads(tmp_path: Path) -> None:
    model = families.build("llama", "sdpa")
    learned = weights_for(model)
    path = learned.save(tmp_path / "heads.json")
    options = SpecPC(window_size=9, head_weights=path)
    prompts = [families.ids(length, seed=length)[0] for length in (45, 30)]
    found = read_draft(model, prompts, options, lookahead_tokens=4)
    plain = read_draft(model, prompts, SpecPC(window_size=9), lookahead_tokens=4)
    for prompt, row, other in zip(prompts, found, plain, strict=True):
        attention = eager_attention("llama", prompt[None])[:, :, -9:]  # layers, heads, rows, keys
        strongest = (attention * torch.linspace(0, 1, 9)[:, None]).amax(2)
        logits = (strongest * learned.heads[..., None]).sum((0, 1)) - 1.0
        expected = torch.tensor([math.log1p(math.exp(value)) for value in logits.tolist()])
        torch.testing.assert_close(row.scores, expected, rtol=2e-4, atol=1e-6)
        assert row.lookahead_ids.tolist() == other.lookahead_ids.tolist()
        assert not torch.allclose(row.scores, other.scores)


def test_mean_max_is_the_mean_of_heads_then_the_maximum() -> None:
    generator = torch.Generator().manual_seed(3)
    probabilities = torch.rand(2, 3, 4, 5, generator=generator)
    weights = torch.rand(2, 4, generator=generator)
    found = reduce_rows(probabilities, weights, "mean-max")
    for row in range(2):
        for key in range(5):
            means = [
                sum(float(probabilities[row, h, r, key]) for h in range(3)) / 3 * weights[row, r]
                for r in range(4)
            ]
            assert float(found[row, key]) == pytest.approx(float(max(means)), rel=1e-5)
    model = families.build("llama", "eager")
    options = SpecPC(window_size=6, reduction="mean-max", weighted_query=False, starting_layer=1)
    ids = families.ids(30)
    read = read_draft(model, ids, options, lookahead_tokens=1)[0]
    expected = eager_attention("llama", ids)[1:, :, -6:].mean(1).amax((0, 1))
    torch.testing.assert_close(read.scores, expected, rtol=2e-4, atol=1e-6)


# ---------------------------------------------------------------- files


def test_weights_come_back_from_a_file_and_stay_with_their_draft(tmp_path: Path) -> None:
    model = tiny_model(32, seed=1)
    tiny = weights_for(model)
    assert torch.equal(HeadWeights.load(tiny.save(tmp_path / "a.json")).heads, tiny.heads)
    model.config.name_or_path = str(tmp_path)
    tiny.save(tmp_path / "head_weights.json")
    assert weights_path(model, "calibrated") == tmp_path / "head_weights.json"
    assert head_weights(model, "calibrated").bias == -1.0
    with pytest.raises(ModelError, match="learned for another draft"):
        head_weights(tiny_model(32, seed=5), tmp_path / "a.json")
    with pytest.raises(ModelNotFoundError, match="draftsieve calibrate"):
        head_weights(model, tmp_path / "none.json")
    other = tiny_model(32, seed=1)
    other.config.name_or_path = "hub/name"
    with pytest.raises(ModelError, match="looks beside the draft, but 'hub/name' is no folder"):
        head_weights(other, "calibrated")


def test_missing_weights_raise_also_where_failures_may_fall_back(tmp_path: Path) -> None:
    method = SpecPC(ratio=0.5, head_weights=str(tmp_path / "none.json"))
    with pytest.raises(ModelNotFoundError, match="draftsieve calibrate"):
        tiny_compressor().compress(QUESTION, TEXTS, method, on_error="original")


@pytest.mark.parametrize("text", ["{", "[]", '{"heads": [1], "bias": 0, "weights": ""}'])
def test_files_that_hold_something_else_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ModelError, match="holds no head weights"):
        HeadWeights.load(tmp_path / "x.json")


# ---------------------------------------------------------------- learning


class OneHead:
    """Stands for `read_heads`: head 2 of layer 0 looks at the evidence, the others at random."""

    def __init__(self, items: list[EvalItem], compressor: Compressor) -> None:
        self.known = {}
        for item in items:
            tokens = compressor.encoder.encode(item.prompt())
            self.known[tokens.ids.numpy().tobytes()] = item, tokens

    def __call__(self, model: Any, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        item, tokens = self.known[ids.numpy().tobytes()]
        found = torch.rand(2, 4, len(ids), generator=torch.Generator().manual_seed(len(ids)))
        for part in item.evidence:
            place = part.sentence
            inside = (tokens.start < place.end) & (tokens.end > place.start)
            found[0, 2] += 0.8 * ((tokens.passage == place.passage) & inside)
        return found


def test_the_head_that_finds_evidence_is_learned(monkeypatch: pytest.MonkeyPatch) -> None:
    compressor = tiny_compressor()
    items = make_items(("one-key", "unanswerable"), 350, 24, compressor.count_tokens, seed=7)
    where = "draftsieve.core.evaluation.calibration.read_heads"
    monkeypatch.setattr(where, OneHead(items, compressor))
    found = calibrate(compressor, items, progress=False)
    assert found.weights.heads.shape == (2, 4)
    assert int(found.weights.heads.abs().argmax()) == 2
    assert found.weights.heads[0, 2] > 0
    assert found.items == 10  # of 12 with evidence, two are kept for the check
    assert found.precision > 0.5 > found.precision_before
    assert found.weights.weights == fingerprint(compressor.model)
    again = calibrate(compressor, items, progress=False)
    assert torch.equal(again.weights.heads, found.weights.heads)
    about = {"items": 10, "draft": found.weights.about["draft"], "source": "generated", "seed": 7}
    assert found.weights.about == about
    # what a data file gave is never called generated
    natural = [replace(item, task="squad", id=f"squad-350-3-{item.id}") for item in items]
    about = calibrate(compressor, natural, progress=False).weights.about
    assert (about["source"], about["seed"]) == ("squad", 3)
    found = calibrate(compressor, natural + items, source="my.json", progress=False)
    assert (found.weights.about["source"], found.weights.about["seed"]) == ("my.json", [3, 7])


def test_calibration_says_what_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    compressor = tiny_compressor()
    items = make_items(("one-key",), 350, 2, compressor.count_tokens)
    with pytest.raises(ConfigError, match="Only 2 items"):
        calibrate(compressor, items, progress=False)
    monkeypatch.setattr(scorers, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"draftsieve\[eval\]"):
        calibrate(compressor, items, progress=False)


def test_the_command_saves_beside_the_draft(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    draft = tmp_path / "draft"
    tiny_model(32, seed=1).save_pretrained(draft)
    tiny_tokenizer().save_pretrained(draft)
    options = ["--draft", str(draft), "--length", "300", "--items", "20", "--no-progress"]
    assert cli.main(["calibrate", *options]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"{draft / 'head_weights.json'}: learned from")
    row = json.loads((draft / "head_weights.json").read_text())
    assert row["about"]["draft"] == "draft"
    assert (row["about"]["source"], row["about"]["seed"]) == ("generated", SEED)
    compressor = Compressor.load(draft, progress=False)
    method = SpecPC(ratio=0.4, unit="sentence", head_weights="calibrated")
    found = compressor.compress(QUESTION, TEXTS, method)
    assert found.stats.compressed
    assert any(span.score > 0 for span in found.spans)


def test_the_bundled_draft_takes_the_weights_beside_it() -> None:
    compressor = Compressor.load("builtin:draft", device="cpu", progress=False)
    found = head_weights(compressor.model, "calibrated")  # raises for another fingerprint
    assert found.weights == fingerprint(compressor.model)
    assert (found.about["source"], found.about["seed"]) == ("generated", SEED)
    config = compressor.model.config
    assert found.heads.shape == (config.num_hidden_layers, config.num_attention_heads)
    method = SpecPC(ratio=0.5, unit="sentence", head_weights="calibrated")
    assert compressor.compress(QUESTION, TEXTS, method).stats.compressed


# ---------------------------------------------------------------- original positions


@cache
def engine() -> Engine:
    return Engine(
        tiny_model(64, seed=2),
        tiny_tokenizer(),
        draft_model=tiny_model(32, seed=1),
        draft_tokenizer=tiny_tokenizer(),
    )


def test_kept_tokens_stand_where_they_stood() -> None:
    few = Generation(max_new_tokens=4)
    method = SpecPC(ratio=0.4, positions="keep", unit="sentence")
    answer = engine().answer(QUESTION, TEXTS, method=method, generation=few)
    assert answer.context is not None
    tokens = tiny_compressor().encoder.encode(Prompt.from_question(QUESTION, TEXTS))
    stays = tokens.protected.clone()
    for span in answer.spans:
        inside = (tokens.start < span.end) & (tokens.end > span.start)
        stays |= (tokens.passage == span.passage_index) & inside
    places = stays.nonzero().squeeze(1)
    assert answer.usage.prompt_tokens == len(places) < len(tokens)
    ids, said = tokens.ids[places], []
    places = places.tolist()
    for _ in range(4):
        with torch.no_grad():
            out = engine().target(
                input_ids=ids[None],
                position_ids=torch.tensor([places]),
                attention_mask=torch.ones(1, len(ids)),
            )
        said.append(int(out.logits[0, -1].argmax()))
        ids, places = torch.cat([ids, torch.tensor(said[-1:])]), [*places, places[-1] + 1]
    assert answer.text == tiny_tokenizer().decode(said)
    reset = engine().answer(
        QUESTION, TEXTS, method=SpecPC(ratio=0.4, unit="sentence"), generation=few
    )
    assert reset.spans
    assert reset.text != answer.text


def test_positions_hold_in_batches_and_switch_drafting_off() -> None:
    few = Generation(max_new_tokens=4)
    method = SpecPC(ratio=0.4, positions="keep")
    questions, texts = [QUESTION, "Who lit the lamp?"], [TEXTS, TEXTS[1:]]
    pairs = zip(questions, texts, strict=True)
    alone = [engine().answer(q, t, method=method, generation=few).text for q, t in pairs]
    together = engine().answer_many(questions, texts, method=method, generation=few)
    assert [answer.text for answer in together] == alone
    drafted = Generation(max_new_tokens=4, drafting="lookup")
    answer = engine().answer(QUESTION, TEXTS, method=method, generation=drafted)
    assert answer.text == alone[0]
    assert answer.drafting is not None
    assert "old positions" in str(answer.drafting.note)
    whole = engine().answer(QUESTION, TEXTS, method=SpecPC(ratio=1.0, positions="keep"))
    assert whole.text == engine().answer(QUESTION, TEXTS, method=None).text


def test_positions_of_bare_prompts() -> None:
    ids = torch.randint(5, 300, (1, 60), generator=torch.Generator().manual_seed(1))
    method = SpecPC(capacity=30, window_size=8, kernel_size=4, positions="keep")
    trace = engine().trace(ids, method, max_new_tokens=1)
    assert trace.kept_prompt_indices is not None
    places = trace.kept_prompt_indices
    with torch.no_grad():
        out = engine().target(
            input_ids=ids[:, places],
            position_ids=places[None],
            attention_mask=torch.ones(1, len(places)),
        )
    assert trace.output_ids.tolist() == [int(out.logits[0, -1].argmax())]


def test_positions_that_cannot_be_kept_are_refused() -> None:
    with pytest.raises(ConfigError, match="belongs to SpecPC alone"):
        SpecKVPC(specpc=SpecPC(positions="keep"))
    long = [" ".join(TEXTS)] * 24
    method = SpecPC(capacity=300, positions="keep")
    with pytest.raises(PromptError, match="knows positions below 1024 only"):
        engine().answer(QUESTION, long, method=method)


def test_weights_are_known_again_in_another_precision_but_not_by_another_model() -> None:
    model = tiny_model(32, seed=1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 1 and "norm" in name:
                weight.uniform_(0.5, 1.5)
    kept = replace(weights_for(model), family=norms_of(model))
    rounded = deepcopy(model).to(torch.bfloat16)
    with torch.no_grad():
        for weight in rounded.parameters():
            if weight.dim() > 1:  # as quantising does: the matrices change
                weight.add_(0.01 * torch.randn_like(weight))
    assert kept.weights != fingerprint(rounded)
    assert kept.fit(model)
    assert kept.fit(rounded)
    assert not kept.fit(tiny_model(32, seed=1))  # all its norms are 1
    assert not kept.fit(tiny_model(32, seed=1, layers=3))
    assert not replace(kept, family=()).fit(rounded)

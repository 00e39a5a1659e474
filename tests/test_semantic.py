"""An embedder's opinion beside the draft's: the formula, what is asked, and what can go wrong."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from draftsieve import ConfigError, Prompt, SpecKV, SpecKVPC, SpecPC
from draftsieve.core.errors import ModelError, ModelNotFoundError
from draftsieve.core.evaluation.methods import METHODS, find_methods
from draftsieve.core.evaluation.runner import Grid
from draftsieve.core.evaluation.shared import Bench
from draftsieve.core.models.loading import LoadedModel, fingerprint
from draftsieve.core.specpc.bm25 import bm25
from draftsieve.core.specpc.head_weights import HeadWeights, settled
from draftsieve.core.specpc.mixing import mixed
from draftsieve.core.specpc.pipeline import _say_once
from draftsieve.core.specpc.ranking import rank_units
from draftsieve.core.specpc.units import unit_spans

from .adapters_fixtures import (
    QUESTION,
    TEXTS,
    tiny_compressor,
    tiny_engine,
    tiny_model,
    tiny_tokenizer,
)
from .embedders import Pair, Words, hashed, write_encoder

SENTENCES = [text[a:b] for text in TEXTS for a, b in unit_spans(text, "sentence", None)]


def half(embedder: Any = None, **options: Any) -> SpecPC:
    """Half of what a sentence counts comes from the embedder."""
    return SpecPC(
        **{"ratio": 0.4, "unit": "sentence", "semantic_weight": 0.5} | options, embedder=embedder
    )


def z(values: Sequence[float]) -> list[float]:
    return [(value - fmean(values)) / pstdev(values) for value in values]


ONE = np.zeros(0)  # passages that no share is given to


def naive(
    worth: Sequence[float], words: Sequence[float], near: Sequence[float], ws: float, wl: float
) -> list[float]:
    """Sentence by sentence, those without tokens last."""
    inside = [index for index, value in enumerate(worth) if value >= 0]
    draft = z([float(np.log(worth[index] + 1e-6)) for index in inside])
    lexical, semantic = z([words[i] for i in inside]), z([near[i] for i in inside])
    found = [-np.inf] * len(worth)
    for place, index in enumerate(inside):
        found[index] = (1 - ws - wl) * draft[place] + ws * semantic[place] + wl * lexical[place]
    return found


@pytest.mark.parametrize(("ws", "wl"), [(0.5, 0.0), (1.0, 0.0), (0.25, 0.25), (0.6, 0.4)])
def test_shares_are_of_z_scores(ws: float, wl: float) -> None:
    rng = np.random.default_rng(4)
    worth, words, near = rng.random(9) ** 6, 5 * rng.random(9), 0.6 + 0.1 * rng.random(9)
    worth[2], worth[5] = -1.0, 0.0  # a unit without tokens, and one that nothing looked at
    options = half(ratio=0.5, semantic_weight=ws, lexical_weight=wl)
    found = mixed(worth, options, words if wl else None, near, ONE)
    assert found == pytest.approx(naive(worth, words, near, ws, wl))
    assert found[2] == -np.inf
    scaled = mixed(
        np.where(worth < 0, worth, worth), options, 10 * words if wl else None, near + 3, ONE
    )
    assert scaled == pytest.approx(found)  # only what is far from the mean counts


def test_equal_scores_say_nothing() -> None:
    equal, near = np.full(4, 0.3), np.array([0.1, 0.4, 0.2, 0.3])
    assert np.argsort(-mixed(equal, half(), None, near, ONE)).tolist() == [1, 3, 2, 0]
    assert mixed(equal, half(), None, np.ones(4), ONE).tolist() == [0.0] * 4
    assert mixed(equal[:1], half(), None, near[:1], ONE).tolist() == [0.0]
    assert mixed(equal[:0], half(), None, near[:0], ONE).tolist() == []
    assert mixed(np.array([-1.0]), half(), None, near[:1], ONE).tolist() == [-np.inf]


def test_without_an_embedder_the_formula_is_the_old_one() -> None:
    rng = np.random.default_rng(2)
    worth, words = rng.random(6), rng.random(6)
    worth[3] = -1.0
    for weight in (0.25, 1.0):
        options = SpecPC(unit="sentence", lexical_weight=weight, semantic_weight=0.0)
        expected = (1 - weight) * worth / worth.max() + weight * words / words.max()
        expected[3] = -1.0
        assert mixed(worth, options, words, None, ONE).tolist() == expected.tolist()
    assert mixed(worth, SpecPC(unit="sentence"), None, None, ONE) is worth


def test_units_are_ranked_by_the_mixture() -> None:
    prompt = Prompt.from_question(QUESTION, TEXTS)
    tokens = tiny_compressor().encoder.encode(prompt)
    scores = torch.rand(len(tokens), generator=torch.Generator().manual_seed(1)) * 0.01
    spans = [
        (index, *span)
        for index, text in enumerate(TEXTS)
        for span in unit_spans(text, "sentence", None)
    ]
    worth = []
    for index, first, last in spans:
        inside = (tokens.passage == index) & (tokens.start < last) & (tokens.end > first)
        worth.append(float(scores[inside & ~tokens.protected].max()))
    asked, rows = np.array(hashed(QUESTION)), [np.array(hashed(text)) for text in SENTENCES]
    near = [float(r @ asked / np.linalg.norm(r) / np.linalg.norm(asked)) for r in rows]
    for ws, wl in ((0.5, 0.0), (0.3, 0.2), (1.0, 0.0)):
        options = half(Words(), semantic_weight=ws, lexical_weight=wl)
        total = naive(worth, bm25(QUESTION, SENTENCES), near, ws, wl)
        order = sorted(range(len(spans)), key=lambda index: -total[index])

        def cosine(question: str, texts: Sequence[str]) -> torch.Tensor:
            assert (question, list(texts)) == (QUESTION, SENTENCES)
            return torch.tensor(near)

        ranked = rank_units(TEXTS, tokens, scores, options, QUESTION, cosine)
        found = list(zip(ranked.passage, ranked.start, ranked.end, strict=True))
        assert found == [spans[index] for index in order]


# ---------------------------------------------------------------- requests


def test_an_embedder_alone_chooses_what_it_finds_near() -> None:
    for question, passage in ((QUESTION, 0), ("Who needs a ticket at the harbour office?", 1)):
        context = tiny_compressor().compress(question, TEXTS, half(Words(), semantic_weight=1.0))
        assert max(context.sizes, key=lambda size: size.compressed_tokens) is context.sizes[passage]
        assert context.stats.note is None


@pytest.mark.parametrize("unit", ["sentence", "passage"])
def test_sentences_or_passages_are_asked_for_once(unit: Any) -> None:
    words, pair = Words(), Pair()
    found = [tiny_compressor().compress(QUESTION, TEXTS, half(words, unit=unit)) for _ in range(2)]
    assert found[0].spans == found[1].spans
    assert words.asked == [*(SENTENCES if unit == "sentence" else TEXTS), QUESTION]
    other = tiny_compressor().compress(QUESTION, TEXTS, half(pair, unit=unit))
    assert other.spans == found[0].spans
    assert pair.documents == words.asked[:-1]
    assert pair.questions == [QUESTION]


def test_several_prompts_and_an_engine_get_what_one_prompt_gets() -> None:
    questions = (QUESTION, "When does the museum open?")
    prompts = [Prompt.from_question(question, TEXTS) for question in questions]
    method = half(Words())
    together = tiny_compressor().compress_prompts(prompts, method)
    alone = [tiny_compressor().compress_prompt(prompt, method) for prompt in prompts]
    assert [c.spans for _, c in together] == [c.spans for _, c in alone]
    answer = tiny_engine().answer(QUESTION, TEXTS, method=method)
    assert answer.context is not None
    assert answer.context.spans == tiny_compressor().compress(QUESTION, TEXTS, method).spans
    both = SpecKVPC(specpc=method, speckv=SpecKV(ratio=0.2))
    assert tiny_engine().answer(QUESTION, TEXTS, method=both).spans


async def test_asynchronous_calls_embed_in_the_worker() -> None:
    import threading

    threads = set()

    def embed(texts: Sequence[str]) -> list[list[float]]:
        threads.add(threading.get_ident())
        return [hashed(text) for text in texts]

    found = await tiny_compressor().acompress(QUESTION, TEXTS, half(embed))
    assert found.spans == tiny_compressor().compress(QUESTION, TEXTS, half(Words())).spans
    assert len(threads) == 1
    assert threading.get_ident() not in threads


def test_nothing_is_embedded_where_nothing_has_to_go() -> None:
    words = Words()
    whole = tiny_compressor().compress(QUESTION, TEXTS, half(words, ratio=1.0))
    assert not whole.stats.compressed
    none = half(words, semantic_weight=0.0)
    assert tiny_compressor().compress(QUESTION, TEXTS, none).stats.compressed
    assert words.asked == []


def test_a_folder_is_an_embedder(tmp_path: Path) -> None:
    folder = write_encoder(tmp_path)
    found = tiny_compressor().compress(QUESTION, TEXTS, half(str(folder), semantic_weight=1.0))
    loaded = tiny_compressor().compress(QUESTION, TEXTS, half(folder, semantic_weight=1.0))
    assert found.spans == loaded.spans
    for on_error in ("raise", "original"):  # no fault of a single request
        with pytest.raises(ModelNotFoundError, match="There is no model"):
            tiny_compressor().compress(
                QUESTION,
                TEXTS,
                half(tmp_path / "no"),
                on_error=on_error,  # type: ignore[arg-type]
            )


def test_a_missing_embedder_is_left_out_and_told(caplog: pytest.LogCaptureFixture) -> None:
    _say_once.cache_clear()
    plain = {"ratio": 0.4, "unit": "sentence", "lexical_weight": 0.25}
    expected = tiny_compressor().compress(QUESTION, TEXTS, SpecPC(**plain))
    with caplog.at_level(logging.INFO, logger="draftsieve"):
        for _ in range(2):
            found = tiny_compressor().compress(
                QUESTION, TEXTS, SpecPC(**plain, semantic_weight=0.5)
            )
    assert found.spans == expected.spans
    assert "semantic_weight=0.5 has no effect without an embedder" in (found.stats.note or "")
    told = [record for record in caplog.records if "without an embedder" in record.message]
    assert [record.levelname for record in told] == ["INFO"]
    assert expected.stats.note is None


def test_a_wrong_embedder_is_an_error_or_leaves_the_passages(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def embed(texts: Sequence[str]) -> list[list[float]]:
        return [[1.0]] if texts == [QUESTION] else [[1.0, 2.0]] * len(texts)

    with pytest.raises(ModelError, match="different widths"):
        tiny_compressor().compress(QUESTION, TEXTS, half(embed))
    with caplog.at_level(logging.WARNING, logger="draftsieve"):
        found = tiny_compressor().compress(QUESTION, TEXTS, half(embed), on_error="original")
    assert [passage.text for passage in found.passages] == TEXTS
    assert "different widths" in (found.stats.fallback or "")
    assert "passages stay whole" in caplog.text


def test_one_request_fails_alone() -> None:
    def embed(texts: Sequence[str]) -> list[list[float]]:
        return [[0.0] if "museum" in text else [1.0] for text in texts]

    prompts = [Prompt.from_question(QUESTION, TEXTS[:2]), Prompt.from_question(QUESTION, TEXTS)]
    fine, failed = tiny_compressor().compress_prompts(prompts, half(embed), on_error="original")
    assert fine[1].stats.fallback is None
    assert "of zeros for the text 'The museum" in (failed[1].stats.fallback or "")


# ---------------------------------------------------------------- evaluation


def bench(**options: Any) -> Bench:
    model, tokenizer = tiny_model(32, seed=1), tiny_tokenizer()
    loaded = LoadedModel(model, tokenizer, "tiny")
    return Bench(loaded, loaded, max_new_tokens=4, **options)


def test_the_evaluation_reads_once_for_all_shares(tmp_path: Path) -> None:
    from draftsieve.core.evaluation.tasks import make_item

    folder = write_encoder(tmp_path)
    measured = bench(embedder=str(folder))
    names = [
        "specpc:unit=sentence",
        "specpc:unit=sentence,semantic_weight=0.5",
        f"specpc:unit=sentence,semantic_weight=1.0,embedder={folder}",
    ]
    methods = find_methods(names)
    for method in methods:
        assert method.check is not None
        method.check(measured)
    item = make_item("many-keys", 300, 0, tiny_compressor().count_tokens)
    case = measured.open(item)
    kept = [method.run(case, 0.3).kept for method in methods]
    reads = [key for key in measured.once._found if key[0] == "read"]  # type: ignore[index]
    assert len(reads) == 1
    alone = find_methods([f"specpc:unit=sentence,semantic_weight=0.5,embedder={folder}"])[0]
    assert alone.run(bench().open(item), 0.3).kept == kept[1]
    assert kept[0] != kept[2]


def test_the_evaluation_tells_embedders_apart(tmp_path: Path) -> None:
    grid = Grid(methods=("none",), items=1, tasks=("many-keys",))
    described = [grid.describe(bench()), grid.describe(bench(embedder="a"))]
    assert "embedder" not in described[0]
    assert described[1]["embedder"] == "a"
    (missing,) = find_methods(["specpc:unit=sentence,semantic_weight=0.5,embedder=./nowhere"])
    assert missing.check is not None
    with pytest.raises(ModelNotFoundError):
        missing.check(bench())
    with pytest.raises(ConfigError, match='unit is "token"'):
        find_methods(["specpc:semantic_weight=0.5"])
    assert "specpc" in METHODS


def test_passages_lift_their_sentences_by_shares_of_z_scores() -> None:
    worth = np.array([0.9, 0.1, 0.3, -1.0, 0.2])
    passage, likely = np.array([0, 0, 1, 1, 2]), np.array([-2.0, -2.0, -1.0, -1.0, -4.0])
    inside = [0, 1, 2, 4]
    draft = z([float(np.log(worth[i] + 1e-6)) for i in inside])
    best = z(
        [max(draft[j] for j, o in enumerate(inside) if passage[o] == passage[i]) for i in inside]
    )
    for share in (0.0, 0.25, 1.0):
        for asked in (0.0, 0.5):
            options = SpecPC(
                unit="sentence",
                passages_apart=True,
                passage_weight=share,
                likelihood_weight=asked,
            )
            found = mixed(worth, options, None, None, passage, likely if asked else None)
            if not share and not asked:
                assert found is worth
                continue
            both = [(1 - share) * d + share * b for d, b in zip(draft, best, strict=True)]
            if asked:
                said = z([float(likely[i]) for i in inside])
                first = z(both) if share else both
                both = [(1 - asked) * b + asked * s for b, s in zip(z(first), said, strict=True)]
            assert found[inside] == pytest.approx(both)
            assert found[3] == -np.inf


def test_the_newest_preset_is_the_older_one_for_a_draft_without_weights(tmp_path: Path) -> None:
    draft = tiny_compressor().model
    newest, older = SpecPC.preset("2026-12", ratio=0.3), SpecPC.preset("2026-11", ratio=0.3)
    assert settled(newest, draft) == older.model_copy(update={"semantic_weight": 0.5})
    changed = SpecPC.preset("2026-12", ratio=0.3, lexical_weight=0.7, semantic_weight=0.1)
    assert settled(changed, draft).lexical_weight == 0.7
    assert settled(changed, draft).semantic_weight == 0.1
    alone = SpecPC.preset("2026-12", ratio=0.3, semantic_weight=0.9)
    assert settled(alone, draft).lexical_weight == pytest.approx(0.1)
    assert settled(older, draft) is older
    folder = tmp_path / "draft"
    draft.save_pretrained(folder)
    known = LlamaForCausalLM.from_pretrained(folder)
    heads = torch.zeros(2, 4)
    heads[1, 1] = 1.0
    HeadWeights(heads, 0.0, fingerprint(known), rows="mean").save(folder / "head_weights.json")
    assert settled(newest, known) == newest.model_copy(update={"head_weights": "calibrated"})


def test_presets_fit_other_units() -> None:
    assert SpecPC.preset("2026-12", unit="token").passage_weight == 0.0
    assert SpecPC.preset("2026-12", unit="token").semantic_weight == 0.0
    assert SpecPC.preset("2026-12", unit="passage").likelihood_weight == 0.5
    with pytest.raises(ConfigError, match='set it to "sentence"'):
        SpecPC.preset("2026-12", unit="passage", passage_weight=0.5)

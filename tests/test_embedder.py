"""Vectors of any embedder: their form, what is remembered of them, and what is no vector."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import BaseModel

from draftsieve import ConfigError, SpecKVPC, SpecPC
from draftsieve.core.errors import ModelError, ModelNotFoundError, RequestTimeoutError
from draftsieve.core.models import embedder as module
from draftsieve.core.models.embedder import TextVectors, cosines
from draftsieve.core.runtime.limits import deadline_after, until

from .adapters_fixtures import QUESTION, TEXTS
from .embedders import Pair, Words, hashed, write_encoder

SENTENCE = {"unit": "sentence", "semantic_weight": 0.5}


def naive(question: str, texts: Sequence[str]) -> list[float]:
    """Cosines of the hashed words, one by one in float64."""
    asked = np.array(hashed(question))
    rows = [np.array(hashed(text)) for text in texts]
    return [float(row @ asked / np.linalg.norm(row) / np.linalg.norm(asked)) for row in rows]


FORMS: dict[str, Callable[[list[list[float]]], Any]] = {
    "lists": lambda rows: rows,
    "generator": lambda rows: (row for row in rows),
    "numpy": np.array,
    "numpy rows": lambda rows: [np.array(row, dtype=np.float32) for row in rows],
    "torch": lambda rows: torch.tensor(rows, dtype=torch.float64, requires_grad=True),
    "half": lambda rows: [torch.tensor(row, dtype=torch.bfloat16) for row in rows],
    "integers": lambda rows: np.array(rows).astype(int),
}


@pytest.mark.parametrize("form", FORMS)
def test_rows_of_anything_are_vectors(form: str) -> None:
    found = cosines(lambda texts: FORMS[form](list(map(hashed, texts))), QUESTION, TEXTS)
    assert found.dtype == torch.float32
    assert found.tolist() == pytest.approx(naive(QUESTION, TEXTS), abs=1e-5)
    assert not found.requires_grad


def test_every_text_is_asked_once_of_an_embedder() -> None:
    words, pair = Words(), Pair()
    for embed in (words, pair):
        for texts in (TEXTS, [*TEXTS[:2], "new", *TEXTS[:1]], TEXTS):
            assert cosines(embed, QUESTION, texts).tolist() == pytest.approx(
                naive(QUESTION, texts), abs=1e-5
            )
    assert words.asked == [*TEXTS, QUESTION, "new"]
    assert pair.documents == [*TEXTS, "new"]
    assert pair.questions == [QUESTION]
    other = Words()
    cosines(other, QUESTION, TEXTS)  # another embedder has vectors of its own
    assert other.asked == [*TEXTS, QUESTION]
    assert cosines(words, QUESTION, []).shape == (0,)


def test_a_question_that_is_a_document_too_has_two_vectors() -> None:
    pair = Pair()
    cosines(pair, TEXTS[0], TEXTS)
    assert (pair.documents, pair.questions) == (TEXTS, TEXTS[:1])


def test_bound_methods_and_short_lived_embedders() -> None:
    words = Words()
    for _ in range(2):
        cosines(words.__call__, QUESTION, TEXTS)  # a new object each time
    assert words.asked == [*TEXTS, QUESTION]
    kept = len(module._KNOWN)
    del words
    gc.collect()
    assert len(module._KNOWN) == kept - 1

    class Slots:
        __slots__ = ()

        def __call__(self, texts: Sequence[str]) -> list[list[float]]:
            return [hashed(text) for text in texts]

    cosines(Slots(), QUESTION, TEXTS)  # cannot be watched, so nothing is kept for it
    assert len(module._KNOWN) == kept - 1


def test_the_least_used_are_forgotten_first() -> None:
    words = Words()
    vectors = TextVectors(room=3 * 4 * len(hashed("")))  # three rows of float32
    vectors.cosines(words, "q", ["a", "b"])
    vectors.cosines(words, "q", ["a", "c"])  # b goes
    assert words.asked == ["a", "b", "q", "c"]
    vectors.cosines(words, "q", ["a", "b"])
    assert words.asked == ["a", "b", "q", "c", "b"]
    many = [f"text {n}" for n in range(9)]  # more than there is room for
    assert vectors.cosines(words, "q", many).tolist() == pytest.approx(naive("q", many), abs=1e-5)


def test_threads_ask_an_embedder_one_after_the_other() -> None:
    inside, most, words = [], [], Words()

    def embed(texts: Sequence[str]) -> list[list[float]]:
        inside.append(1)
        most.append(len(inside))
        found = words(texts)
        inside.pop()
        return found

    results: list[list[float]] = []
    start = threading.Barrier(8)

    def work() -> None:
        start.wait()
        results.append(cosines(embed, QUESTION, TEXTS).tolist())

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [results[0]] * 8
    assert words.asked == [*TEXTS, QUESTION]
    assert set(most) == {1}


def test_a_folder_a_function_and_a_pair_agree(tmp_path: Path) -> None:
    folder = write_encoder(tmp_path)
    encoder = module.load_embedder(str(folder))
    expected = cosines(folder, QUESTION, TEXTS)
    assert torch.equal(cosines(str(folder), QUESTION, TEXTS), expected)
    plain = cosines(lambda texts: encoder(texts).tolist(), QUESTION, TEXTS)
    assert torch.allclose(plain, expected, atol=1e-6)
    prompted = write_encoder(tmp_path / "asks", prompts={"query": "ask : "})
    asked = cosines(prompted, QUESTION, TEXTS)
    assert torch.allclose(asked, cosines(folder, "ask : " + QUESTION, TEXTS), atol=1e-6)
    assert not torch.allclose(asked, expected, atol=1e-3)


def wrong(rows: Any) -> Callable[[Sequence[str]], Any]:
    return lambda texts: rows


def fails(texts: Sequence[str]) -> Any:
    raise KeyError("no such deployment")


@pytest.mark.parametrize(
    ("embed", "told"),
    [
        (wrong([[1.0]]), "gave 1 vectors for 3 texts"),
        (wrong([[1.0], [1.0, 2.0], [1.0]]), r"different widths: \[1, 2\]"),
        (wrong([[1.0], [float("nan")], [1.0]]), "not finite for the text 'Tickets"),
        (wrong([[1.0], [2.0], [float("inf")]]), "not finite for the text 'The museum"),
        (wrong([[1.0], [0.0], [1.0]]), "of zeros for the text 'Tickets"),
        (wrong([1.0, 2.0, 3.0]), r"rows of the shapes \[\(\)\]"),
        (wrong([[[1.0]]] * 3), r"rows of the shapes \[\(1, 1\)\]"),
        (wrong(None), "gave NoneType, no rows of numbers"),
        (wrong(["a", "b", "c"]), "gave list, no rows of numbers"),
        (fails, r"test_embedder\.fails> failed: KeyError: 'no such deployment'"),
    ],
)
def test_what_is_no_vector_is_told(embed: Any, told: str) -> None:
    with pytest.raises(ModelError, match=told) as caught:
        cosines(embed, QUESTION, TEXTS)
    assert "one vector of numbers for each text" in str(caught.value)


def test_later_vectors_must_be_as_wide_as_the_first() -> None:
    def embed(texts: Sequence[str]) -> list[list[float]]:
        return [[1.0] * len(text) for text in texts]

    with pytest.raises(ModelError, match=r"different widths: \[2, 3\]"):
        cosines(embed, "abc", ["ab"])


def test_a_request_out_of_time_embeds_nothing() -> None:
    words = Words()
    with until(deadline_after(-1.0)), pytest.raises(RequestTimeoutError):
        cosines(words, QUESTION, TEXTS)
    assert words.asked == []


# ---------------------------------------------------------------- as an option


def test_an_embedder_leaves_options_what_they_are() -> None:
    pair, words = Pair(), Words()
    one = SpecPC(embedder=pair, **SENTENCE)
    assert one == SpecPC(embedder=Pair(), **SENTENCE)  # as the embedder has it
    assert one != SpecPC(embedder=words, **SENTENCE) != SpecPC(**SENTENCE)
    assert hash(one) == hash(SpecPC(embedder=pair, **SENTENCE))
    assert hash(SpecKVPC(specpc=one)) == hash(SpecKVPC(specpc=one))
    assert {SpecPC(): 1}[SpecPC(capacity=1024)] == 1
    copies = (copy.copy(one), copy.deepcopy(one), one.model_copy(deep=True))
    assert all(it == one and it.embedder is pair for it in copies)
    changed = copy.deepcopy(SpecKVPC(specpc=one)).specpc.model_copy(
        update={"ratio": 0.5}, deep=True
    )
    assert (changed.embedder, changed.ratio, one.ratio) == (pair, 0.5, None)
    assert f"embedder='<tests.embedders.Pair at {id(pair):#x}>'" in repr(one)
    assert len(repr(one)) < 800


def module_function(texts: Sequence[str]) -> list[list[float]]:
    return [hashed(text) for text in texts]


class Model(BaseModel):
    """As frameworks have them: no hash, and a name."""

    model_name: str = "words-1"

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        return [hashed(text) for text in texts]

    def embed_query(self, text: str) -> list[float]:
        return hashed(text)


def test_options_are_written_with_the_embedders_name() -> None:
    def name(embedder: Any) -> str:
        return str(SpecPC(embedder=embedder, **SENTENCE).model_dump(mode="json")["embedder"])

    assert name("folder/of/a/model") == "folder/of/a/model"
    assert name(Path("folder")) == "folder"
    assert name(module_function) == "<tests.test_embedder.module_function>"
    assert name(Model()) == "<tests.test_embedder.Model words-1>"
    assert name(Model().embed_documents) == "<tests.test_embedder.Model.embed_documents words-1>"
    first, second = (lambda texts: texts), (lambda texts: texts)
    assert name(first) != name(second)  # caches of answers must tell them apart
    one, other = Words(), Words()
    assert name(one.__call__) == name(one.__call__) != name(other.__call__)
    method = SpecPC(embedder="folder", **SENTENCE)
    assert SpecPC.model_validate_json(method.model_dump_json()) == method
    assert pickle.loads(pickle.dumps(method)) == method  # noqa: S301
    named = SpecPC(embedder=module_function, **SENTENCE)
    assert pickle.loads(pickle.dumps(named)) == named  # noqa: S301
    with pytest.raises(ValueError, match="give the object itself"):
        SpecPC.model_validate_json(named.model_dump_json())
    assert SpecPC.model_json_schema()["properties"]["embedder"]["default"] is None


def test_wrong_options_of_an_embedder() -> None:
    with pytest.raises(ConfigError, match=r"<builtins\.int at .* cannot embed: give a function"):
        SpecPC(embedder=3, **SENTENCE)
    for unit in ("token", "word"):
        with pytest.raises(ConfigError, match=f'unit is "{unit}": set it to "sentence"'):
            SpecPC(unit=unit, semantic_weight=0.5)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="together they must not exceed 1"):
        SpecPC(unit="sentence", lexical_weight=0.6, semantic_weight=0.5)
    assert SpecPC(unit="passage", lexical_weight=0.9, semantic_weight=0.1)
    with pytest.raises(ModelNotFoundError):
        cosines("./nowhere", QUESTION, TEXTS)

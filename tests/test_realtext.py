"""Readers of real data sets, on small files of the same form, and the contexts made of them."""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from draftsieve.core.errors import ConfigError, PromptError
from draftsieve.core.evaluation.metrics import survival
from draftsieve.core.evaluation.puzzles import NOT_FOUND
from draftsieve.core.evaluation.realtext.collection import Collection, occurrences
from draftsieve.core.evaluation.realtext.contexts import Around, real_items
from draftsieve.core.evaluation.realtext.download import Download, fetch, gold_passages
from draftsieve.core.evaluation.realtext.mtrag import read_mtrag
from draftsieve.core.evaluation.realtext.natural_questions import read_natural_questions
from draftsieve.core.evaluation.realtext.rankings import (
    by_chance,
    by_meaning,
    fused,
    in_turn,
    ranked,
    rankings,
)
from draftsieve.core.evaluation.realtext.sets import SETS, data_folder, fetch_set, read_set
from draftsieve.core.evaluation.realtext.squad_form import read_squad_form
from draftsieve.core.evaluation.tasks import EvalItem, Turn
from draftsieve.core.types import Segment
from draftsieve.integrations import cli

HARBOUR = "The harbour of Onda opened in 1911. It has two quays, and a crane that lifts nine tons."
ORCHARD = "Vell keeps an orchard of plum trees. The oldest of them was planted by his aunt Sirre."
FERRY = "The ferry to Onda sails at dawn. It carries forty passengers and no cars."


def words(text: str) -> int:
    return len(text.split())


def write(path: Path, content: Any) -> Path:
    lines = content if isinstance(content, list) else [content]
    path.write_text("\n".join(json.dumps(line) for line in lines), encoding="utf-8")
    return path


def squad(path: Path, *texts: str, answers: Sequence[tuple[int, str, str, int]] = ()) -> Path:
    """A file with one article a text; an answer is (article, question, text, start)."""
    data = [
        {
            "paragraphs": [
                {
                    "context": text,
                    "qas": [
                        {"id": n, "question": q, "answers": [{"text": a, "answer_start": start}]}
                        for n, (owner, q, a, start) in enumerate(answers)
                        if owner == index
                    ],
                }
            ]
        }
        for index, text in enumerate(texts)
    ]
    return write(path, {"data": data})


@pytest.fixture
def ports(tmp_path: Path) -> Collection:
    answers = [
        (0, "When did the harbour open?", "1911", HARBOUR.index("1911")),
        (2, "How many passengers sail?", "forty", FERRY.index("forty")),
    ]
    path = squad(tmp_path / "ports.json", HARBOUR, ORCHARD, FERRY, answers=answers)
    return read_squad_form(path, "ports")


def marked(collection: Collection) -> list[list[str]]:
    return [
        [collection.passages[p.passage].text[p.start : p.end] for p in question.places]
        for question in collection.questions
    ]


# ---------------------------------------------------------------- SQuAD's form


def test_paragraphs_are_passages_and_answers_are_marked(ports: Collection) -> None:
    assert [passage.text for passage in ports.passages] == [HARBOUR, ORCHARD, FERRY]
    assert marked(ports) == [["1911"], ["forty"]]
    assert [question.gold for question in ports.questions] == [(0,), (2,)]
    assert [question.id for question in ports.questions] == ["0", "1"]


def test_published_offsets_may_be_a_little_off(tmp_path: Path) -> None:
    text = "Nine boats came, and nine boats left. Then nine more."
    answers = [(0, "How many left?", "nine", 18)]  # the third "nine" is farther away
    found = read_squad_form(squad(tmp_path / "a.json", text, answers=answers), "boats")
    assert found.questions[0].places[0].start == text.index("nine boats left")
    answers = [(0, "How many sank?", "seven", 4)]
    with pytest.raises(PromptError, match="'seven' does not stand in its paragraph"):
        read_squad_form(squad(tmp_path / "b.json", text, answers=answers), "boats")


def test_long_articles_are_cut_and_parted_answers_left_out(tmp_path: Path) -> None:
    text = f"{HARBOUR}\n\n{ORCHARD}\n\n{FERRY}"
    parted = text[text.index("aunt") : text.index("sails")]
    answers = [
        (0, "Who planted it?", " his aunt Sirre", text.index(" his aunt")),
        (0, "What is between?", parted, text.index(parted)),
    ]
    found = read_squad_form(squad(tmp_path / "a.json", text, answers=answers), "long", words=18)
    assert [passage.text for passage in found.passages] == [HARBOUR, ORCHARD, FERRY]
    assert {passage.metadata["article"] for passage in found.passages} == {"0"}
    assert marked(found) == [["his aunt Sirre"]]
    assert found.questions[0].gold == (1,)
    assert found.left_out == (("1", "its answer goes on in the next passage"),)


# ---------------------------------------------------------------- Natural Questions, MTRAG


def nq_rows() -> list[dict[str, Any]]:
    return [
        {"question": "when did it open", "answers": ["1911"], "title": "Onda", "text": HARBOUR},
        {
            "question": "what does it lift",
            "answers": ["nine  tons", "9 t"],
            "title": "Onda",
            "text": HARBOUR,
        },
        {"question": "who has plums", "answers": ["Vell"], "title": "Vell", "text": ORCHARD},
        {"question": "how deep", "answers": ["11 fathoms"], "title": "Ferry", "text": FERRY},
    ]


def test_gold_passages_are_read_once_and_their_answers_found(tmp_path: Path) -> None:
    found = read_natural_questions(write(tmp_path / "nq.jsonl", nq_rows()))
    assert [passage.text for passage in found.passages] == [HARBOUR, ORCHARD, FERRY]
    assert marked(found) == [["1911"], ["nine tons"], ["Vell"]]
    assert [question.gold for question in found.questions] == [(0,), (0,), (1,)]
    assert found.left_out == (("how deep", "no accepted answer stands in its passage"),)


def mtrag_row(**changed: Any) -> dict[str, Any]:
    row = {
        "task_id": "talk<::>2",
        "contexts": [
            {"document_id": "d1", "text": f"\n{FERRY}"},
            {"document_id": "d2", "text": HARBOUR},
        ],
        "input": [
            {"speaker": "user", "text": "Is there a ferry?"},
            {"speaker": "agent", "text": "Yes, to Onda."},
            {"speaker": "user", "text": "When?"},
        ],
        "targets": [{"speaker": "agent", "text": "At dawn."}],
        "answerability": ["ANSWERABLE"],
    }
    return {**row, **changed}


def test_conversations_keep_their_turns(tmp_path: Path) -> None:
    refused = mtrag_row(task_id="x", contexts=[], answerability=["UNANSWERABLE"])
    found = read_mtrag(write(tmp_path / "m.jsonl", [mtrag_row(), refused]))
    first, second = found.questions
    assert first.text == "When?"
    assert first.turns == (Turn("user", "Is there a ferry?"), Turn("assistant", "Yes, to Onda."))
    assert (first.gold, first.answers, first.kind) == ((0, 1), ("At dawn.",), "answerable")
    assert (second.gold, second.answers, second.kind) == ((), (), "unanswerable")
    assert [passage.text for passage in found.passages] == [FERRY, HARBOUR]

    item = real_items(found, Around("bm25", 100, rankings()["bm25"]), words)[0]
    prompt = item.prompt()
    assert [message.role for message in prompt.messages] == ["system", "user", "assistant", "user"]
    assert [passage.text for passage in prompt.passages] == list(item.passages)
    assert prompt.question == "Question: When?"
    last = prompt.layout(prompt.messages[-1])
    assert [part.segment for part in last].count(Segment.PASSAGE) == 2
    assert EvalItem.from_json(json.loads(json.dumps(item.as_json()))) == item


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("nq", {"question": "why", "answers": ["because"]}),
        ("mtrag", mtrag_row(input=[{"speaker": "owl", "text": "Hu?"}])),
        ("mtrag", mtrag_row(contexts=[{"text": FERRY}])),
        ("xquad.en", {"articles": []}),
    ],
)
def test_files_of_another_form_are_refused(tmp_path: Path, name: str, row: Any) -> None:
    write(tmp_path / SETS[name].file, row)
    with pytest.raises(PromptError, match=SETS[name].file):
        read_set(name, tmp_path)


# ---------------------------------------------------------------- where they are


def test_the_folder_is_given_or_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DRAFTSIEVE_DATA", raising=False)
    with pytest.raises(ConfigError, match="set DRAFTSIEVE_DATA"):
        data_folder()
    monkeypatch.setenv("DRAFTSIEVE_DATA", str(tmp_path))
    assert data_folder() == tmp_path
    with pytest.raises(ConfigError, match="elsewhere"):
        data_folder(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match=r"data get xquad\.en .* published at https"):
        read_set("xquad.en")
    with pytest.raises(ConfigError, match="no data set 'squid'"):
        read_set("squid")
    write(tmp_path / "nq_open_gold.jsonl", nq_rows())
    assert read_set("nq").name == "nq"


# ---------------------------------------------------------------- downloads


def published(path: Path, content: bytes, **changes: Any) -> Download:
    path.write_bytes(content)
    source = Download(path.as_uri(), hashlib.sha256(content).hexdigest())
    return replace(source, **changes)


def test_sets_are_downloaded_checked_and_converted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {"question": "when did it open", "answers": ["1911"], "ctxs": []}
    row["ctxs"] = [{"title": "Onda", "text": HARBOUR, "isgold": True}]
    content = gzip.compress(json.dumps({**row, "more": 1}).encode())
    source = published(tmp_path / "oracle.gz", content, convert=gold_passages)
    monkeypatch.setitem(SETS, "nq", replace(SETS["nq"], download=source))
    assert cli.main(["data", "get", "nq", "--data", str(tmp_path / "sets")]) == 0
    assert "nq_open_gold.jsonl" in capsys.readouterr().out
    assert marked(read_set("nq", tmp_path / "sets")) == [["1911"]]

    (tmp_path / "oracle.gz").unlink()
    assert fetch_set("nq", tmp_path / "sets").is_file()  # what is there is kept
    with pytest.raises(ConfigError, match="cannot be downloaded"):
        fetch_set("nq", tmp_path / "other")
    assert list((tmp_path / "sets").iterdir()) == [tmp_path / "sets" / "nq_open_gold.jsonl"]


def test_another_file_than_the_checked_one_is_not_used(tmp_path: Path) -> None:
    source = published(tmp_path / "a.json", b"{}", sha256="0" * 64)
    with pytest.raises(ConfigError, match="instead of 0000"):
        fetch(source, tmp_path / "sets" / "a.json")
    assert not (tmp_path / "sets").exists()


def test_sets_are_listed_with_their_licences(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["data", "list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(SETS)
    assert all("https://github.com/" in line for line in lines)
    assert cli.main(["data", "get", "xquad.en", "squid"]) == 2
    assert "no data set 'squid'" in capsys.readouterr().err
    for name, found in SETS.items():
        commit = found.download.url.removeprefix("https://raw.githubusercontent.com/").split("/")[2]
        assert len(commit) == 40, name  # a branch would move on
        assert len(found.download.sha256) == 64


# ---------------------------------------------------------------- contexts


def of(collection: Collection, score: Any, length: int, **options: Any) -> list[EvalItem]:
    return real_items(collection, Around("x", length, score), words, **options)


def test_the_gold_passage_stands_among_others(ports: Collection) -> None:
    items = of(ports, rankings()["bm25"], 100)
    for item, question in zip(items, ports.questions, strict=True):
        assert sorted(item.passages) == sorted([HARBOUR, ORCHARD, FERRY])
        (evidence,) = item.evidence
        value = evidence.value
        assert item.passages[value.passage][value.start : value.end] == question.answers[0]
        whole = tuple(((0, len(text)),) for text in item.passages)
        assert survival(item, whole) == (True, True)
        gone = tuple(() if i == value.passage else ((0, 9),) for i in range(len(whole)))
        assert survival(item, gone) == (False, False)
    assert items[0].id == "ports-x-100-0-0"
    assert items[0].task == "ports/x"


def test_the_best_others_that_fit_are_taken(ports: Collection) -> None:
    score = rankings()["bm25"]
    harbour, _ = of(ports, score, words(HARBOUR) + words(FERRY) + 3)
    assert set(harbour.passages) == {HARBOUR, FERRY}  # they share words, the orchard does not
    assert [item.passages for item in of(ports, score, words(HARBOUR))] == [(HARBOUR,), (FERRY,)]
    assert [item.passages for item in of(ports, score, words(FERRY))] == [(FERRY,)]


def test_items_are_seeded(tmp_path: Path) -> None:
    texts = [f"Boat {n} has {n} sails and a crew of {n} men." for n in range(60)]
    answers = [(n, f"Which boat has {n} sails?", f"Boat {n}", 0) for n in range(60)]
    boats = read_squad_form(squad(tmp_path / "a.json", *texts, answers=answers), "boats")
    chance = rankings(seed=1)["random"]
    items = of(boats, chance, 120, count=20, seed=1)
    assert len(items) == 20
    assert items == of(boats, rankings(seed=1)["random"], 120, count=20, seed=1)
    other = of(boats, rankings(seed=2)["random"], 120, count=20, seed=2)
    assert {item.question for item in items} != {item.question for item in other}
    golds = [item.evidence[0].value.passage for item in items]
    assert len(set(golds)) > 5  # the gold passage stands anywhere


def test_distractors_of_natural_questions_do_not_hold_the_answer(tmp_path: Path) -> None:
    rows = [
        *nq_rows()[:3],
        {"question": "what else", "answers": ["fog"], "title": "B", "text": "In 1911 fog came."},
        {"question": "what now", "answers": ["rain"], "title": "C", "text": "In 1912 rain came."},
    ]
    found = read_natural_questions(write(tmp_path / "nq.jsonl", rows))
    (item, *_) = of(found, rankings()["bm25"], 100)
    assert item.question == "when did it open"
    assert set(item.passages) == {HARBOUR, ORCHARD, "In 1912 rain came."}


def test_questions_that_nothing_answers_expect_that_word(tmp_path: Path) -> None:
    refused = mtrag_row(contexts=[], answerability=["UNANSWERABLE"])
    found = read_mtrag(write(tmp_path / "m.jsonl", [mtrag_row(task_id="a"), refused]))
    item = of(found, rankings()["bm25"], 100)[1]
    assert (item.answers, item.evidence, item.depth) == ((NOT_FOUND,), (), None)
    assert item.kind == "unanswerable"
    assert set(item.passages) == {HARBOUR, FERRY}


def test_articles_stay_whole_where_they_fit(tmp_path: Path) -> None:
    parts = [f"Part {n} tells of year {n} and of the boats built in it." for n in range(9)]
    text = "\n\n".join(parts)
    answers = [(0, "Which part tells of year 4?", "Part 4", text.index("Part 4"))]
    path = squad(tmp_path / "a.json", text, ORCHARD, answers=answers)
    boats = read_squad_form(path, "boats", words=13)
    (whole,) = of(boats, None, 1000)
    assert list(whole.passages) == parts
    starts = set()
    for seed in range(8):
        (item,) = of(boats, None, 40, seed=seed)
        start = parts.index(item.passages[0])
        assert list(item.passages) == parts[start : start + 3]
        assert parts[4] in item.passages
        starts.add(start)
    assert len(starts) > 1


# ---------------------------------------------------------------- rankings


def letters(texts: Sequence[str]) -> list[list[float]]:
    return [[float(text.count(letter)) for letter in "abc"] for text in texts]


def test_vectors_rank_by_angle_and_are_made_once() -> None:
    asked: list[list[str]] = []

    def embed(texts: Sequence[str]) -> list[list[float]]:
        asked.append(list(texts))
        return letters(texts)

    score = by_meaning(embed)
    assert ranked(score("ab", ["c", "aabb", "abbb"])) == [1, 2, 0]
    assert score("ab", ["aabb"]) == [pytest.approx(1.0)]
    assert asked == [["c", "aabb", "abbb"], ["ab"]]


def test_fusion_prefers_what_both_have_near_the_top() -> None:
    def first(question: str, texts: Sequence[str]) -> list[float]:
        return [3.0, 2.0, 1.0, 0.0]

    def second(question: str, texts: Sequence[str]) -> list[float]:
        return [0.0, 2.0, 1.0, 3.0]

    texts = ["a", "b", "c", "d"]
    assert fused(first, second)("?", texts) == pytest.approx(
        [1 / 61 + 1 / 64, 1 / 62 + 1 / 62, 1 / 63 + 1 / 63, 1 / 64 + 1 / 61]
    )
    assert ranked(in_turn(first, second)("?", texts)) == [0, 3, 1, 2]


def test_chance_depends_on_seed_and_question_alone() -> None:
    texts = [str(n) for n in range(9)]
    assert by_chance(1)("a", texts) == by_chance(1)("a", texts)
    assert by_chance(1)("a", texts) != by_chance(1)("b", texts)
    assert by_chance(1)("a", texts) != by_chance(2)("a", texts)


def test_rankings_with_an_embedder_have_two_more() -> None:
    assert list(rankings()) == ["bm25", "random", "mixed"]
    assert list(rankings(letters)) == ["bm25", "random", "mixed", "embedding", "fusion"]


def test_answers_in_scripts_without_spaces_are_found_anywhere() -> None:
    text = "首都是北京市。"
    assert [text[s:e] for s, e in occurrences(text, "北京")] == ["北京"]

"""Words in common, in scripts with and without spaces: of sentences, and of a saved index."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from draftsieve import SpecPC
from draftsieve.core.specpc.bm25 import bm25, words
from draftsieve.retrievers import Bm25Index
from draftsieve.retrievers.folder import FolderError

from .adapters_fixtures import tiny_compressor

# A question, and sentences of which only the second can answer it.
ASKED = {
    "zh": (
        "灯塔的钥匙放在哪里？",
        ["面包店每天早上六点开门。", "灯塔的钥匙放在红色抽屉里。", "这座桥建于一九一二年。"],
    ),
    "ja": (
        "灯台の鍵はどこにありますか。",
        [
            "パン屋は朝六時に開きます。",
            "灯台の鍵は赤い引き出しの中です。",
            "橋は百年前のものだ。",
        ],
    ),
    "th": (
        "กุญแจประภาคารเก็บไว้ที่ไหน",
        ["ร้านขนมปังเปิดหกโมงเช้า", "กุญแจประภาคารเก็บไว้ในลิ้นชักสีแดง", "สะพานนี้สร้างเมื่อร้อยปีก่อน"],
    ),
    "lo": (
        "ກະແຈເກັບໄວ້ໃສ",
        ["ຮ້ານເປີດຕອນເຊົ້າ", "ກະແຈເກັບໄວ້ໃນລິ້ນຊັກ", "ຂົວນີ້ສ້າງດົນແລ້ວ"],
    ),
    "km": (
        "តើសោនៅឯណា",
        ["ហាងបើកម៉ោងប្រាំមួយ", "សោនៅក្នុងថតពណ៌ក្រហម", "ស្ពាននេះចាស់ណាស់"],
    ),
    "my": (
        "သော့ဘယ်မှာလဲ",
        ["ဆိုင်ကမနက်ဖွင့်တယ်", "သော့ကအံဆွဲထဲမှာရှိတယ်", "တံတားဟောင်းတယ်"],
    ),
}


@pytest.mark.parametrize("language", ASKED)
def test_scripts_without_spaces_share_words(language: str) -> None:
    question, sentences = ASKED[language]
    scores = bm25(question, sentences)
    assert scores.index(max(scores)) == 1
    assert scores[1] > 2 * max(scores[0], scores[2])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Straße, ＡＸ-204 und sea_level", ["strasse", "ax", "204", "und", "sea_level"]),
        ("हिन्दी की नाव", ["हिन्दी", "की", "नाव"]),
        ("한국어는 띄어 쓴다", ["한국어는", "띄어", "쓴다"]),
        ("東京タワー", ["東京", "京タ", "タワ", "ワー"]),
        ("人々、猫。ｶﾞｽ", ["人々", "猫", "ガス"]),
        ("ferry渡し船A4は第3便", ["ferry", "渡し", "し船", "a4", "は第", "3", "便"]),
        ("เรือ ปี ๒๕๖๕", ["เร", "รื", "ือ", "ปี", "๒๕๖๕"]),
    ],
)
def test_words_of_mixed_scripts(text: str, expected: list[str]) -> None:
    assert words(text) == expected


def test_words_in_common_choose_a_chinese_sentence() -> None:
    """With all weight on the words, the draft's scores do not matter."""
    question, sentences = ASKED["zh"]
    method = SpecPC(ratio=0.5, unit="sentence", lexical_weight=1.0, starting_layer=0)
    context = tiny_compressor().compress(question, ["".join(sentences)], method)
    assert sentences[1] in context.passages[0].text
    assert len(context.passages[0].text) < len("".join(sentences))


@pytest.mark.parametrize("language", ["zh", "ja", "th"])
def test_a_saved_index_finds_them_too(tmp_path: Path, language: str) -> None:
    question, sentences = ASKED[language]
    index = Bm25Index.from_texts(sentences)
    assert [score for _, score in index.search(question, 3)] == pytest.approx(
        sorted(bm25(question, sentences), reverse=True), rel=1e-5
    )
    index.save(tmp_path)
    loaded = Bm25Index.load(tmp_path)
    assert loaded.search(question, 3) == index.search(question, 3)
    assert loaded.search(question, 1)[0][0].text == sentences[1]


def test_an_index_of_other_words_is_refused(tmp_path: Path) -> None:
    """Format 1 cut unspaced scripts into single characters, which no question holds now."""
    Bm25Index.from_texts(ASKED["zh"][1]).save(tmp_path)
    options = json.loads((tmp_path / "index.json").read_text())
    (tmp_path / "index.json").write_text(json.dumps({**options, "format": 1}))
    with pytest.raises(FolderError, match=r"format 1, .* index the passages again"):
        Bm25Index.load(tmp_path)

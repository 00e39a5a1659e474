"""Sentences end where their language ends them; a wrong guess of it does no harm."""

from __future__ import annotations

import time
from itertools import pairwise

import pytest
import torch

from draftsieve import Prompt, SpecPC
from draftsieve.core.errors import ConfigError
from draftsieve.core.specpc.ranking import rank_units
from draftsieve.core.specpc.units import language_of, sentence_spans, word_spans

from .adapters_fixtures import tiny_compressor

# Sentences of texts that English rules would cut at an abbreviation or an ordinal.
SENTENCES = {
    "de": [
        "Am 3. Mai fuhr sie los.",
        "Der 2. Wagen stand z.B. seit dem 19. Jahrhundert bei Dr. Meier.",
        "Es war kalt!",
    ],
    "nl": ["Dhr. Jansen kwam bijv. op 3 mei.", "Hij is niet de baas van het huis."],
    "fr": [
        "M. Leroux et Mme. Blin vivent env. 3 mois au boul. Carnot.",
        "Elle est dans la tour.",
        "Oui !",
    ],
    "es": ["La Dra. Ruiz vive en la av. Sol núm. 3.", "¿Quién es?", "No está en casa."],
    "pt": ["A Dra. Costa não mora mais em Lisboa.", "Ela foi para o norte."],
    "it": ["Il sig. Riva e il prof. Verdi sono con la dott.ssa Neri.", "Non è tardi."],
    "pl": ["Np. prof. Lis mieszka przy ul. Długiej.", "To jest stary dom."],
    "sk": ["Dňa 3. mája odišla na stanicu.", "Napr. Dr. Novák je doma."],
    "da": ["Den 3. maj rejste hun med toget.", "Hr. Holm kom kl. 7.", "Det er ikke sent."],
    "fi": ["Hän lähti 3. toukokuuta.", "Esim. prof. Niemi on täällä, mutta ei kauan."],
    "ru": ["Он жил на ул. Речной в г. Туле.", "В 1990 г. Лавров уехал.", "Это было давно."],
    "uk": ["Він жив на вул. Річній у м. Києві.", "Це було до війни."],
    "el": ["Ο κ. Δήμου ήρθε;", "Ναι.", "Έφυγε νωρίς."],
    "hy": ["Պրոֆ. Սարյանը եկավ։", "Նա գնաց։"],
    "ml": ["ഡോ. രാജൻ വന്നു.", "അവൻ പോയി."],
}
# Full stops of their own, whatever the rules; closing quotes stay with them.
UNSPACED = {
    "zh": ["渡轮七点离开。", "票在哪里买？", "“在码头！”", "她说。"],
    "ja": ["船は七時に出る。", "切符はどこ？", "「港で。」", "と彼女は言った！"],
}


def cut(text: str, language: str | None = None) -> list[str]:
    return [text[start:end] for start, end in sentence_spans(text, language)]


@pytest.mark.parametrize("language", SENTENCES)
def test_abbreviations_and_ordinals_end_no_sentence(language: str) -> None:
    sentences = SENTENCES[language]
    text = " ".join(sentences)
    assert language_of(text) == language
    assert cut(text) == sentences
    assert cut(text, language) == sentences
    assert cut(text, "en") != sentences


@pytest.mark.parametrize("language", UNSPACED)
@pytest.mark.parametrize("rules", [None, "en", "de", "ja", "zh"])
def test_chinese_and_japanese_full_stops_end_sentences(language: str, rules: str | None) -> None:
    assert cut("".join(UNSPACED[language]), rules) == UNSPACED[language]
    assert cut("他来了!她走了?好。", rules) == ["他来了!", "她走了?", "好。"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "3.14 / 2.72",
        "Dr. Hall left at 3 p.m. on May 3. She took the U.S. mail with her.",
        "Die Hard is on at 9 am. Los Angeles won.",
        "def total(a, b): return a + b",
        "Let α and β be the roots of it. They are real.",
        "Straße 5",
    ],
)
def test_english_and_texts_without_a_language_get_english_rules(text: str) -> None:
    assert language_of(text) == "en"
    assert cut(text) == cut(text, "en")


@pytest.mark.parametrize("language", [*SENTENCES, "zh", "xx"])
def test_wrong_rules_lose_no_character(language: str) -> None:
    texts = [" ".join(each) for each in SENTENCES.values()] + ["".join(UNSPACED["ja"]), "A.\n\nB"]
    for text in texts:
        spans = sentence_spans(text, language)
        assert all(left[1] <= right[0] for left, right in pairwise(spans))
        kept = "".join(text[start:end] for start, end in spans)
        assert "".join(kept.split()) == "".join(text.split())


@pytest.mark.parametrize("piece", ["猫は寝た。", "他来了!", "abc!Def?", "am 3. "])
def test_a_long_text_is_cut_in_linear_time(piece: str) -> None:
    """sentencex alone takes ten seconds for 100,000 characters without a space."""
    text = piece * (100_000 // len(piece))
    start = time.perf_counter()
    spans = sentence_spans(text)
    assert time.perf_counter() - start < 3.0
    assert text[spans[0][0] : spans[-1][1]] == text.strip()


def test_the_option_reaches_the_sentences() -> None:
    """One passage whose words say nothing of its language: told, its ordinal is not cut."""
    passage = "Eröffnung 3. Mai. Ort Halle 7."
    prompt = Prompt.from_question("Wann ist Eröffnung?", [passage])
    tokens = tiny_compressor().encoder.encode(prompt)
    assert language_of(passage) == "en"

    def units(**options: str) -> list[str]:
        method = SpecPC(ratio=0.5, unit="sentence", **options)
        ranked = rank_units([passage], tokens, torch.zeros(len(tokens)), method)
        return [passage[start:end] for start, end in zip(ranked.start, ranked.end, strict=True)]

    assert units(language="de") == ["Eröffnung 3. Mai.", "Ort Halle 7."]
    assert units() == units(language="en") == ["Eröffnung 3.", "Mai.", "Ort Halle 7."]


@pytest.mark.parametrize("language", ["German", "", "d", "DE", 7])
def test_a_language_is_an_iso_code(language: object) -> None:
    with pytest.raises(ConfigError, match="language"):
        SpecPC(language=language)


def test_numbers_in_thai_digits_are_one_word() -> None:
    text = "ปี ๒๕๖๕ ฿50"
    assert [text[start:end] for start, end in word_spans(text)] == ["ป", "ี", "๒๕๖๕", "฿50"]

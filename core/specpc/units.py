"""Texts cut into units that are kept or dropped as a whole: words, sentences, passages."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from functools import cache

import regex
import sentencex

from ..config import Unit
from ..prompt.safe_tokenizer import replace_surrogates
from .bm25 import UNSPACED

Bounds = list[tuple[int, int]]  # character start and end (exclusive), ascending, not overlapping

# A run without spaces: a number, identifier, URL or e-mail address is never cut. Scripts written
# without spaces fall apart into single characters instead.
_WORD = regex.compile(rf"(?:[^\s{UNSPACED}]|\d)+|\S")
# Lines, and in them what ends with a full stop that no rule doubts, closing quotes included.
_PIECE = regex.compile(
    rf"""(?=[^\r\n])(?:[^\r\n。｡！？!?]|[!?](?![{UNSPACED}]))*+(?:[。｡！？!?]+[」』）】》〉”’"')]*)?+"""
)
_UNBROKEN = re.compile(r"\S{2000,}")  # data, no prose; sentencex would take its length squared

_LOOKED_AT = 20_000  # characters that say which language a text has
# Frequent words of the languages whose abbreviations and ordinals differ from English; Czech and
# Slovak share their rules. Words that two languages have count for both.
_FREQUENT = {
    "en": "a am an and are as at be by for from have he his i in is it no not of on or she so that "
    "the their they this to was we were which who with you",
    "de": "als am auch auf aus bei bis das dem den der des die ein eine einem einen einer er es "
    "für hat ich im in ist mit nach nicht sich sie sind und vom von war werden wird wir zu "
    "zum zur",
    "nl": "aan als bij dat de die door een en er het hij in is maar met naar niet of om ook op te "
    "uit van voor was werd ze zijn",
    "fr": "au aux avec ce cette dans de des du elle en est et il la le les leur mais ne nous ou "
    "par pas pour qui que sa se ses son sont sur un une vous",
    "es": "al como con de del el ella en es está la las lo los más no para pero por que se sin son "
    "su sus un una",
    "pt": "à ao as até com da das de do dos é em ela ele foi mais mas na nas no nos não os ou para "
    "pela pelo por que se sua são um uma",
    "it": "al alla anche che con da dal dei del della delle di è era gli ha il in la le lo ma nel "
    "nella non per più si sono su un una",
    "pl": "ale był była być co do jak jest na nie od oraz po przez przy się są to za że",
    "sk": "ako ale bol bola byl byla být je jeho jsou který ktorý na není po pre při pri pro sa se "
    "sú ve vo za že",
    "da": "af at blev de den der det en er et for fra han har hun ikke med og på som til var",
    "fi": "ei ennen että hän he ja joka kun kuin mutta myös niin oli on ovat se tai vain",
    "ru": "в был была были было для его ее и из к как на не но он она от по с так то что это",
    "uk": "або був була були було в вона від він для до з за й його на не про під та у що це як і "
    "її",
}
# First word of the Unicode name of a script's letters: scripts with rules of their own.
_SCRIPTS = {"GREEK": "el", "ARMENIAN": "hy", "DEVANAGARI": "hi", "MALAYALAM": "ml"}
# What ends in a full stop and goes on, where sentencex does not know it.
_UNFINISHED = {
    "de": r"\b(?:d(?:as|e[mnrs]|ie)|am|beim|im|[vz]om|zum|zur) \d\d?\.",
    "fr": r"\b(?:MM?|Mmes?|Mlles?|Mgr|Ste?)\.",
}


def unit_spans(text: str, unit: Unit, language: str | None = None) -> Bounds:
    """Cut a text into units.

    Args:
        text: Any text.
        unit: "word", "sentence" or "passage" (the whole text); "token" is the tokenizer's affair.
        language: As for `sentence_spans`.

    Returns:
        Spans without surrounding whitespace; together they hold every other character.
    """
    if unit == "word":
        return word_spans(text)
    if unit == "sentence":
        return sentence_spans(text, language)
    return [span for span in [_strip(text, 0, len(text))] if span[0] < span[1]]


def word_spans(text: str) -> Bounds:
    """Runs of characters between whitespace."""
    return [match.span() for match in _WORD.finditer(text)]


def sentence_spans(text: str, language: str | None = None) -> Bounds:
    """Sentences, by sentencex; a line break always ends one (lists, headings, code).

    So does a full stop of Chinese or Japanese, whatever the language.

    Args:
        text: Any text.
        language: ISO code of the language whose rules say what an abbreviation or an ordinal is;
            None for what `language_of` finds. sentencex takes English rules for unknown codes.
    """
    language = language or language_of(text)
    unfinished = re.compile(rf"(?:{_UNFINISHED.get(language, '(?!)')})\s*$", re.IGNORECASE)
    spans: Bounds = []
    for piece in _PIECE.finditer(text):
        clean = _UNBROKEN.sub(lambda run: "x" * len(run[0]), replace_surrogates(piece[0]))
        start = end = piece.start()
        for sentence in sentencex.get_sentence_boundaries(language, clean):
            end = piece.start() + sentence["end_index"]
            if unfinished.search(text, max(start, end - 20), end) is None:
                spans.append(_strip(text, start, end))
                start = end
        spans.append(_strip(text, start, end))
    return [(start, end) for start, end in spans if start < end]


def language_of(text: str) -> str:
    """The language of a text, guessed from its most frequent words, or from its script.

    Args:
        text: Any text; only its first 20,000 characters are looked at.

    Returns:
        ISO code of a language with rules of its own; "en" where fewer than two words speak for
        another one, or no more than for English.
    """
    found = Counter[str]()
    for word in re.findall(r"\w+", text[:_LOOKED_AT].casefold()):
        found.update(_languages().get(word, ()))
        if not word.isascii():
            script = unicodedata.name(word[0], "").partition(" ")[0]
            found[_SCRIPTS.get(script, "")] += 1
    best = max([*_FREQUENT, *_SCRIPTS.values()], key=found.__getitem__)  # the first of equals
    return best if found[best] > 1 else "en"


@cache
def _languages() -> dict[str, list[str]]:
    """Frequent words, with the languages that have them."""
    found: dict[str, list[str]] = {}
    for code, words in _FREQUENT.items():
        for word in words.split():
            found.setdefault(word, []).append(code)
    return found


def _strip(text: str, start: int, end: int) -> tuple[int, int]:
    while start < end and text[start].isspace():
        start += 1
    while end > start and text[end - 1].isspace():
        end -= 1
    return start, end

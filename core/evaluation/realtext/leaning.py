"""Sentences that lean on their neighbours: a pronoun or demonstrative says what they are about."""

from __future__ import annotations

from ...specpc.bm25 import words

LEANING, STANDING = "leaning", "standing"  # kinds of questions, by the sentences that answer them
_ENGLISH = (
    "it its itself he him his himself she her hers herself they them their theirs themselves "
    "this these that those such both either neither latter former"
)
_GERMAN = (
    "er sie es ihn ihm ihr ihre ihren ihrem ihrer ihres sein seine seinen seinem seiner seines "
    "dieser diese dieses diesen diesem dies jener jene jenes jenen jenem beide beides solche "
    "solcher solches derselbe dieselbe dasselbe"
)
_LEANING = frozenset(f"{_ENGLISH} {_GERMAN}".split())
_CHINESE = ("它", "他", "她", "其", "这", "這", "那", "该", "該", "此")


def leans(sentence: str) -> bool:
    """Whether a sentence's first word is a pronoun or a demonstrative, in English, German, Chinese.

    It is a rule of the first word alone: "It is known that" counts, a pronoun further on does not.
    German articles that may also be demonstratives ("der", "die", "das") do not count.
    """
    found = words(sentence)
    return bool(found) and (found[0] in _LEANING or found[0].startswith(_CHINESE))

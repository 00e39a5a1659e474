"""What the target reads behind the draft's guess: sentences that share words with the question.

A guess that misses the answer makes no token look at what the answer needs. A sentence of the
passages that is read once more looks at its own place and what it leans on.
"""

from __future__ import annotations

from ..prompt.messages import Prompt
from ..specpc.bm25 import bm25
from ..specpc.units import sentence_spans


def related_sentences(prompt: Prompt, count: int) -> str:
    """The passages' sentences with the most words in common with the question, best first.

    Args:
        prompt: With the passages that the target reads.
        count: Most sentences; those without a word in common are left out.
    """
    texts = [passage.text for passage in prompt.passages]
    found = [text[start:end].strip() for text in texts for start, end in sentence_spans(text)]
    scores = bm25(prompt.question, found)
    order = sorted(range(len(found)), key=lambda place: -scores[place])[:count]
    return "\n".join(found[place] for place in order if scores[place] > 0)

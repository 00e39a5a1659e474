"""Chat over one set of documents, offline: they are read once, and every question selects anew.

The documents' keys and values stay outside the models' working caches. For each question the draft
guesses an answer, that guess selects the entries which the target needs, and nothing is lost to the
next question. Give your own questions as arguments: `python examples/chat_session.py "Who ...?"`.
For models of the hub change TARGET and DRAFT.
"""

import sys
import time
from collections.abc import Sequence
from pathlib import Path

from draftsieve import Answer, Engine, Generation, SpecKV
from draftsieve.core.session import Session
from draftsieve.retrievers import read_folder

TARGET = "builtin:target"  # from the hub: "Qwen/Qwen3-4B"
DRAFT = "builtin:draft"  # from the hub: "Qwen/Qwen3-0.6B"
HANDBOOK = Path(__file__).parent / "data" / "handbook"
FILES = ("person-haizek-pimemont.md", "place-shonuley-house.md")
QUESTIONS = [
    "What is marked on the pass of Haizek Pimemont?",
    "Until when may I stay in Shonuley House?",
    "What is the floor area of Shonuley House?",
]
SHARE = 0.25  # of the documents' entries that a question may keep


def reply(session: Session, question: str) -> Answer:
    """Print an answer while it comes."""
    print(f"\n> {question}\n  ", end="")
    options = Generation(max_new_tokens=24)
    for chunk in session.stream(question, method=SpecKV(ratio=SHARE), generation=options):
        print(chunk.text, end="", flush=True)
        last = chunk
    print()
    assert last.answer is not None  # the last chunk carries it
    return last.answer


def chat(questions: Sequence[str]) -> None:
    """Read the documents, then answer one question after another."""
    engine = Engine.load(TARGET, DRAFT, progress=False)
    pages = [passage for passage in read_folder(HANDBOOK) if passage.metadata["source"] in FILES]
    session = engine.session(pages)
    stats = session.stats
    print(
        f"{len(pages)} pages, {stats.tokens} tokens read once in {stats.seconds['read']:.2f} s; "
        f"{stats.bytes / 1e6:.1f} MB of keys and values are kept."
    )
    for question in questions:
        began = time.perf_counter()
        answer = reply(session, question)
        seconds = time.perf_counter() - began
        kept = answer.usage.cache_entries or answer.usage.prompt_tokens
        print(f"  ({seconds:.2f} s, {kept} of {answer.usage.prompt_tokens} cache entries)")


if __name__ == "__main__":
    chat(sys.argv[1:] or QUESTIONS)

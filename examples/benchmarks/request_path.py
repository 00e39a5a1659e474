"""Which files of the package a request goes through, and how many calls: what a reader must follow.

    python examples/benchmarks/request_path.py

Counts Python functions of the package that run between the call and its result, with the bundled
pair, after loading; generated code (dataclass constructors) and pydantic's own do not count.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import draftsieve
from draftsieve import Engine, Generation, SpecKV, SpecPC

ROOT = Path(draftsieve.__file__).resolve().parent.parent
PASSAGES = [
    "Badge AK-731 was issued to Mira Tolen. She plays chess on Sundays. Her room is 214.",
    "Calls for Jonas Perrick go to 555-0173. The pass made out to him is marked D-4410.",
]
QUESTION = "Which badge was issued to Mira Tolen?"


def calls_by_file(call: Callable[[], object]) -> Counter[str]:
    """Calls of the package's functions, by file, in the order in which files are first entered."""
    counts: Counter[str] = Counter()

    def watch(frame: FrameType, event: str, _: Any) -> None:
        if event == "call":
            path = Path(frame.f_code.co_filename)
            if path.is_absolute() and path.resolve().is_relative_to(ROOT / "core"):
                counts[str(path.resolve().relative_to(ROOT))] += 1

    sys.setprofile(watch)
    try:
        call()
    finally:
        sys.setprofile(None)
    return counts


def measured() -> dict[str, Counter[str]]:
    """The paths of the two requests that most people make."""
    engine = Engine.load(target="builtin:target", draft="builtin:draft", progress=False)
    assert engine.compressor is not None
    compress, few = engine.compressor.compress, Generation(max_new_tokens=4)
    prompt_method = SpecPC(ratio=0.5, unit="sentence")
    cache_method = SpecKV(ratio=0.5)
    return {
        "compress": calls_by_file(lambda: compress(QUESTION, PASSAGES, prompt_method)),
        "answer with SpecKV": calls_by_file(
            lambda: engine.answer(QUESTION, PASSAGES, method=cache_method, generation=few)
        ),
    }


def main() -> None:
    """Print files and calls of each request."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", action="store_true", help="list every file")
    show_files = parser.parse_args().files
    for name, counts in measured().items():
        print(f"{name}: {len(counts)} files, {counts.total()} calls")
        for path, calls in counts.items() if show_files else ():
            print(f"  {calls:5d}  {path}")


if __name__ == "__main__":
    main()

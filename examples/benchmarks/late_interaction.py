"""How often late interaction finds the passage that answers, beside BM25 and an embedder.

    python examples/benchmarks/late_interaction.py --data FOLDER --embedder MINI --skip 700
    python examples/benchmarks/late_interaction.py --data FOLDER --embedder MINI \\
        --suite xquad.en --among nq

Every question is asked over all passages of its set, and those of `--among`. Questions come in an
order shuffled by a fixed seed; the heads were chosen on the first 700 of Natural Questions, so
`--skip 700` asks others. Fusions are sums of standard deviations, or reciprocal ranks ("rrf").
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch

from draftsieve import Compressor, Passage, PassageStore
from draftsieve.core.evaluation.intervals import paired_difference
from draftsieve.core.evaluation.realtext.collection import RealQuestion
from draftsieve.core.evaluation.realtext.rankings import fused
from draftsieve.core.evaluation.realtext.sets import read_set
from draftsieve.core.evaluation.squad import Scorer
from draftsieve.core.models.encoder import load_encoder
from draftsieve.core.specpc.bm25 import Bm25
from draftsieve.core.specpc.stored.late import standard
from draftsieve.retrievers.late import LEXICAL_WEIGHT, LateIndex

FIRST = 200  # of BM25, which are ranked anew
DEPTHS = (1, 5, 20)


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="folder with the data sets")
    parser.add_argument("--embedder", required=True, help="folder or hub id of an encoder")
    parser.add_argument("--draft", default="smollm2-135m")
    parser.add_argument("--suite", default="nq")
    parser.add_argument("--among", nargs="*", default=[], help="sets whose passages stand beside")
    parser.add_argument("--skip", type=int, default=0)
    parser.add_argument("--questions", type=int, default=None)
    parser.add_argument("--store", default=":memory:", help="folder of the store")
    parser.add_argument("--tier", default="keys", choices=["keys", "cache"])
    parser.add_argument("--codec", default="int8", choices=["float16", "int8", "int4"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    known = read_set(options.suite, options.data)
    order = np.random.default_rng(0).permutation(len(known.questions))[options.skip :]
    asked = [
        known.questions[place]
        for place in order[: options.questions]
        if known.questions[place].gold
    ]
    passages = list(known.passages)
    for name in options.among:
        passages += read_set(name, options.data).passages
    draft = Compressor.load(options.draft, dtype="float32", device="cpu")
    store = PassageStore.open(options.store, draft, tier=options.tier, codec=options.codec)
    index = read(store, passages)
    table = ranks(index, store, passages, asked, options.embedder)
    print(f"{len(asked)} questions of {options.suite}, {len(passages)} passages")
    show(table)


def read(store: PassageStore, passages: Sequence[Passage]) -> LateIndex:
    """Index the passages, and tell what it took."""
    began = time.perf_counter()
    new = store.add(passages)
    middle = time.perf_counter()
    index = LateIndex(passages, store, lexical_weight=0.0)
    held = store.stats()
    print(
        f"{new} passages read in {middle - began:.0f} s, indexed in "
        f"{time.perf_counter() - middle:.0f} s; {held.rows} tokens, "
        f"{held.bytes / max(1, held.rows):.0f} bytes a token on disk"
    )
    return index


def ranks(
    index: LateIndex,
    store: PassageStore,
    passages: Sequence[Passage],
    asked: Sequence[RealQuestion],
    embedder: str,
) -> dict[str, list[int]]:
    """The rank of the first passage that answers, by each way, question by question."""
    texts = [passage.text for passage in passages]
    words, encoder = Bm25(texts), load_encoder(embedder, device="cpu")
    vectors = encoder.embed_documents(texts)
    few = LateIndex(passages, store, first=FIRST)
    ways: dict[str, Callable[[str], torch.Tensor]] = {
        "late interaction": index.scores,
        f"of the best {FIRST} by BM25": few.scores,
        "embedder": lambda question: vectors @ encoder.embed_query(question),
        "BM25": lambda question: torch.tensor(words.scores(question)).float(),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    found: dict[str, list[int]] = {}
    for question in asked:
        scores = []
        for name, way in ways.items():
            began = time.perf_counter()
            scores.append(way(question.text))
            seconds[name].append(time.perf_counter() - began)
        for name, own in combined(*scores).items():
            found.setdefault(name, []).append(rank(own, list(question.gold)))
    for name, taken in seconds.items():
        print(f"{name}: {1000 * statistics.median(taken):.0f} ms a question")
    return found


def combined(
    late: torch.Tensor, few: torch.Tensor, near: torch.Tensor, bm25: torch.Tensor
) -> dict[str, torch.Tensor]:
    """(passages,) scores of each way and of their fusions."""
    least = late[late > -torch.inf].min()
    late, meaning, words = standard(late.clamp(min=float(least))), standard(near), standard(bm25)
    return {
        "BM25": bm25,
        "embedder": near,
        "BM25 and embedder, rrf": rrf(bm25, near),
        "BM25 and embedder": words + meaning,
        "late interaction alone": late,
        "late interaction and BM25": late + LEXICAL_WEIGHT * words,
        f"the same for the best {FIRST} of BM25": few,
        "late interaction and BM25, rrf": rrf(late, bm25),
        "late interaction and embedder": late + meaning,
        "late interaction and embedder, rrf": rrf(late, near),
        "all three": late + LEXICAL_WEIGHT * words + meaning,
    }


def rank(scores: torch.Tensor, gold: list[int]) -> int:
    """The place of the first of `gold`, equal scores in front of it; the last for none."""
    best = scores[gold].max()
    return int((scores >= best).sum()) if best > -torch.inf else len(scores)


def rrf(*scores: torch.Tensor) -> torch.Tensor:
    """Reciprocal rank fusion."""
    return torch.tensor(fused(*map(_scorer, scores))("", [""] * len(scores[0])))


def _scorer(scores: torch.Tensor) -> Scorer:
    return lambda _question, _texts: scores.tolist()


def show(found: dict[str, list[int]]) -> None:
    """Recall at 1, 5 and 20, and the mean reciprocal rank with its difference from BM25's."""
    print("| | 1 | 5 | 20 | MRR | MRR against BM25 |\n|---|---|---|---|---|---|")
    base = [1 / rank for rank in found["BM25"]]
    for name, own in found.items():
        recall = (f"{100 * sum(r <= depth for r in own) / len(own):.1f}" for depth in DEPTHS)
        inverse = [1 / rank for rank in own]
        change, low, high = paired_difference(inverse, base)
        print(
            f"| {name} | {' | '.join(recall)} | {statistics.mean(inverse):.3f} | "
            f"{change:+.3f} [{low:+.3f}, {high:+.3f}] |"
        )


if __name__ == "__main__":
    main()

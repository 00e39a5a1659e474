"""LLMLingua 0.2.2 (transformers 4) on prompts from a file; `run.py` calls it in its environment.

LongLLMLingua's settings as its README gives them, LLMLingua's as its code has them by default (it
does not look at the question), with draftsieve's draft as the small model. Three things differ,
each so that it can be compared at all:

- Which tokens stay is recorded, and every passage gets its own back; LLMLingua returns one text, in
  which nothing tells passages apart. So passages also keep their order (`reorder_context`).
- LLMLingua misses its target by far on short prompts (what follows the last whole segment of
  `iterative_size` tokens stays as it is), so the target is searched, then the segment made smaller,
  until the kept text fills the budget and does not exceed it. `asked` tells what came at first.
- It loads OpenAI's vocabulary from the network to count its savings; that count is left out.
"""

from __future__ import annotations

import logging
import sys
import time
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import tiktoken
import torch
from common import (
    FILLED,
    REFUSALS,
    append_row,
    closest,
    finished,
    next_target,
    passage_spans,
    read_rows,
)
from llmlingua import PromptCompressor
from tqdm import tqdm

METHODS: dict[str, dict[str, Any]] = {
    "longllmlingua": {
        "condition_in_question": "after_condition",
        "reorder_context": "original",
        "dynamic_context_compression_ratio": 0.3,
        "condition_compare": True,
        "context_budget": "+100",
        "rank_method": "longllmlingua",
        "concate_question": False,
    },
    "llmlingua": {"concate_question": False},
}
SEGMENTS, TRIES = (200, 100, 50), 5  # LLMLingua's iterative_size (first the default), and targets
SEPARATOR = "\n\n"  # LLMLingua joins passages by it


def main() -> None:
    """Arguments: prompts file, draft model, answers file."""
    prompts, name, out = sys.argv[1:4]
    logging.getLogger("transformers").setLevel(logging.ERROR)  # LLMLingua passes caches as tuples
    compressor = Tracing(name)
    done = finished(read_rows(Path(out)))
    for row in tqdm(read_rows(Path(prompts)), "llmlingua"):
        for method, wanted in product(METHODS, row["budgets"]):
            if (row["id"], method, wanted["budget"]) not in done:
                found = fit(compressor, row, wanted["passage_tokens"], method)
                what = {"id": row["id"], "method": method, "budget": wanted["budget"]}
                append_row(Path(out), {**what, **found})


class Tracing(PromptCompressor):
    """A compressor that also knows which characters of which passages it kept."""

    def __init__(self, name: str) -> None:
        tiktoken.encoding_for_model = lambda _: SimpleNamespace(encode=str.split)
        super().__init__(name, device_map="cpu", model_config={"trust_remote_code": False})
        self.used: list[int] = []
        self.popped: list[torch.Tensor] = []

    def count(self, text: str) -> int:
        """Tokens of a text."""
        return len(self.tokenizer(text, add_special_tokens=False).input_ids)

    def shorten(
        self, row: dict[str, Any], target: int, segment: int, options: dict[str, Any]
    ) -> dict[str, Any]:
        """Shortened passages, the kept characters of each, tokens kept, and seconds."""
        began = time.perf_counter()
        passages = row["passages"]
        self.used = list(range(len(passages)))
        self.compress_prompt(
            passages,
            question=row["question"],
            target_token=target,
            iterative_size=segment,
            **options,
        )
        lengths = [len(passages[index]) for index in self.used]
        ids: list[list[int]] = [[] for _ in passages]
        kept: list[list[tuple[int, int]]] = [[] for _ in passages]
        for token, bounds in zip(self.ids, self.bounds, strict=True):
            for place, start, end in passage_spans([bounds], lengths, self.first, len(SEPARATOR)):
                ids[self.used[place]].append(token)
                kept[self.used[place]].append((start, end))
        texts = [self.tokenizer.decode(own).strip() for own in ids]
        seconds = time.perf_counter() - began
        size = sum(map(self.count, texts))
        return {"texts": texts, "kept": kept, "tokens": size, "seconds": round(seconds, 4)}

    def control_context_budget(self, *args: Any, **options: Any) -> Any:
        """Note which passages go on to the second stage."""
        found = super().control_context_budget(*args, **options)
        self.used = list(found[2])
        return found

    def iterative_compress_prompt(self, context: list[str], *args: Any, **options: Any) -> Any:
        """Note the characters of every token that stays.

        Where the question conditions it, `context` begins with the question, `start` tokens long.
        """
        encoded = self.tokenizer(
            SEPARATOR.join(context), add_special_tokens=False, return_offsets_mapping=True
        )
        self.places, self.popped = torch.arange(len(encoded.input_ids)).unsqueeze(0), []
        found = super().iterative_compress_prompt(context, *args, **options)
        places = torch.cat([*self.popped, self.places], dim=1)[0, options["start"] :].tolist()
        self.ids = [encoded.input_ids[place] for place in places]
        if self.ids != found[0][0].tolist():
            raise RuntimeError("the traced tokens are not those that LLMLingua returned")
        self.bounds = [encoded.offset_mapping[place] for place in places]
        self.first = len(context[0]) + len(SEPARATOR) if options["start"] else 0
        return found

    def get_compressed_input(
        self, loss: Any, input_ids: Any, attention_mask: Any, end: Any, **options: Any
    ) -> Any:
        """Drop from the places what is dropped from the ids; `end` is changed in place."""
        gone = self.places.shape[1] - input_ids.shape[1]
        if gone:  # beyond the model's window LLMLingua sets the beginning aside
            self.popped.append(self.places[:, :gone])
            self.places = self.places[:, gone:]
        drop = super().get_compressed_input
        self.places = drop(loss, self.places, attention_mask, int(end), **options)[0]
        return drop(loss, input_ids, attention_mask, end, **options)


def fit(compressor: Tracing, row: dict[str, Any], budget: int, method: str) -> dict[str, Any]:
    """What fills the budget best; `asked` is what came when the budget itself was asked for."""
    tried: list[dict[str, Any]] = []
    target = budget
    try:
        for segment, attempt in product(SEGMENTS, range(TRIES)):
            target = next_target(target, tried[-1]["tokens"], budget) if attempt else budget
            tried.append(compressor.shorten(row, target, segment, METHODS[method]))
            if FILLED * budget <= tried[-1]["tokens"] <= budget:
                break
    except REFUSALS as error:
        if not tried:
            nothing: list[Any] = [[] for _ in row["passages"]]
            return {"error": f"{type(error).__name__}: {error}", "kept": nothing}
    best = tried[closest([found["tokens"] for found in tried], budget)]
    probe = round(float(compressor.get_ppl(row["passages"][0])), 4)
    how = {"wanted": budget, "asked": tried[0]["tokens"], "tries": len(tried), "surprise": probe}
    return {**best, **how}


if __name__ == "__main__":
    main()

"""LLMLingua 0.2.2 (transformers 4) on prompts from a file; `run.py` calls it in its environment.

Two settings with our draft as the small model: LLMLingua's defaults, and LongLLMLingua's as its
README gives them (question-aware ranking of passages, contrastive token scores, dynamic ratio). The
compressed passages are returned in their original order, one text each.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from llmlingua import PromptCompressor

PLAIN = {"use_sentence_level_filter": False}
LONG = {
    "condition_in_question": "after_condition",
    "reorder_context": "original",
    "dynamic_context_compression_ratio": 0.3,
    "condition_compare": True,
    "context_budget": "+100",
    "rank_method": "longllmlingua",
}
MARK = "\n\n"


def main() -> None:
    """Arguments: prompts file, draft model, answers file."""
    prompts, name, out = sys.argv[1:4]
    compressor = PromptCompressor(model_name=name, device_map="cpu")
    with Path(out).open("w", encoding="utf-8") as file:
        for line in Path(prompts).read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            for wanted in row["budgets"]:
                for method, options in (("peer-llmlingua", PLAIN), ("peer-longllmlingua", LONG)):
                    began = time.perf_counter()
                    texts = compress(compressor, row, wanted["passage_tokens"], options)
                    result = {
                        "id": row["id"],
                        "method": method,
                        "budget": wanted["budget"],
                        "texts": texts,
                        "seconds": round(time.perf_counter() - began, 4),
                    }
                    file.write(json.dumps(result) + "\n")
                    file.flush()


def compress(
    compressor: PromptCompressor, row: dict[str, object], tokens: int, options: dict[str, object]
) -> list[str]:
    """The shortened passages; all that is left stands in the first one where marks were lost."""
    passages = list(row["passages"])  # type: ignore[call-overload]
    found = compressor.compress_prompt(
        [text.replace(MARK, "\n") for text in passages],
        instruction="",
        question=row["question"] if options is LONG else "",
        target_token=tokens,
        concate_question=False,
        **options,
    )
    parts = str(found["compressed_prompt"]).split(MARK)
    if len(parts) != len(passages):
        return [" ".join(parts), *[""] * (len(passages) - 1)]
    return parts


if __name__ == "__main__":
    main()

"""Greedy exact match of exported models on held-out names and values.

Run `python -m examples.train_builtin.evaluate --models core/builtin/target core/builtin/draft
--out examples/train_builtin/results.json`. The seed is not one that training or the choice of
checkpoints uses.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from .items import CELLS, Item, make_items
from .scenes import natural_sentences

logger = logging.getLogger(__name__)
SEED = 20270101


def wilson(right: int, count: int) -> tuple[float, float]:
    """95 % interval of a share."""
    if not count:
        return 0.0, 1.0
    z, share = 1.959964, right / count
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count**2)) / (1 + z * z / count)
    return max(0.0, middle - half), min(1.0, middle + half)


@torch.inference_mode()
def answer_all(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, items: list[Item], batch: int
) -> list[str]:
    """Greedy answers; prompts of similar length share a left-padded batch."""
    texts = [
        tokenizer.apply_chat_template(item.messages, add_generation_prompt=True, tokenize=False)
        for item in items
    ]
    order = sorted(range(len(items)), key=lambda number: items[number].tokens)
    answers = [""] * len(items)
    # an answer that is longer than every right one is wrong, however it ends
    longest = 4 + max(len(tokenizer.encode(item.turn.answer)) for item in items)
    for start in range(0, len(order), batch):
        numbers = order[start : start + batch]
        inputs = tokenizer(
            [texts[n] for n in numbers],
            return_tensors="pt",
            padding=True,
            padding_side="left",
            add_special_tokens=False,
            return_token_type_ids=False,
        ).to(str(model.device))
        out = model.generate(**inputs, do_sample=False, max_new_tokens=longest)  # type: ignore[operator]
        new = out[:, inputs["input_ids"].shape[1] :]
        for number, text in zip(
            numbers, tokenizer.batch_decode(new, skip_special_tokens=True), strict=True
        ):
            answers[number] = text
    return answers


def summarise(items: list[Item], answers: list[str]) -> dict[str, object]:
    """Shares with intervals; one-fact items also by what makes them hard."""
    exact = [answer == item.turn.answer for item, answer in zip(items, answers, strict=True)]

    def share(chosen: list[bool]) -> dict[str, object]:
        low, high = wilson(sum(chosen), len(chosen))
        return {
            "right": sum(chosen),
            "items": len(chosen),
            "exact": round(sum(chosen) / max(1, len(chosen)), 4),
            "low": round(low, 4),
            "high": round(high, 4),
        }

    result = share(exact)
    result["mean_tokens"] = round(sum(item.tokens for item in items) / len(items))
    result["mean_facts"] = round(sum(item.facts for item in items) / len(items), 1)
    if items[0].turn.type == "one-fact":
        pairs = list(zip(items, exact, strict=True))
        result["shares_only_name"] = share([ok for item, ok in pairs if item.turn.distant])
        result["shares_more"] = share([ok for item, ok in pairs if not item.turn.distant])
        result["name_first"] = share([ok for item, ok in pairs if not item.turn.value_first])
        result["value_first"] = share([ok for item, ok in pairs if item.turn.value_first])
    wrong = [(i, a) for i, a, ok in zip(items, answers, exact, strict=True) if not ok][:5]
    result["examples_of_errors"] = [
        {"question": i.turn.question, "wanted": i.turn.answer, "got": a} for i, a in wrong
    ]
    return result


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=Path, nargs="+", required=True)
    parser.add_argument("--corpus", type=Path, default=Path(".work/corpus"))
    parser.add_argument("--items", type=int, default=300)
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--cells", type=int, nargs="*", help="numbers of cells; default all")
    parser.add_argument("--batch", type=int, default=20)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if options.threads:
        torch.set_num_threads(options.threads)
    corpus = natural_sentences(options.corpus / "sentences.txt")
    cells = [CELLS[n] for n in options.cells] if options.cells else list(CELLS)
    done = json.loads(options.out.read_text(encoding="utf-8")) if options.out.exists() else {}
    done |= {"seed": options.seed, "items_per_cell": options.items, "dtype": options.dtype}
    for folder in options.models:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=options.dtype)
        model = model.to(options.device).eval()
        raw = Tokenizer.from_file(str(folder / "tokenizer.json"))
        table = done.setdefault("models", {}).setdefault(folder.name, {})
        for cell in cells:
            started = time.perf_counter()
            items = make_items(cell, options.items, options.seed, corpus, raw)
            result = summarise(items, answer_all(model, tokenizer, items, options.batch))
            table[cell.name] = result
            seconds = time.perf_counter() - started
            logger.info(
                "%-8s %-34s %5.1f %% [%.1f, %.1f]  %.0f s",
                folder.name,
                cell.name,
                *(100 * float(str(result[key])) for key in ("exact", "low", "high")),
                seconds,
            )
            temporary = options.out.with_suffix(".tmp")
            temporary.write_text(json.dumps(done, indent=1) + "\n", encoding="utf-8")
            os.replace(temporary, options.out)


if __name__ == "__main__":
    main()

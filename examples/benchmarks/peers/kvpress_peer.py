"""kvpress 0.5 (transformers 5.2) on prompts from a file; `run.py` calls it in its environment.

SnapKV and AdaKV look at the question: they compress the whole chat prompt but its last token, which
is fed to begin the answer. Expected Attention and KVzip do not: as in kvpress's pipeline they
compress what stands before the question, and the rest of the prompt is fed whole. Its entries are
charged to the budget, so that all presses, and draftsieve's methods, begin with equally many.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import (
    REFUSALS,
    append_row,
    finished,
    read_rows,
    removed_share,
    removed_share_overall,
)
from kvpress import AdaKVPress, ExpectedAttentionPress, KVzipPress, SnapKVPress
from reading import compared, expected_answer
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

WINDOW = 32  # draftsieve's; kvpress's default of 64 is longer than most questions
WHOLE = "kvpress-none"
ASKED: dict[str, Callable[[float], Any]] = {
    "kvpress-snapkv": lambda share: SnapKVPress(share, window_size=WINDOW),
    "kvpress-adakv": lambda share: AdaKVPress(SnapKVPress(share, window_size=WINDOW)),
}
UNASKED: dict[str, Callable[[float], Any]] = {
    "kvpress-expected-attention": ExpectedAttentionPress,
    "kvpress-kvzip": KVzipPress,
}


def main() -> None:
    """Arguments: prompts file, model, answers file."""
    prompts, name, out = sys.argv[1:4]
    logging.getLogger("kvpress").setLevel(logging.ERROR)  # KVzip warns once a prompt
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).eval()
    done = finished(read_rows(Path(out)))
    for row in tqdm(read_rows(Path(prompts)), "kvpress"):
        cells = [(WHOLE, 1.0, len(row["ids"]))]
        for wanted in row["budgets"]:
            cells += [(m, wanted["budget"], wanted["entries"]) for m in (*ASKED, *UNASKED)]
        missing = [cell for cell in cells if (row["id"], *cell[:2]) not in done]
        full: torch.Tensor | None = None
        if missing and row["reference"]:
            full = run(model, tokenizer, {**row, "max_new_tokens": 0}, *cells[0][::2])[1]
        for method, budget, entries in missing:
            said, expected = run(model, tokenizer, row, method, entries)
            if full is not None and expected is not None:
                said |= compared(full, expected, row["reference"])
            append_row(Path(out), {"id": row["id"], "method": method, "budget": budget, **said})


def run(
    model: Any, tokenizer: Any, row: dict[str, Any], method: str, entries: int
) -> tuple[dict[str, Any], torch.Tensor | None]:
    """One answer, with the entries a head that were really kept, on average.

    Returns:
        It, and (reference, vocabulary) logarithms of probabilities at the reference's tokens.
    """
    began = time.perf_counter()
    ids = torch.tensor([row["ids"]])  # (1, tokens)
    try:
        said, kept, expected, reading = answer(
            model,
            method,
            ids,
            row["question_start"],
            entries,
            row["max_new_tokens"],
            row["reference"],
        )
    except REFUSALS as error:
        return {"error": f"{type(error).__name__}: {error}"}, None
    text = tokenizer.decode(said, skip_special_tokens=True)
    seconds = round(time.perf_counter() - began - reading, 4)
    return {"text": text, "entries": kept, "seconds": seconds}, expected


@torch.no_grad()
def answer(
    model: Any,
    method: str,
    ids: torch.Tensor,
    question: int,
    entries: int,
    most: int,
    reference: list[int],
) -> tuple[list[int], float, torch.Tensor | None, float]:
    """Greedy answer from a compressed cache, at original positions.

    Returns:
        The answer's ids; the entries a head held when the last prompt token was fed; what is
        expected at the reference's tokens, if there are any; and the seconds that this took.
    """
    tokens, cache = ids.shape[1], DynamicCache()
    read = question if method in UNASKED else tokens - 1
    kept = entries - (tokens - 1 - read)
    if kept < 1:
        raise ValueError(
            f"{entries} entries cannot hold the {tokens - 1 - read} after the passages"
        )
    if method == WHOLE:
        model.model(input_ids=ids[:, :read], past_key_values=cache)
    else:
        with press(model, method, kept, read)(model):
            model.model(input_ids=ids[:, :read], past_key_values=cache)
    held = held_entries(model, cache) + tokens - 1 - read
    feed, position, said = ids[:, read:], torch.arange(read, tokens).unsqueeze(0), []
    began, expected = time.perf_counter(), None
    if reference:
        expected = expected_answer(model, cache, feed, read, reference)
    reading = time.perf_counter() - began
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    for _ in range(most):
        out = model(input_ids=feed, past_key_values=cache, position_ids=position)
        feed = out.logits[:, -1:].argmax(-1)  # (1, 1)
        position = position[:, -1:] + 1
        said.append(int(feed))
        if said[-1] in ends:
            break
    return said, held, expected, reading


def press(model: Any, method: str, kept: int, read: int) -> Any:
    """A press that keeps a number of the entries read, on average over heads."""
    if method == "kvpress-kvzip":  # it shares out over all heads of all layers
        heads = model.config.num_hidden_layers * model.config.num_key_value_heads
        return UNASKED[method](removed_share_overall(kept, read, heads))
    return {**ASKED, **UNASKED}[method](removed_share(kept, read))


def held_entries(model: Any, cache: Any) -> float:
    """Entries a head, on average: those stored, less those that kvpress masks."""
    found = []
    for layer, stored in zip(model.model.layers, cache.layers, strict=True):
        masked = getattr(layer.self_attn, "masked_key_indices", None)
        heads, columns = stored.keys.shape[1:3]
        found.append(columns - (0 if masked is None else len(masked[0])) / heads)
    return sum(found) / len(found)


if __name__ == "__main__":
    main()

"""kvpress 0.5 (transformers 5.2) on prompts from a file; `run.py` calls it in its environment.

The whole chat prompt but its last token is compressed, so that the question is seen; the last token
is fed to begin the answer. The ratio is chosen so that as many entries stay per head, on average,
as draftsieve's methods keep.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from kvpress import AdaKVPress, ExpectedAttentionPress, KVzipPress, SnapKVPress
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

PRESSES = {
    "kvpress-snapkv": lambda ratio: SnapKVPress(compression_ratio=ratio, window_size=32),
    "kvpress-adakv": lambda ratio: AdaKVPress(SnapKVPress(compression_ratio=ratio, window_size=32)),
    "kvpress-expected-attention": lambda ratio: ExpectedAttentionPress(compression_ratio=ratio),
    "kvpress-kvzip": lambda ratio: KVzipPress(compression_ratio=ratio),
}


def main() -> None:
    """Arguments: prompts file, model, answers file."""
    prompts, name, out = sys.argv[1:4]
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).eval()
    ends = model.generation_config.eos_token_id
    ends = set(ends if isinstance(ends, list) else [ends])
    with Path(out).open("w", encoding="utf-8") as file:
        for line in Path(prompts).read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            ids = torch.tensor([row["ids"]])
            for wanted in row["budgets"]:
                ratio = max(0.0, 1 - wanted["entries"] / (ids.shape[1] - 1))
                for method, make in PRESSES.items():
                    began = time.perf_counter()
                    said = answer(model, make(ratio), ids, row["max_new_tokens"], ends)
                    result = {
                        "id": row["id"],
                        "method": method,
                        "budget": wanted["budget"],
                        "entries": wanted["entries"],
                        "text": tokenizer.decode(said, skip_special_tokens=True),
                        "seconds": round(time.perf_counter() - began, 4),
                    }
                    file.write(json.dumps(result) + "\n")
                    file.flush()


@torch.no_grad()
def answer(model: Any, press: Any, ids: torch.Tensor, most: int, ends: set[int]) -> list[int]:
    """Greedy answer from a compressed cache, at original positions."""
    cache = DynamicCache()
    with press(model):
        model.model(input_ids=ids[:, :-1], past_key_values=cache)
    feed, said = ids[:, -1:], []
    for step in range(most):
        position = torch.tensor([[ids.shape[1] - 1 + step]])
        out = model(input_ids=feed, past_key_values=cache, position_ids=position)
        token = int(out.logits[0, -1].argmax())
        said.append(token)
        if token in ends:
            break
        feed = torch.tensor([[token]])
    return said


if __name__ == "__main__":
    main()

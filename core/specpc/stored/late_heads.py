"""The heads in which questions and stored passages are compared (`late.py`), draft by draft."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from transformers import PreTrainedModel

from ...errors import ModelError
from ...models.loading import fingerprint
from ...types import TensorValue
from ..head_weights import alike_norms, norms_of

SHIPPED = Path(__file__).parents[1] / "late_heads"


_KNOWN: WeakKeyDictionary[PreTrainedModel, LateHeads | None] = WeakKeyDictionary()


@dataclass(frozen=True, slots=True, eq=False)
class LateHeads(TensorValue):
    """The heads of one draft in which questions and passages are compared.

    `alike` are (layer, KV head), whose vectors are joined to one a token; `looking` are (layer,
    attention head, share), each with its share beside the former's 1.
    """

    alike: tuple[tuple[int, int], ...]
    looking: tuple[tuple[int, int, float], ...]
    passage_mean: torch.Tensor  # (alike, width) float32, the mean key of passages
    question_mean: torch.Tensor  # (alike, width) float32, the mean key of questions
    weights: str  # fingerprint of the draft
    about: Mapping[str, Any] = field(default_factory=dict, hash=False)  # how they were chosen
    family: tuple[float, ...] = ()  # `norms_of` that draft: known again however it is quantised

    def stored(self, model: PreTrainedModel) -> list[tuple[int, int]]:
        """(layer, KV head) of the keys that are compared: first `alike`, then `looking`."""
        config = model.config.get_text_config()
        group = config.num_attention_heads // config.num_key_value_heads
        return [*self.alike, *((layer, head // group) for layer, head, _ in self.looking)]

    @classmethod
    def load(cls, path: str | Path) -> LateHeads:
        """Read a file of the package's form.

        Raises:
            ModelError: It holds something else.
        """
        try:
            row = json.loads(Path(path).read_text(encoding="utf-8"))
            return cls(
                tuple((int(layer), int(head)) for layer, head in row["alike"]),
                tuple((int(layer), int(head), float(w)) for layer, head, w in row["looking"]),
                torch.tensor(row["passage_mean"]),
                torch.tensor(row["question_mean"]),
                str(row["weights"]),
                row["about"],
                tuple(map(float, row["family"])),
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ModelError(f"{str(path)!r} holds no heads to compare in: {error}.") from error


def late_heads(model: PreTrainedModel) -> LateHeads | None:
    """The heads that the package knows of a draft, in whatever precision; None for others."""
    if model not in _KNOWN:
        shipped = map(LateHeads.load, sorted(SHIPPED.glob("*.json")))
        own, norms = fingerprint(model), norms_of(model)
        fit = (each for each in shipped if each.weights == own or alike_norms(each.family, norms))
        _KNOWN[model] = next(fit, None)
    return _KNOWN[model]

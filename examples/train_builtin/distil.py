"""Distillation: the draft learns to answer as the target does, not only what is right.

What a draft is for is to guess the target's answer and what the target will look at, so it should
also share the target's doubts and mistakes.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from .import_weights import lean_weights
from .model import PLAIN, SHAPES, Arithmetic, LeanLlama, rope_tables


class Teacher:
    """An exported target, which does not learn.

    Args:
        folder: The export.
        device: Where the pupil trains.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.model = LeanLlama(SHAPES["target"]).to(device).eval()
        weights = load_file(folder / "model.safetensors")
        self.model.load_state_dict(lean_weights(weights, SHAPES["target"]))
        self._tables: dict[int, tuple[Tensor, Tensor]] = {}

    @torch.no_grad()
    def logits(self, ids: Tensor, picked: Tensor, arithmetic: Arithmetic = PLAIN) -> Tensor:
        """What `LeanLlama.forward` gives for ids (batch, length) at flat positions `picked`."""
        length = ids.shape[1]
        if length not in self._tables:
            cos, sin = rope_tables(self.model.shape, length)
            self._tables[length] = cos.to(ids.device), sin.to(ids.device)
        with torch.autocast(ids.device.type, torch.bfloat16):
            logits, _ = self.model(ids, *self._tables[length], picked, arithmetic)
        return logits.float()


def distil_loss(pupil: Tensor, teacher: Tensor) -> Tensor:
    """Mean KL divergence of the pupil's distribution from the teacher's; both (tokens, vocabulary).

    Zero where there are no tokens.
    """
    if not len(pupil):
        return pupil.sum()
    logs = pupil.log_softmax(-1), teacher.log_softmax(-1)
    return F.kl_div(*logs, reduction="batchmean", log_target=True)

"""Shared tiny models: deterministic checkpoints of the recorded cases, and families from configs."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("BITSANDBYTES_NOWELCOME", "1")

import torch

torch.set_num_threads(1)  # the models are tiny: threads only wait for each other

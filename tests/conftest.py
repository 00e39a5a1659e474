"""Every test runs offline and on one thread."""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # of scripts that tests start, too

import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("BITSANDBYTES_NOWELCOME", "1")

torch.set_num_threads(1)  # the models are tiny: threads only wait for each other

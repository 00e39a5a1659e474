"""Every test runs offline, on one thread, as do the scripts that tests start."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("BITSANDBYTES_NOWELCOME", "1")

import torch
from filelock import FileLock

from draftsieve.core.errors import DraftSieveError
from draftsieve.core.models.fetched import fetch, published


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The models are tiny: threads only wait for each other."""
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Name of a real model. Fetched, where that can be done quickly; else its tests are skipped."""
    name = "smollm2-135m"
    run = os.environ.get("PYTEST_XDIST_TESTRUNUID", str(os.getpid()))
    failure = Path(tmp_path_factory.getbasetemp().parent, f"no-{name}-{run}")
    with FileLock(f"{failure}.lock"):  # of several processes one tries
        if not failure.exists():
            try:
                fetch(published(name), progress=False, timeout=90)
            except (DraftSieveError, OSError) as error:  # a cache folder may be read-only
                failure.write_text(str(error), encoding="utf-8")
        if failure.exists():
            pytest.skip(f"`draftsieve models get {name}` did not work: {failure.read_text()}")
    return name

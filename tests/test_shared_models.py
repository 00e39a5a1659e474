"""Models that adapters share: loaded once a process for the same options."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from transformers import BitsAndBytesConfig

from draftsieve import Compressor, Quantization
from draftsieve.core.errors import ModelNotFoundError
from draftsieve.core.models.names import resolve
from draftsieve.core.models.shared import clear_loaded_models, shared_model
from draftsieve.integrations.langchain import (
    ChatDraftSieve,
    DraftCompressionMiddleware,
    DraftCompressor,
)
from draftsieve.integrations.llama_index import DraftSieveLLM, DraftSievePostprocessor
from draftsieve.retrievers import langchain as lc
from draftsieve.retrievers import llama_index as li


@pytest.fixture(autouse=True)
def _nothing_loaded() -> Iterator[None]:
    clear_loaded_models()
    yield
    clear_loaded_models()


def test_threads_that_ask_at_once_load_once() -> None:
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: shared_model("builtin:draft", device="cpu"), range(4)))
    assert len({id(loaded.model) for loaded in found}) == 1


def test_the_same_model_said_otherwise_is_the_same() -> None:
    first = shared_model("builtin:draft", device="cpu", progress=False)
    folder = Path(resolve("builtin:draft"))
    nearby = os.path.relpath(folder)
    for same in (
        shared_model("builtin:draft", device="cpu", progress=True),
        shared_model("builtin:draft", device="cpu", revision=None, trust_remote_code=False),
        shared_model(folder, device="cpu"),
        shared_model(f"./{nearby}", device="cpu"),
    ):
        assert same is first
    exact = shared_model("builtin:draft", device="cpu", dtype="float32", progress=False)
    assert shared_model("builtin:draft", device="cpu", dtype=torch.float32) is exact


def test_other_options_are_another_model() -> None:
    plain = shared_model("builtin:draft", device="cpu", progress=False)
    half = shared_model("builtin:draft", device="cpu", dtype="bfloat16", progress=False)
    eager = shared_model("builtin:draft", device="cpu", attn_implementation="eager", progress=False)
    four = shared_model(
        "builtin:draft", device="cpu", quantization=Quantization(bits=4), progress=False
    )
    config = BitsAndBytesConfig(load_in_4bit=True)
    ready = shared_model("builtin:draft", device="cpu", quantization=config, progress=False)
    assert len({id(loaded.model) for loaded in (plain, half, eager, four, ready)}) == 5
    again = BitsAndBytesConfig(load_in_4bit=True)
    assert ready is shared_model("builtin:draft", device="cpu", quantization=again, progress=False)


def test_a_shared_model_serves_several_compressors() -> None:
    texts = ["Badge AK-731 was issued to Mira Tolen. She plays chess.", "Her room is 214."]
    alone = Compressor.load("builtin:draft", device="cpu", progress=False)
    expected = alone.compress("Which badge was issued to Mira Tolen?", texts).text
    pair = [shared_model("builtin:draft", device="cpu", progress=False) for _ in range(2)]
    users = [Compressor(loaded.model, loaded.tokenizer, progress=False) for loaded in pair]
    assert users[0].model is users[1].model is not alone.model
    for user in users:
        assert user.compress("Which badge was issued to Mira Tolen?", texts).text == expected


def test_a_failure_is_not_kept_and_clearing_forgets(tmp_path: Path) -> None:
    folder = tmp_path / "draft"
    with pytest.raises(ModelNotFoundError):
        shared_model(folder, progress=False)
    first = shared_model("builtin:draft", device="cpu", progress=False)
    first.model.save_pretrained(folder)
    first.tokenizer.save_pretrained(folder)
    assert shared_model(folder, device="cpu", progress=False) is not first
    clear_loaded_models()
    assert shared_model("builtin:draft", device="cpu", progress=False) is not first


def test_adapters_load_a_draft_once_and_each_its_own_target() -> None:
    draft = {"device": "cpu", "progress": False}
    pair = {"model": "builtin:target", "draft": "builtin:draft", "device": "cpu"}
    chats = [ChatDraftSieve(**pair, temperature=t) for t in (0.0, 1.0)]
    llm = DraftSieveLLM(**pair)
    compressors = [
        DraftCompressor(**draft).loaded,
        DraftCompressionMiddleware(**draft).compressor,
        DraftSievePostprocessor(**draft).loaded,
        lc.SievedRetriever(retriever=lc.Bm25Retriever.from_documents([]), **draft).loaded,
        li.SievedRetriever(li.Bm25Retriever.from_nodes([]), **draft).options.loaded,
    ]
    drafts = [c.model for c in compressors] + [m.loaded.draft for m in (*chats, llm)]
    assert len({id(model) for model in drafts}) == 1
    assert len({id(model.loaded.target) for model in (*chats, llm)}) == 3
    clear_loaded_models()
    assert DraftCompressor(**draft).loaded.model is not drafts[0]

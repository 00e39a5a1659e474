"""DraftCompressor: copies, order, metadata, failures, time, callbacks; one core call each."""

from __future__ import annotations

import asyncio
import json
import sys
import threading
from copy import deepcopy
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from langchain_core.callbacks import BaseCallbackHandler

from draftsieve.core.compressor import Compressor
from draftsieve.core.config import SpecPC
from draftsieve.core.errors import (
    BudgetError,
    ConfigError,
    MissingExtraError,
    ModelNotFoundError,
    RequestTimeoutError,
)
from draftsieve.integrations.langchain import ChatDraftSieve, DraftCompressor, DraftSieveLLM

from .adapters_fixtures import (
    QUESTION,
    TEXTS,
    counted,
    tiny_compressor,
    tiny_model,
    tiny_tokenizer,
)
from .langchain_fixtures import METHOD, TINY, documents, pair_folder


def test_documents_are_shortened_copies_with_provenance() -> None:
    given = documents()
    before = deepcopy(given)
    compressor = DraftCompressor(compressor=tiny_compressor(), method=METHOD)
    with counted(tiny_compressor()) as calls:
        found = compressor.compress_documents(given, QUESTION)
    assert calls == ["compress"]
    assert given == before
    context = tiny_compressor().compress(QUESTION, TEXTS, METHOD)
    assert [d.page_content for d in found] == [p.text for p in context.passages]
    assert sum(len(d.page_content) for d in found) < sum(map(len, TEXTS))
    assert [d.id for d in found] == ["a", "a", None]
    for index, document in enumerate(found):
        kept = document.metadata.pop("draftsieve")
        assert document.metadata == given[index].metadata
        assert kept["spans"] == [
            {"start": s.start, "end": s.end, "score": s.score}
            for s in context.spans
            if s.passage_index == index
        ]
        size = context.sizes[index]
        assert (kept["tokens"], kept["compressed_tokens"]) == (size.tokens, size.compressed_tokens)
        assert kept["score"] == size.score
        assert kept["fallback"] is None
        assert json.loads(json.dumps(kept)) == kept


def test_copies_share_nothing_with_their_documents() -> None:
    given = documents()
    found = DraftCompressor(compressor=tiny_compressor()).compress_documents(given, QUESTION)
    found[0].metadata["tags"][0]["n"] = 99
    found[0].metadata["source"] = "changed"
    assert given == documents()


def test_dropped_documents_keep_the_others_aligned() -> None:
    method = SpecPC(ratio=0.4, drop_empty=True)
    context = tiny_compressor().compress(QUESTION, TEXTS, method)
    assert context.indices == (1, 2)  # the first document goes
    compressor = DraftCompressor(compressor=tiny_compressor(), method=method)
    found = compressor.compress_documents(documents(), QUESTION)
    assert [d.metadata["source"] for d in found] == [f"{i}.md" for i in context.indices]


async def test_async_compression_equals_sync() -> None:
    compressor = DraftCompressor(compressor=tiny_compressor(), method=METHOD)
    with counted(tiny_compressor()) as calls:
        found = await compressor.acompress_documents(documents(), QUESTION)
    assert calls == ["acompress"]
    assert found == compressor.compress_documents(documents(), QUESTION)


def test_a_failed_compression_gives_the_originals_and_says_why(
    caplog: pytest.LogCaptureFixture,
) -> None:
    compressor = DraftCompressor(compressor=tiny_compressor(), method=TINY)
    found = compressor.compress_documents(documents(), QUESTION)
    assert [d.page_content for d in found] == TEXTS
    assert "BudgetError" in found[0].metadata["draftsieve"]["fallback"]
    assert any(record.levelname == "WARNING" for record in caplog.records)


def test_a_failed_compression_raises_where_asked() -> None:
    compressor = DraftCompressor(compressor=tiny_compressor(), method=TINY, on_error="raise")
    with pytest.raises(BudgetError):
        compressor.compress_documents(documents(), QUESTION)


def test_nothing_to_compress_calls_nothing() -> None:
    compressor = DraftCompressor(compressor=tiny_compressor())
    with counted(tiny_compressor()) as calls:
        assert compressor.compress_documents([], QUESTION) == []
    assert calls == []


def test_a_compressor_loads_when_it_is_made(tmp_path: Path) -> None:
    compressor = DraftCompressor(
        model=str(pair_folder(tmp_path)), device="cpu", progress=False, method=METHOD
    )
    same = DraftCompressor(compressor=tiny_compressor(), method=METHOD)
    given = documents()
    assert compressor.compress_documents(given, QUESTION) == same.compress_documents(
        given, QUESTION
    )


@pytest.mark.parametrize("make", [DraftCompressor, ChatDraftSieve, DraftSieveLLM])
def test_wrong_options_and_models_fail_at_construction(make: Any, tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError):
        make(model=str(tmp_path / "gone"))
    with pytest.raises(ConfigError, match="capacty"):
        make(model=str(tmp_path / "gone"), capacty=3)
    with pytest.raises(ConfigError, match="on_error"):
        make(model=str(tmp_path / "gone"), on_error="ignore")


def test_missing_langchain_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in sys.modules if n.startswith("draftsieve.integrations.langchain")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "langchain_core", None)
    with pytest.raises(MissingExtraError, match=r'pip install "draftsieve\[langchain\]"'):
        import_module("draftsieve.integrations.langchain")


def test_a_compression_out_of_time_gives_the_originals_or_raises() -> None:
    late = {"compressor": tiny_compressor(), "method": METHOD, "timeout": 1e-6}
    found = DraftCompressor(**late).compress_documents(documents(), QUESTION)
    assert [d.page_content for d in found] == TEXTS
    assert "RequestTimeoutError" in found[0].metadata["draftsieve"]["fallback"]
    with pytest.raises(RequestTimeoutError, match="seconds"):
        DraftCompressor(**late, on_error="raise").compress_documents(documents(), QUESTION)
    enough = DraftCompressor(**{**late, "timeout": 60.0})
    same = DraftCompressor(compressor=tiny_compressor(), method=METHOD)
    assert enough.compress_documents(documents(), QUESTION) == same.compress_documents(
        documents(), QUESTION
    )
    with pytest.raises(ConfigError, match="timeout"):
        DraftCompressor(compressor=tiny_compressor(), timeout=0)


def test_documents_come_in_order_or_best_first() -> None:
    options = {"compressor": tiny_compressor(), "method": METHOD}
    kept = DraftCompressor(**options).compress_documents(documents(), QUESTION)
    best = DraftCompressor(**options, keep_order=False).compress_documents(documents(), QUESTION)
    scores = [d.metadata["draftsieve"]["score"] for d in best]
    assert scores == sorted(scores, reverse=True)
    assert [d.metadata["source"] for d in best] != [d.metadata["source"] for d in kept]
    assert sorted(best, key=lambda d: d.metadata["source"]) == kept


def test_dropping_is_an_option_of_the_compressor_too() -> None:
    options = {
        "compressor": tiny_compressor(),
        "method": METHOD.model_copy(update={"unit": "token"}),
    }
    found = DraftCompressor(**options, drop_empty=True).compress_documents(documents(), QUESTION)
    whole = DraftCompressor(**options).compress_documents(documents(), QUESTION)
    assert [d for d in whole if d.page_content.strip()] == found
    assert len(found) < len(whole)


def test_little_text_stays_whole_and_unread() -> None:
    tokens = tiny_compressor().compress(QUESTION, TEXTS, METHOD).stats.passage_tokens
    options = {"compressor": tiny_compressor(), "method": METHOD}
    whole = DraftCompressor(**options, min_tokens=tokens + 1)
    found = whole.compress_documents(documents(), QUESTION)
    assert [d.page_content for d in found] == TEXTS
    assert found[0].metadata["draftsieve"]["fallback"] is None
    assert [d.metadata["draftsieve"]["score"] for d in found] == [0.0] * len(TEXTS)  # unread
    shorter = DraftCompressor(**options, min_tokens=tokens)
    assert [d.page_content for d in shorter.compress_documents(documents(), QUESTION)] != TEXTS


class Runs(BaseCallbackHandler):
    """Notes the chain runs it sees."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def on_chain_start(self, serialized: Any, inputs: Any, **kwargs: Any) -> None:
        self.seen.append((kwargs["name"], inputs.query, len(inputs.documents)))

    def on_chain_end(self, outputs: Any, **kwargs: Any) -> None:
        self.seen.append([d.page_content for d in outputs])

    def on_chain_error(self, error: BaseException, **kwargs: Any) -> None:
        self.seen.append(type(error))


async def test_callbacks_see_a_compression_as_a_run() -> None:
    compressor = DraftCompressor(compressor=tiny_compressor(), method=METHOD)
    runs = Runs()
    found = compressor.compress_documents(documents(), QUESTION, callbacks=[runs])
    expected = [("DraftCompressor", QUESTION, 3), [d.page_content for d in found]]
    assert runs.seen == expected
    runs = Runs()
    await compressor.acompress_documents(documents(), QUESTION, callbacks=[runs])
    assert runs.seen == expected
    failing = DraftCompressor(compressor=tiny_compressor(), method=TINY, on_error="raise")
    runs = Runs()
    with pytest.raises(BudgetError):
        failing.compress_documents(documents(), QUESTION, callbacks=[runs])
    assert runs.seen[1:] == [BudgetError]


async def test_an_async_compression_leaves_the_event_loop_free() -> None:
    """While the draft waits (here for a lock that the loop holds), the loop goes on."""
    released = threading.Event()

    class Waiting(Compressor):
        def compress_prompt(self, *args: Any, **options: Any) -> Any:
            assert released.wait(20), "the event loop was blocked"
            return super().compress_prompt(*args, **options)

    slow = Waiting(tiny_model(32, seed=1), tiny_tokenizer())
    compressor = DraftCompressor(compressor=slow, method=METHOD)
    work = asyncio.create_task(compressor.acompress_documents(documents(), QUESTION))
    await asyncio.sleep(0.01)
    released.set()
    assert len(await work) == 3

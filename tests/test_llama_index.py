"""The LlamaIndex postprocessor over a tiny real draft: copies, order, provenance, one core call."""

from __future__ import annotations

import asyncio
import json
import sys
import threading
from copy import deepcopy
from importlib import import_module
from pathlib import Path
from runpy import run_path
from typing import Any

import pytest
from llama_index.core.instrumentation.events.rerank import ReRankEndEvent, ReRankStartEvent
from llama_index.core.schema import (
    Document,
    ImageNode,
    IndexNode,
    MediaResource,
    MetadataMode,
    NodeRelationship,
    NodeWithScore,
    QueryBundle,
    RelatedNodeInfo,
    TextNode,
)
from llama_index_instrumentation import get_dispatcher
from llama_index_instrumentation.event_handlers.base import BaseEventHandler
from pydantic import PrivateAttr

from draftsieve.core.compressor import Compressor
from draftsieve.core.config import SpecPC
from draftsieve.core.errors import (
    BudgetError,
    ConfigError,
    MissingExtraError,
    ModelNotFoundError,
    PromptError,
    RequestTimeoutError,
)
from draftsieve.core.types import CompressedContext
from draftsieve.integrations.llama_index import DraftSievePostprocessor

from .adapters_fixtures import (
    EXAMPLES,
    QUESTION,
    TEXTS,
    counted,
    tiny_compressor,
    tiny_model,
    tiny_tokenizer,
)

METHOD = SpecPC(ratio=0.4, unit="word")
QUERY = QueryBundle(QUESTION)


def nodes() -> list[NodeWithScore]:
    found = [
        TextNode(
            text=text,
            id_=f"n{n}",
            metadata={"file": f"{n}.md", "tags": ["x", {"n": n}]},
            excluded_llm_metadata_keys=["tags"],
            excluded_embed_metadata_keys=["file"],
            relationships={NodeRelationship.SOURCE: RelatedNodeInfo(node_id="doc")},
            start_char_idx=100 * n,
            end_char_idx=100 * n + len(text),
            embedding=[0.5, float(n)],
        )
        for n, text in enumerate(TEXTS)
    ]
    return [NodeWithScore(node=node, score=0.9 - n / 10) for n, node in enumerate(found)]


def postprocessor(**options: Any) -> DraftSievePostprocessor:
    return DraftSievePostprocessor(**{"compressor": tiny_compressor(), "method": METHOD, **options})


def plain(found: list[NodeWithScore]) -> list[dict[str, Any]]:
    return [node.to_dict() for node in found]


def test_nodes_are_shortened_copies_with_provenance() -> None:
    given = nodes()
    before = deepcopy(plain(given))
    with counted(tiny_compressor()) as calls:
        found = postprocessor().postprocess_nodes(given, QUERY)
    assert calls == ["compress"]
    assert plain(given) == before
    context = tiny_compressor().compress(QUESTION, TEXTS, METHOD)
    assert [n.node.get_content() for n in found] == [p.text for p in context.passages]
    assert sum(len(n.text) for n in found) < sum(map(len, TEXTS))
    for index, (old, new) in enumerate(zip(given, found, strict=True)):
        kept = new.node.metadata.pop("draftsieve")
        assert new.score == old.score
        assert new.node_id == old.node_id
        assert new.node.metadata == old.node.metadata
        assert new.node.relationships == old.node.relationships
        assert new.node.embedding == old.node.embedding
        assert new.node.get_node_info() == old.node.get_node_info()
        assert kept["spans"] == [
            {"start": s.start, "end": s.end, "score": s.score}
            for s in context.spans
            if s.passage_index == index
        ]
        assert kept["tokens"] == context.sizes[index].tokens
        assert kept["compressed_tokens"] == context.sizes[index].compressed_tokens
        assert kept["fallback"] is None
        assert json.loads(json.dumps(kept)) == kept


def test_models_do_not_see_the_provenance() -> None:
    given = nodes()
    found = postprocessor().postprocess_nodes(given, QUERY)
    again = postprocessor().postprocess_nodes(found, QUERY)
    for old, new in zip(given, again, strict=True):
        for mode in (MetadataMode.LLM, MetadataMode.EMBED):
            assert new.node.get_metadata_str(mode) == old.node.get_metadata_str(mode)
        assert new.node.excluded_llm_metadata_keys == ["tags", "draftsieve"]


def test_copies_share_nothing_with_their_nodes() -> None:
    given = nodes()
    found = postprocessor().postprocess_nodes(given, QUERY)
    found[0].node.metadata["tags"][1]["n"] = 99
    found[0].node.relationships.clear()
    found[0].node.excluded_llm_metadata_keys.append("file")
    found[0].score = 0.0
    assert plain(given) == plain(nodes())


def test_nothing_dropped_means_nothing_changed_but_metadata() -> None:
    found = postprocessor(method=SpecPC(capacity=1000)).postprocess_nodes(nodes(), QUERY)
    for new in found:
        assert new.node.metadata["draftsieve"]["spans"] == [
            {"start": 0, "end": len(new.text), "score": 0.0}
        ]
        del new.node.metadata["draftsieve"]
        new.node.excluded_llm_metadata_keys.remove("draftsieve")
        new.node.excluded_embed_metadata_keys.remove("draftsieve")
    assert plain(found) == plain(nodes())
    page = Document(text_resource=MediaResource(text=TEXTS[0], mimetype="text/markdown"))
    whole = postprocessor(method=SpecPC(capacity=1000))
    found = whole.postprocess_nodes([NodeWithScore(node=page)], QUERY)
    assert found[0].node.text_resource == page.text_resource


def test_nodes_of_other_kinds_are_kept() -> None:
    class Engine:
        """Something that must not be copied."""

        def __deepcopy__(self, memo: Any) -> Any:
            raise AssertionError("copied")

    payload = Engine()
    given = [
        NodeWithScore(node=IndexNode(text=TEXTS[0], index_id="i", obj=payload)),
        NodeWithScore(node=Document(text=TEXTS[1], id_="d"), score=0.5),
        NodeWithScore(node=ImageNode(image_url="https://example.org/a.png", id_="p")),
    ]
    found = postprocessor().postprocess_nodes(given, QUERY)
    assert [type(n.node) for n in found] == [IndexNode, Document, ImageNode]
    assert found[0].node.obj is payload
    assert found[0].score is None
    assert given[1].node.get_content() == TEXTS[1]
    assert len(found[1].node.get_content()) < len(TEXTS[1])
    assert found[2].node.image_url == given[2].node.image_url


def test_dropped_nodes_keep_the_others_aligned() -> None:
    method = SpecPC(ratio=0.4, drop_empty=True)
    context = tiny_compressor().compress(QUESTION, TEXTS, method)
    assert context.indices == (1, 2)  # the first document goes
    found = postprocessor(method=method).postprocess_nodes(nodes(), QUERY)
    assert [n.node_id for n in found] == [f"n{i}" for i in context.indices]


@pytest.mark.parametrize("mode", [MetadataMode.NONE, MetadataMode.LLM, MetadataMode.EMBED])
def test_metadata_is_shown_as_before(mode: MetadataMode) -> None:
    given = nodes()
    for node in given:
        node.node.text_template = "<{metadata_str}>\n{content}"
        node.node.metadata_template = "{key}={value}"
        node.node.metadata_separator = "; "
    found = postprocessor().postprocess_nodes(given, QUERY)
    for old, new in zip(given, found, strict=True):
        expected = deepcopy(old.node)
        expected.set_content(new.text)
        assert new.node.get_content(mode) == expected.get_content(mode)
    assert found[0].node.get_content(mode) != given[0].node.get_content(mode)


def test_spans_are_found_in_the_document() -> None:
    document = "\n\n".join(TEXTS)
    given = nodes()
    for node in given:
        node.node.start_char_idx = document.index(node.text)
        node.node.end_char_idx = node.node.start_char_idx + len(node.text)
    found = postprocessor().postprocess_nodes(given, QUERY)
    for old, new in zip(given, found, strict=True):
        assert new.node.start_char_idx == old.node.start_char_idx
        assert new.node.end_char_idx == old.node.end_char_idx
        begin = new.node.start_char_idx
        pieces = [
            document[begin + span["start"] : begin + span["end"]]
            for span in new.node.metadata["draftsieve"]["spans"]
        ]
        assert " … ".join(pieces) == new.text


async def test_async_postprocessing_equals_sync() -> None:
    with counted(tiny_compressor()) as calls:
        found = await postprocessor().apostprocess_nodes(nodes(), query_str=QUESTION)
    assert calls == ["acompress"]
    assert plain(found) == plain(postprocessor().postprocess_nodes(nodes(), query_str=QUESTION))


class Held(Compressor):
    """A compressor that goes on only when it is let go."""

    go = threading.Event()

    def compress(self, *args: Any, **options: Any) -> CompressedContext:
        assert self.go.wait(10), "the event loop was blocked"
        return super().compress(*args, **options)


async def test_the_event_loop_stays_free() -> None:
    held = Held(tiny_model(32, seed=1), tiny_tokenizer())
    task = asyncio.create_task(postprocessor(compressor=held).apostprocess_nodes(nodes(), QUERY))
    await asyncio.sleep(0.05)
    assert not task.done()
    Held.go.set()
    assert plain(await task) == plain(postprocessor().postprocess_nodes(nodes(), QUERY))


def test_a_missing_query_gives_the_originals_or_raises(caplog: pytest.LogCaptureFixture) -> None:
    found = postprocessor().postprocess_nodes(nodes())
    assert [n.text for n in found] == TEXTS
    assert "PromptError" in found[0].node.metadata["draftsieve"]["fallback"]
    assert any(record.levelname == "WARNING" for record in caplog.records)
    with pytest.raises(PromptError, match="question is empty"):
        postprocessor(on_error="raise").postprocess_nodes(nodes())


def test_a_failed_compression_gives_the_originals_or_raises() -> None:
    tiny = SpecPC(capacity=1)
    found = postprocessor(method=tiny).postprocess_nodes(nodes(), QUERY)
    assert [n.text for n in found] == TEXTS
    assert "BudgetError" in found[0].node.metadata["draftsieve"]["fallback"]
    with pytest.raises(BudgetError):
        postprocessor(method=tiny, on_error="raise").postprocess_nodes(nodes(), QUERY)


def test_a_timeout_gives_the_originals() -> None:
    found = postprocessor(timeout=1e-9).postprocess_nodes(nodes(), QUERY)
    assert [n.text for n in found] == TEXTS
    assert "RequestTimeoutError" in found[0].node.metadata["draftsieve"]["fallback"]
    with pytest.raises(RequestTimeoutError):
        postprocessor(timeout=1e-9, on_error="raise").postprocess_nodes(nodes(), QUERY)


def test_no_nodes_call_nothing() -> None:
    with counted(tiny_compressor()) as calls:
        assert postprocessor().postprocess_nodes([], QUERY) == []
    assert calls == []


class Recorder(BaseEventHandler):
    """Keeps the events it is shown."""

    _seen: list[Any] = PrivateAttr(default_factory=list)

    def handle(self, event: Any, **kwargs: Any) -> None:
        self._seen.append(event)


def test_tracing_sees_the_nodes_before_and_after() -> None:
    recorder = Recorder()
    dispatcher = get_dispatcher()
    dispatcher.add_event_handler(recorder)
    try:
        found = postprocessor().postprocess_nodes(nodes(), QUERY)
    finally:
        dispatcher.event_handlers.remove(recorder)
    start, end = recorder._seen
    assert isinstance(start, ReRankStartEvent)
    assert isinstance(end, ReRankEndEvent)
    assert plain(start.nodes) == plain(nodes())
    assert plain(end.nodes) == plain(found)


def test_wrong_options_and_models_fail_at_construction(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError):
        DraftSievePostprocessor(model=str(tmp_path / "gone"))
    with pytest.raises(ConfigError, match="capacty"):
        postprocessor(capacty=3)


def test_the_component_names_itself() -> None:
    assert DraftSievePostprocessor.class_name() == "DraftSievePostprocessor"
    stored = postprocessor().to_dict()
    assert stored["class_name"] == "DraftSievePostprocessor"
    assert stored["method"]["ratio"] == 0.4
    assert "compressor" not in stored
    assert stored["model"] == "tiny-32"
    again = DraftSievePostprocessor.from_dict(stored, compressor=tiny_compressor())
    assert again.to_dict() == stored


def test_a_stored_component_loads_its_draft(tmp_path: Path) -> None:
    tiny_model(32, seed=1).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    made = DraftSievePostprocessor(
        model=str(tmp_path), method=METHOD, device="cpu", progress=False, on_error="raise"
    )
    again = DraftSievePostprocessor.from_json(made.to_json())
    assert again.to_json() == made.to_json()
    assert plain(again.postprocess_nodes(nodes(), QUERY)) == plain(
        postprocessor().postprocess_nodes(nodes(), QUERY)
    )


def test_the_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    run_path(str(EXAMPLES / "llama_index_rag.py"))
    answer, first, *others = capsys.readouterr().out.splitlines()
    assert answer
    assert "AK-731" in first  # the draft keeps the fact that is asked for
    assert len(others) == 2


def test_missing_llama_index_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in sys.modules if n.startswith("draftsieve.integrations.llama_index")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "llama_index.core", None)
    with pytest.raises(MissingExtraError, match=r'pip install "draftsieve\[llama-index\]"'):
        import_module("draftsieve.integrations.llama_index")

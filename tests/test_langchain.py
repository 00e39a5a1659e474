"""The LangChain classes over a tiny real pair: copies, order, metadata, streams, one core call."""

from __future__ import annotations

import asyncio
import gc
import json
import re
import sys
import threading
from collections.abc import Iterator
from copy import deepcopy
from importlib import import_module
from pathlib import Path
from runpy import run_path
from typing import Any, ClassVar, Literal

import pytest
from langchain_classic.retrievers import ContextualCompressionRetriever
from langchain_classic.retrievers.document_compressors import DocumentCompressorPipeline
from langchain_core.caches import InMemoryCache
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.documents import Document
from langchain_core.exceptions import OutputParserException
from langchain_core.messages import (
    AIMessage,
    AIMessageChunk,
    ChatMessage,
    HumanMessage,
    RemoveMessage,
    SystemMessage,
    ToolMessage,
)
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables import RunnableLambda
from langchain_core.tools import tool
from langchain_core.utils.function_calling import convert_to_openai_tool
from pydantic import BaseModel, Field, ValidationError
from typing_extensions import TypedDict

from draftsieve.core.compressor import Compressor
from draftsieve.core.config import Generation, SpecPC
from draftsieve.core.constrained import Grammar
from draftsieve.core.engine import Engine
from draftsieve.core.errors import (
    BudgetError,
    ConfigError,
    GrammarError,
    MissingExtraError,
    ModelError,
    ModelNotFoundError,
    PromptError,
    RequestTimeoutError,
)
from draftsieve.core.prompt import Prompt
from draftsieve.core.types import Chunk, Passage
from draftsieve.integrations.langchain import ChatDraftSieve, DraftCompressor, DraftSieveLLM
from draftsieve.integrations.langchain.messages import as_mappings

from .adapters_fixtures import (
    EXAMPLES,
    QUESTION,
    TEXTS,
    counted,
    needs_pair,
    one_thread,
    tiny_compressor,
    tiny_engine,
    tiny_model,
    tiny_tokenizer,
)

__all__ = ["one_thread"]  # used by every test
METHOD = SpecPC(ratio=0.4, unit="word")
TINY = SpecPC(capacity=1)  # cannot hold the question


def documents() -> list[Document]:
    """Two share an id, one has none; metadata is nested."""
    ids = ["a", "a", None]
    return [
        Document(page_content=text, id=name, metadata={"source": f"{n}.md", "tags": [{"n": n}]})
        for n, (text, name) in enumerate(zip(TEXTS, ids, strict=True))
    ]


def document_messages() -> list[Any]:
    blocks = [{"type": "document", "text": text, "id": f"d{n}"} for n, text in enumerate(TEXTS)]
    return [
        SystemMessage("Answer from the documents."),
        HumanMessage([*blocks, {"type": "text", "text": QUESTION}]),
    ]


def chat(**options: Any) -> ChatDraftSieve:
    return ChatDraftSieve(**{"engine": tiny_engine(), "max_tokens": 6, **options})


def llm(**options: Any) -> DraftSieveLLM:
    return DraftSieveLLM(engine=tiny_engine(), **{"max_tokens": 6, **options})


@pytest.fixture(scope="module")
def pair_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_model(32, seed=1).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


# -- compressor ---------------------------------------------------------------------------------


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


def test_a_compressor_loads_when_it_is_made(pair_folder: Path) -> None:
    compressor = DraftCompressor(
        model=str(pair_folder), device="cpu", progress=False, method=METHOD
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
    with pytest.raises(ValidationError, match="capacty"):
        make(model=str(tmp_path / "gone"), capacty=3)
    with pytest.raises(ValidationError, match="on_error"):
        make(model=str(tmp_path / "gone"), on_error="ignore")


def test_missing_langchain_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in sys.modules if n.startswith("draftsieve.integrations.langchain")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "langchain_core", None)
    with pytest.raises(MissingExtraError, match=r'pip install "draftsieve\[langchain\]"'):
        import_module("draftsieve.integrations.langchain")


# -- compressor: time, order, callbacks -----------------------------------------------------------


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
    with pytest.raises(ValidationError, match="timeout"):
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
    context = tiny_compressor().compress(QUESTION, TEXTS, whole.method)
    assert "draft" not in context.stats.seconds
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


class Fixed(BaseRetriever):
    """Finds the same documents for every question."""

    def _get_relevant_documents(self, query: str, *, run_manager: Any) -> list[Document]:
        return documents()


async def test_the_compressor_works_in_langchains_retriever_and_pipeline() -> None:
    compressor = DraftCompressor(compressor=tiny_compressor(), method=METHOD)
    expected = compressor.compress_documents(documents(), QUESTION)
    retriever = ContextualCompressionRetriever(base_compressor=compressor, base_retriever=Fixed())
    assert retriever.invoke(QUESTION) == expected
    assert await retriever.ainvoke(QUESTION) == expected
    pipeline = DocumentCompressorPipeline(transformers=[compressor, compressor])
    twice = pipeline.compress_documents(documents(), QUESTION)
    assert twice == compressor.compress_documents(expected, QUESTION)
    assert await pipeline.acompress_documents(documents(), QUESTION) == twice


# -- chat model ---------------------------------------------------------------------------------


def test_a_chat_answer_is_the_engines_answer() -> None:
    model = chat(method=METHOD)
    with counted(tiny_engine()) as calls:
        message = model.invoke(document_messages())
    assert calls == ["generate"]
    prompt = Prompt.from_messages(
        [
            {"role": "system", "content": "Answer from the documents."},
            {"role": "user", "content": QUESTION},
        ],
        documents=[Passage(text, f"d{n}") for n, text in enumerate(TEXTS)],
    )
    answer = tiny_engine().generate(prompt, method=METHOD, generation=Generation(max_new_tokens=6))
    assert message.content == answer.text
    usage = answer.usage
    assert usage.prompt_tokens < usage.original_prompt_tokens
    assert message.usage_metadata == {
        "input_tokens": usage.prompt_tokens,
        "output_tokens": usage.completion_tokens,
        "total_tokens": usage.total_tokens,
        "input_token_details": {
            "original": usage.original_prompt_tokens,
            "compressed": usage.prompt_tokens,
        },
    }
    metadata = message.response_metadata
    assert metadata["model_name"] == "tiny"
    assert metadata["finish_reason"] == "length"
    assert metadata["method"] == {"name": "SpecPC", **METHOD.model_dump()}
    assert metadata["fallback"] is None
    assert set(metadata["timings"]) >= {"draft", "prefill", "decode"}
    assert metadata["spans"] == [
        {
            "passage": s.passage_id,
            "index": s.passage_index,
            "start": s.start,
            "end": s.end,
            "score": s.score,
        }
        for s in answer.spans
    ]
    assert json.loads(json.dumps(metadata)) == metadata


@pytest.mark.parametrize(
    "given", [TEXTS, [Passage(t) for t in TEXTS], [Document(page_content=t) for t in TEXTS]]
)
def test_documents_of_a_call_stand_before_the_question(given: list[Any]) -> None:
    whole = chat().invoke(QUESTION, documents=given)
    blocks = [{"type": "text-plain", "text": text} for text in TEXTS]
    same = chat().invoke([HumanMessage([*blocks, {"type": "text", "text": QUESTION}])])
    assert whole.content == same.content
    assert whole.usage_metadata == same.usage_metadata
    shorter = chat().invoke(QUESTION, documents=given, method=METHOD)
    assert shorter.usage_metadata is not None
    assert whole.usage_metadata is not None
    assert shorter.usage_metadata["input_tokens"] < whole.usage_metadata["input_tokens"]


def test_a_stream_adds_up_to_the_answer() -> None:
    model = chat(method=METHOD)
    with counted(tiny_engine()) as calls:
        chunks = list(model.stream(document_messages()))
    assert calls == ["stream_prompt"]
    assert len(chunks) > 2
    assert [c.usage_metadata is not None for c in chunks].count(True) == 1
    assert chunks[-1].chunk_position == "last"
    assert chunks[-1].usage_metadata is not None
    whole = add(chunks)
    answer = model.invoke(document_messages())
    assert whole.content == answer.content
    assert whole.usage_metadata == answer.usage_metadata
    assert (
        whole.response_metadata.pop("timings").keys()
        == answer.response_metadata.pop("timings").keys()
    )
    assert whole.response_metadata == answer.response_metadata


def test_streaming_reports_tokens_in_invoke_too() -> None:
    class Tokens(BaseCallbackHandler):
        def __init__(self) -> None:
            self.seen: list[str] = []

        def on_llm_new_token(self, token: str, **kwargs: Any) -> None:
            self.seen.append(token)

    tokens = Tokens()
    message = chat(streaming=True, callbacks=[tokens]).invoke(QUESTION)
    assert len(tokens.seen) > 2
    assert "".join(tokens.seen) == message.content == chat().invoke(QUESTION).content


async def test_async_chat_equals_sync() -> None:
    model = chat(method=METHOD)
    expected = model.invoke(document_messages()).content
    with counted(tiny_engine()) as calls:
        assert (await model.ainvoke(document_messages())).content == expected
        chunks = [chunk async for chunk in model.astream(document_messages())]
    assert calls == ["agenerate", "astream_prompt"]
    assert add(chunks).content == expected
    assert add(chunks).usage_metadata == model.invoke(document_messages()).usage_metadata


class Watched(Engine):
    """An engine that notes when a stream of its ends."""

    ended: int = 0

    def stream_prompt(self, *args: Any, **options: Any) -> Iterator[Chunk]:
        try:
            yield from super().stream_prompt(*args, **options)
        finally:
            self.ended += 1


async def test_an_abandoned_stream_ends_in_the_core() -> None:
    engine = Watched(tiny_model(32, seed=1), tiny_tokenizer())
    for make, number in ((ChatDraftSieve, 1), (DraftSieveLLM, 3)):
        model = make(engine=engine, max_tokens=500)
        for _ in model.stream(QUESTION):
            break
        gc.collect()
        assert engine.ended == number
        pieces = model.astream(QUESTION)
        await anext(pieces)
        await pieces.aclose()
        gc.collect()
        async with asyncio.timeout(10):
            while engine.ended == number:  # the step under way ends first
                await asyncio.sleep(0.01)
        assert engine.ended == number + 1


def test_stop_strings_end_an_answer_before_them() -> None:
    full = chat(max_tokens=20).invoke(QUESTION).text
    stop = full[5:7]
    expected = full[: full.index(stop)]
    for message in (
        chat(max_tokens=20).invoke(QUESTION, stop=[stop]),
        chat(max_tokens=20, stop=[stop]).invoke(QUESTION),
        add(chat(max_tokens=20).stream(QUESTION, stop=[stop])),
    ):
        assert message.content == expected
        assert message.response_metadata["finish_reason"] == "stop_string"
    assert chat(max_tokens=20, stop=[stop]).invoke(QUESTION, stop=[]).text == full


def test_a_call_overrides_the_models_options() -> None:
    model = chat(temperature=1.0, seed=1)
    first = model.invoke(QUESTION).content
    assert model.invoke(QUESTION).content == first
    assert model.invoke(QUESTION, seed=2).content != first
    assert model.invoke(QUESTION, temperature=0.0).content == chat().invoke(QUESTION).content
    short = model.bind(max_tokens=3).invoke(QUESTION)
    assert short.usage_metadata["output_tokens"] == 3
    with pytest.raises(ValidationError, match="temprature"):
        model.invoke(QUESTION, temprature=0.5)
    with pytest.raises(ValidationError, match="method"):
        model.invoke(QUESTION, method="specpc")
    with pytest.raises(ValidationError, match="on_error"):
        model.invoke(QUESTION, on_error="ignore")


def test_invalid_options_fail_before_a_model_is_loaded() -> None:
    with pytest.raises(ValidationError, match="top_p"):
        ChatDraftSieve(model="gone", top_p=1.5)
    with pytest.raises(ModelError, match="draft="):
        ChatDraftSieve(model="gone", method=METHOD)
    plain = Engine(tiny_model(32, seed=1), tiny_tokenizer())
    with pytest.raises(ModelError, match="draft="):
        ChatDraftSieve(engine=plain, method=METHOD)


def test_a_chat_model_loads_a_pair_when_it_is_made(pair_folder: Path) -> None:
    folder = str(pair_folder)
    model = ChatDraftSieve(
        model=folder, draft=folder, method=METHOD, max_tokens=4, device="cpu", progress=False
    )
    message = model.invoke(document_messages())
    assert message.usage_metadata["output_tokens"] == 4
    assert model._identifying_params["model"] == folder
    assert model.profile["max_input_tokens"] == 1024


def test_failed_compression_answers_from_whole_documents(caplog: pytest.LogCaptureFixture) -> None:
    message = chat(method=TINY).invoke(document_messages())
    assert message.content == chat().invoke(document_messages()).content
    assert "BudgetError" in message.response_metadata["fallback"]
    assert caplog.records
    with pytest.raises(BudgetError):
        chat(method=TINY, on_error="raise").invoke(document_messages())


def test_messages_become_template_mappings() -> None:
    call = {"name": "lookup", "args": {"id": 3}, "id": "c1"}
    assert as_mappings(
        [
            SystemMessage("s"),
            HumanMessage(["a", {"type": "text", "text": "b"}], name="Ann"),
            AIMessage([{"type": "reasoning", "reasoning": "hm"}, "c"], tool_calls=[call]),
            ToolMessage("found", tool_call_id="c1", name="lookup"),
            ChatMessage("d", role="critic"),
        ]
    ) == [
        {"role": "system", "content": "s"},
        {"role": "user", "content": ["a", {"type": "text", "text": "b"}], "name": "Ann"},
        {
            "role": "assistant",
            "content": ["c"],
            "tool_calls": [
                {
                    "id": "c1",
                    "type": "function",
                    "function": {"name": "lookup", "arguments": {"id": 3}},
                }
            ],
        },
        {"role": "tool", "content": "found", "name": "lookup", "tool_call_id": "c1"},
        {"role": "critic", "content": "d"},
    ]


def test_a_conversation_with_tools_is_answered() -> None:
    call = {"name": "lookup", "args": {"id": 3}, "id": "c1"}
    turns = [
        HumanMessage("Look up 3."),
        AIMessage("", tool_calls=[call]),
        ToolMessage("seven", tool_call_id="c1"),
    ]
    assert chat().invoke(turns).usage_metadata["output_tokens"] == 6


def test_what_cannot_be_read_is_named() -> None:
    picture = HumanMessage([{"type": "image", "url": "https://example.org/a.png"}])
    with pytest.raises(PromptError, match="image"):
        chat().invoke([picture])
    with pytest.raises(PromptError, match="RemoveMessage"):
        chat().invoke([HumanMessage("hi"), RemoveMessage(id="1")])


def test_token_counts_are_the_targets() -> None:
    for model in (chat(), llm()):
        assert model.get_token_ids(TEXTS[0]) == tiny_engine().encode_text(TEXTS[0])
        assert model.get_num_tokens(TEXTS[0]) == tiny_engine().count_tokens(TEXTS[0])
    assert chat().profile["max_input_tokens"] == 1024
    assert chat().profile["tool_calling"]


def test_what_identifies_a_model_is_complete_and_plain() -> None:
    model = chat(method=METHOD, temperature=0.5, stop=["x"])
    params = model._identifying_params
    assert params["model"] == "tiny"
    assert (params["method"]["name"], params["method"]["ratio"]) == ("SpecPC", 0.4)
    assert params["temperature"] == 0.5
    assert json.dumps(params)
    traced = model._get_ls_params(max_tokens=9)
    assert traced["ls_provider"] == "draftsieve"
    assert traced["ls_model_name"] == "tiny"
    assert (traced["ls_temperature"], traced["ls_max_tokens"]) == (0.5, 9)
    assert traced["ls_stop"] == ["x"]


def test_a_cache_tells_methods_apart() -> None:
    cache = InMemoryCache()
    whole = chat(cache=cache).invoke(document_messages())
    short = chat(cache=cache, method=METHOD).invoke(document_messages())
    assert short.usage_metadata["input_tokens"] < whole.usage_metadata["input_tokens"]
    with counted(tiny_engine()) as calls:
        chat(cache=cache, method=METHOD).invoke(document_messages())
    assert calls == []


@pytest.mark.parametrize("everywhere", [False, True])
async def test_a_cache_does_not_confuse_documents(
    everywhere: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("langchain_core.globals._llm_cache", InMemoryCache())
    question = "Which one?"
    for make in (chat, llm):
        model = make() if everywhere else make(cache=InMemoryCache())
        answers = set()
        for texts in (["Alpha."], ["Beta, gamma and delta."]):
            expected = make(cache=False).invoke(question, documents=texts)
            answers.add(text_of(expected))
            for _ in range(2):
                found = model.invoke(question, documents=texts)
                assert text_of(found) == text_of(expected)
                assert text_of(await model.ainvoke(question, documents=texts)) == text_of(expected)
        assert len(answers) == 2
    assert model.invoke(question) == model.invoke(question)
    with counted(tiny_engine()) as calls:
        model.invoke(question)
    assert calls == []


def text_of(found: Any) -> str:
    return found if isinstance(found, str) else found.text


def test_compressor_and_chat_model_make_a_chain() -> None:
    compressor = DraftCompressor(compressor=tiny_compressor(), method=METHOD)
    chain = (
        RunnableLambda(lambda question: compressor.compress_documents(documents(), question))
        | RunnableLambda(
            lambda found: [HumanMessage("\n".join([*(d.page_content for d in found), QUESTION]))]
        )
        | chat()
    )
    assert chain.invoke(QUESTION).content


@needs_pair
def test_the_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    run_path(str(EXAMPLES / "langchain_rag.py"))
    answer, first, *others = capsys.readouterr().out.splitlines()
    assert answer
    assert "AK-731" in first  # the draft keeps the fact that is asked for
    assert len(others) == 2


# -- chat model: tools and structured output ------------------------------------------------------


class Trip(BaseModel):
    """A trip by ferry."""

    to: Literal["Holm", "the harbour"]
    hour: int = Field(ge=0, le=23)


class TripDict(TypedDict):
    """A trip by ferry."""

    to: Literal["Holm", "the harbour"]
    open: bool


@tool
def opening(day: Literal["Sunday", "Monday"]) -> str:
    """Opening hours."""
    return "ten"


def talker(**options: Any) -> ChatDraftSieve:
    return chat(**{"max_tokens": 90, **options})


@pytest.mark.parametrize(
    ("choice", "names"),
    [
        ("any", {"Trip", "opening"}),
        ("required", {"Trip", "opening"}),
        (True, {"Trip", "opening"}),
        ("opening", {"opening"}),
        ({"type": "function", "function": {"name": "Trip"}}, {"Trip"}),
    ],
)
def test_a_forced_call_is_valid(choice: Any, names: set[str]) -> None:
    model = talker().bind_tools([Trip, opening], tool_choice=choice)
    with counted(tiny_engine()) as calls:
        message = model.invoke(QUESTION)
    assert calls == ["generate"]
    (call,) = message.tool_calls
    assert call["name"] in names
    assert call["type"] == "tool_call"
    assert call["id"]
    if call["name"] == "Trip":
        Trip.model_validate(call["args"])
    else:
        assert opening.invoke(call).content == "ten"
    assert message.content == ""
    assert message.response_metadata["finish_reason"] == "stop"


def test_ids_of_calls_differ() -> None:
    model = talker().bind_tools([opening], tool_choice="any")
    ids = {model.invoke(QUESTION).tool_calls[0]["id"] for _ in range(2)}
    assert len(ids) == 2


def test_a_model_that_may_not_call_answers_as_without_tools() -> None:
    for choice in ("none", False):
        message = chat().bind_tools([opening], tool_choice=choice).invoke(QUESTION)
        assert message.content == chat().invoke(QUESTION).content
        assert message.tool_calls == []


def test_a_model_that_may_call_can_answer_in_words() -> None:
    message = talker(max_tokens=8).bind_tools([opening]).invoke(QUESTION)
    assert message.text
    assert message.tool_calls == message.invalid_tool_calls == []
    told = message.usage_metadata["input_tokens"]
    assert told > chat().invoke(QUESTION).usage_metadata["input_tokens"]


async def test_streamed_calls_add_up_to_the_answers() -> None:
    model = talker().bind_tools([Trip, opening], tool_choice="any", parallel_tool_calls=True)
    expected = model.invoke(QUESTION)
    assert expected.tool_calls
    assert len(expected.invalid_tool_calls) == 1  # the second one is cut off
    for chunks in (
        list(model.stream(QUESTION)),
        [chunk async for chunk in model.astream(QUESTION)],
    ):
        whole = add(chunks)
        assert plain(whole.tool_calls) == plain(expected.tool_calls)
        assert len(whole.invalid_tool_calls) == len(expected.invalid_tool_calls)
        assert whole.content == expected.content
        assert chunks[-1].chunk_position == "last"
    assert plain((await model.ainvoke(QUESTION)).tool_calls) == plain(expected.tool_calls)


def plain(calls: Any) -> list[Any]:
    return [(call["name"], call["args"]) for call in calls]


def test_a_call_that_is_cut_off_is_invalid() -> None:
    model = talker(max_tokens=20).bind_tools([Trip], tool_choice="any")
    for message in (model.invoke(QUESTION), add(model.stream(QUESTION))):
        assert message.tool_calls == []
        (broken,) = message.invalid_tool_calls
        assert broken["args"].startswith("<tool_call>")
        assert message.response_metadata["finish_reason"] == "length"


def test_wrong_choices_fail_when_tools_are_bound() -> None:
    with pytest.raises(GrammarError, match="station"):
        chat().bind_tools([opening], tool_choice="station")
    with pytest.raises(GrammarError, match="tool_choice"):
        chat().bind_tools([opening], tool_choice=3)
    with pytest.raises(GrammarError, match="not both"):
        chat().invoke(
            QUESTION,
            tools=[convert_to_openai_tool(opening)],
            response_format={"type": "json_object"},
        )
    with pytest.raises(GrammarError, match="ChatDraftSieve"):
        llm().invoke(QUESTION, tools=[convert_to_openai_tool(opening)])


@pytest.mark.parametrize("method", ["function_calling", "json_schema"])
def test_structured_output_is_an_object_of_the_schema(method: str) -> None:
    assert isinstance(talker().with_structured_output(Trip, method=method).invoke(QUESTION), Trip)
    found = talker().with_structured_output(TripDict, method=method).invoke(QUESTION)
    assert found.keys() == {"to", "open"}
    schema = Trip.model_json_schema()
    found = talker().with_structured_output(schema, method=method).invoke(QUESTION)
    assert Trip.model_validate(found)
    raw = talker().with_structured_output(Trip, method=method, include_raw=True).invoke(QUESTION)
    assert isinstance(raw["parsed"], Trip)
    assert isinstance(raw["raw"], AIMessage)
    assert raw["parsing_error"] is None


def test_an_object_that_is_cut_off_is_not_made_up() -> None:
    short = talker(max_tokens=9)
    with pytest.raises(OutputParserException, match="max_tokens"):
        short.with_structured_output(Trip, method="json_schema").invoke(QUESTION)
    raw = short.with_structured_output(Trip, method="json_schema", include_raw=True)
    found = raw.invoke(QUESTION)
    assert found["parsed"] is None
    assert isinstance(found["parsing_error"], OutputParserException)
    assert found["raw"].content


def test_json_mode_is_any_object() -> None:
    options = {"response_format": {"type": "json_object"}}
    assert chat().invoke(QUESTION, **options).content.startswith("{")
    assert llm().invoke(QUESTION, **options).startswith("{")
    assert chat().with_structured_output(TripDict, method="json_mode") is not None
    with pytest.raises(ConfigError, match="json_schema"):
        chat().with_structured_output(Trip, method="xml")


def test_a_grammar_is_an_option_of_a_call() -> None:
    grammar = Grammar.regex("[0-9]{2}:[0-9]{2}")
    for found in (
        llm().invoke(QUESTION, grammar=grammar),
        chat().invoke(QUESTION, grammar=grammar),
    ):
        assert re.fullmatch("[0-9]{2}:[0-9]{2}", text_of(found))


def test_a_turn_of_tools_goes_back_into_the_prompt() -> None:
    model = talker().bind_tools([opening], tool_choice="opening")
    asked = HumanMessage(QUESTION)
    first = model.invoke([asked])
    result = opening.invoke(first.tool_calls[0])
    shorter = talker(max_tokens=4).invoke([asked, first, result])
    assert shorter.usage_metadata["input_tokens"] > first.usage_metadata["output_tokens"]
    without = talker(max_tokens=4).invoke([asked])
    assert shorter.usage_metadata["input_tokens"] > without.usage_metadata["input_tokens"]


# -- chat model: batches and time -----------------------------------------------------------------


class Batches(Engine):
    """A real engine that notes the sizes of its batches."""

    sizes: ClassVar[list[int]] = []

    def _steps(self, prompts: Any, *args: Any, **options: Any) -> Any:
        self.sizes.append(len(prompts))
        return super()._steps(prompts, *args, **options)


@pytest.fixture
def batches() -> Batches:
    Batches.sizes = []
    return Batches(
        tiny_model(64, seed=2), tiny_tokenizer(), draft_model=tiny_model(32, seed=1), name="tiny"
    )


ASKED = ["one", "two words", QUESTION, "four", "and five"]


async def test_a_batch_of_chats_is_one_batch(batches: Batches) -> None:
    expected = [chat().invoke(text).content for text in ASKED]
    model = chat(engine=batches)
    assert [message.content for message in model.batch(ASKED)] == expected
    assert batches.sizes == [5]
    assert [message.content for message in await model.abatch(ASKED)] == expected
    assert batches.sizes == [5, 5]
    few = {"max_concurrency": 2}
    assert [message.content for message in model.batch(ASKED, few)] == expected
    assert [message.content for message in await model.abatch(ASKED, few)] == expected
    assert batches.sizes[2:] == [2, 2, 1] * 2
    assert model.batch([]) == []


def test_a_batch_passes_options_and_callbacks(batches: Batches) -> None:
    seen: list[str] = []

    class Ends(BaseCallbackHandler):
        def on_llm_end(self, response: Any, **kwargs: Any) -> None:
            seen.append(response.generations[0][0].text)

    model = chat(engine=batches).bind(max_tokens=3)
    found = model.batch(ASKED, {"callbacks": [Ends()]}, seed=1)
    assert batches.sizes == [5]
    assert sorted(seen) == sorted(message.content for message in found)
    assert {message.usage_metadata["output_tokens"] for message in found} == {3}


async def test_one_faulty_input_does_not_spoil_a_batch(batches: Batches) -> None:
    inputs = [*ASKED[:2], [HumanMessage("   ")], " ".join(["word"] * 2000)]
    model = chat(engine=batches)
    for found in (
        model.batch(inputs, return_exceptions=True),
        await model.abatch(inputs, return_exceptions=True),
    ):
        assert [text_of(message) for message in found[:2]] == [
            chat().invoke(text).content for text in ASKED[:2]
        ]
        assert [type(error) for error in found[2:]] == [PromptError, PromptError]
    with pytest.raises(PromptError):
        model.batch(inputs)


def test_what_a_cache_knows_leaves_the_batch(batches: Batches) -> None:
    model = chat(engine=batches, cache=InMemoryCache())
    model.invoke(ASKED[0])
    found = model.batch(ASKED)
    assert [message.content for message in found] == [chat().invoke(t).content for t in ASKED]
    assert batches.sizes == [1, 4]
    model.batch(ASKED)
    assert batches.sizes == [1, 4]


def test_a_streaming_model_answers_batches_too(batches: Batches) -> None:
    found = chat(engine=batches, streaming=True).batch(ASKED[:2])
    assert [message.content for message in found] == [chat().invoke(t).content for t in ASKED[:2]]


async def test_a_request_out_of_time_fails_and_leaves_the_engine_usable() -> None:
    late = chat(timeout=1e-6)
    with pytest.raises(RequestTimeoutError):
        late.invoke(QUESTION)
    with pytest.raises(RequestTimeoutError):
        await late.ainvoke(QUESTION)
    with pytest.raises(RequestTimeoutError):
        list(late.stream(QUESTION))
    with pytest.raises(TimeoutError):
        llm(timeout=1e-6).invoke(QUESTION)
    with pytest.raises(RequestTimeoutError):
        late.batch(ASKED)
    with pytest.raises(RequestTimeoutError):
        chat(method=METHOD, timeout=1e-6).invoke(document_messages())
    assert late.invoke(QUESTION, timeout=60).content == chat().invoke(QUESTION).content


# -- LLM ----------------------------------------------------------------------------------------


def test_many_prompts_are_one_batch() -> None:
    prompts = ["one", "two words", QUESTION]
    with counted(tiny_engine()) as calls:
        result = llm().generate(prompts)
    assert calls == ["generate_many"]
    texts = [generations[0].text for generations in result.generations]
    assert texts == [llm().invoke(prompt) for prompt in prompts]
    info = result.generations[0][0].generation_info
    assert info is not None
    assert info["model_name"] == "tiny"
    assert info["usage"]["output_tokens"] == 6
    with counted(tiny_engine()) as calls:
        assert llm().batch(prompts) == texts
    assert calls == ["generate_many"]


def test_a_prompt_is_one_user_message() -> None:
    assert llm().invoke(QUESTION) == chat().invoke(QUESTION).content
    with_documents = llm(method=METHOD).invoke(QUESTION, documents=documents())
    assert with_documents == chat(method=METHOD).invoke(QUESTION, documents=documents()).content


async def test_llm_streams_add_up_to_the_text() -> None:
    expected = llm().invoke(QUESTION)
    with counted(tiny_engine()) as calls:
        assert "".join(llm().stream(QUESTION)) == expected
        assert "".join([piece async for piece in llm().astream(QUESTION)]) == expected
        assert await llm().ainvoke(QUESTION) == expected
    assert calls == ["stream_prompt", "astream_prompt", "agenerate_many"]


def test_llm_stops_at_stop_strings() -> None:
    full = llm(max_tokens=20).invoke(QUESTION)
    stop = full[5:7]
    assert llm(max_tokens=20).invoke(QUESTION, stop=[stop]) == full[: full.index(stop)]
    assert "".join(llm(max_tokens=20).stream(QUESTION, stop=[stop])) == full[: full.index(stop)]


def add(chunks: Any) -> AIMessageChunk:
    """Merge streamed chunks as LangChain does."""
    iterator: Iterator[AIMessageChunk] = iter(chunks)
    whole = next(iterator)
    for chunk in iterator:
        whole = whole + chunk
    return whole

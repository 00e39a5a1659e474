"""The LangChain classes over a tiny real pair: copies, order, metadata, streams, one core call."""

from __future__ import annotations

import asyncio
import gc
import json
import sys
from collections.abc import Iterator
from copy import deepcopy
from importlib import import_module
from pathlib import Path
from runpy import run_path
from typing import Any

import pytest
from langchain_core.caches import InMemoryCache
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.documents import Document
from langchain_core.messages import (
    AIMessage,
    AIMessageChunk,
    ChatMessage,
    HumanMessage,
    RemoveMessage,
    SystemMessage,
    ToolMessage,
)
from langchain_core.runnables import RunnableLambda
from pydantic import ValidationError

from draftsieve.core.config import Generation, SpecPC
from draftsieve.core.engine import Engine
from draftsieve.core.errors import (
    BudgetError,
    MissingExtraError,
    ModelError,
    ModelNotFoundError,
    PromptError,
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
    return ChatDraftSieve(engine=tiny_engine(), **{"max_tokens": 6, **options})


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
    assert model.profile == {"max_input_tokens": 1024}


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
    assert chat().profile == {"max_input_tokens": 1024}


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
    assert calls == ["stream_prompt", "astream_prompt", "generate_many"]


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

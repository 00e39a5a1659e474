"""The LlamaIndex LLM over a tiny real pair: one core call, streams, usage, options, documents."""

from __future__ import annotations

import asyncio
import gc
import json
import threading
from collections.abc import AsyncIterator, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from llama_index.core.base.llms.types import (
    CacheControl,
    CachePoint,
    ChatMessage,
    ChatResponse,
    CitableBlock,
    CitationBlock,
    DocumentBlock,
    ImageBlock,
    MessageRole,
    TextBlock,
    ThinkingBlock,
    ToolCallBlock,
)
from llama_index.core.callbacks import CallbackManager, TokenCountingHandler
from llama_index.core.instrumentation.events.llm import LLMChatEndEvent, LLMCompletionEndEvent
from llama_index.core.prompts import PromptTemplate
from llama_index.core.schema import NodeWithScore, TextNode
from llama_index_instrumentation import get_dispatcher
from llama_index_instrumentation.event_handlers.base import BaseEventHandler
from pydantic import PrivateAttr
from tokenizers.processors import TemplateProcessing

from draftsieve.core.config import Generation, SpecKV, SpecPC
from draftsieve.core.engine import Engine
from draftsieve.core.errors import (
    BudgetError,
    ConfigError,
    ModelError,
    ModelNotFoundError,
    PromptError,
    RequestTimeoutError,
)
from draftsieve.core.prompt.messages import Prompt
from draftsieve.core.types import Chunk, Passage
from draftsieve.integrations.llama_index import DraftSieveLLM
from draftsieve.integrations.llama_index.messages import as_prompt

from .adapters_fixtures import (
    QUESTION,
    TEMPLATE,
    TEXTS,
    counted,
    tiny_engine,
    tiny_model,
    tiny_tokenizer,
)

METHOD = SpecPC(ratio=0.4, unit="word")
TINY = SpecPC(capacity=1)  # cannot hold the question
ASKED = [ChatMessage(QUESTION)]


def llm(**options: Any) -> DraftSieveLLM:
    return DraftSieveLLM(engine=tiny_engine(), **{"max_tokens": 6, **options})


def with_documents() -> list[ChatMessage]:
    blocks = [DocumentBlock(data=text.encode(), title=f"t{n}") for n, text in enumerate(TEXTS)]
    return [
        ChatMessage("Answer from the documents.", role="system"),
        ChatMessage([*blocks, TextBlock(text=QUESTION)]),
    ]


def mappings(prompt: Prompt) -> list[tuple[str, str]]:
    """Roles and texts of a prompt as they will be shown."""
    return [(m.role, "".join(p.text for p in prompt.layout(m))) for m in prompt.messages]


# -- answers ------------------------------------------------------------------------------------


def test_a_chat_answer_is_the_engines_answer() -> None:
    with counted(tiny_engine()) as calls:
        response = llm(method=METHOD).chat(with_documents())
    assert calls == ["generate"]
    prompt = Prompt.from_messages(
        [
            {"role": "system", "content": "Answer from the documents."},
            {"role": "user", "content": QUESTION},
        ],
        documents=TEXTS,
    )
    answer = tiny_engine().generate(prompt, method=METHOD, generation=Generation(max_new_tokens=6))
    assert response.message.role == MessageRole.ASSISTANT
    assert response.message.content == answer.text
    assert response.delta is None
    usage = answer.usage
    assert usage.prompt_tokens < usage.original_prompt_tokens
    counts = {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": 6,
        "total_tokens": usage.prompt_tokens + 6,
    }
    assert response.additional_kwargs == counts
    raw = response.raw
    assert raw["usage"] == {**counts, "original_prompt_tokens": usage.original_prompt_tokens}
    assert (raw["model"], raw["finish_reason"], raw["fallback"]) == ("tiny", "length", None)
    assert raw["method"] == {"name": "SpecPC", **METHOD.model_dump()}
    assert set(raw["timings"]) >= {"draft", "prefill", "decode"}
    assert [(s["passage"], s["start"], s["end"]) for s in raw["spans"]] == [
        (s.passage_id, s.start, s.end) for s in answer.spans
    ]
    assert json.loads(json.dumps(raw)) == raw


def test_a_completion_is_one_user_message() -> None:
    with counted(tiny_engine()) as calls:
        found = llm().complete(QUESTION)
    assert calls == ["generate"]
    same = llm().chat(ASKED)
    assert found.text == same.message.content
    assert found.raw["usage"] == same.raw["usage"]
    assert found.additional_kwargs == same.additional_kwargs
    assert llm().complete(QUESTION, formatted=True).text == found.text


def test_streams_add_up_to_the_answer() -> None:
    model = llm(method=METHOD)
    with counted(tiny_engine()) as calls:
        pieces = list(model.stream_chat(with_documents()))
        words = list(model.stream_complete(QUESTION))
    assert calls == ["stream_prompt", "stream_prompt"]
    for found, whole in (
        (pieces, model.chat(with_documents())),
        (words, model.complete(QUESTION)),
    ):
        texts = [getattr(r, "text", None) or r.message.content for r in found]
        assert len(found) > 2
        assert texts == ["".join(r.delta or "" for r in found[: n + 1]) for n in range(len(found))]
        assert texts[-1] == (getattr(whole, "text", None) or whole.message.content)
        assert [r.raw is not None for r in found] == [False] * (len(found) - 1) + [True]
        assert found[-1].raw["usage"] == whole.raw["usage"]
        assert found[-1].additional_kwargs == whole.additional_kwargs


async def test_async_answers_equal_sync() -> None:
    model = llm(method=METHOD)
    with counted(tiny_engine()) as calls:
        chat = await model.achat(with_documents())
        text = await model.acomplete(QUESTION)
        chats = [r async for r in await model.astream_chat(with_documents())]
        texts = [r async for r in await model.astream_complete(QUESTION)]
    assert calls == ["agenerate", "agenerate", "astream_prompt", "astream_prompt"]
    expected = model.chat(with_documents())
    assert chat.message.content == chats[-1].message.content == expected.message.content
    assert chat.raw["usage"] == chats[-1].raw["usage"] == expected.raw["usage"]
    assert text.text == texts[-1].text == model.complete(QUESTION).text


class Held(Engine):
    """An engine that goes on only when it is let go, and notes when its streams end."""

    def __init__(self) -> None:
        super().__init__(tiny_model(32, seed=1), tiny_tokenizer(), name="held")
        self.go = threading.Event()
        self.ended = 0
        self.target.register_forward_pre_hook(self.hold)

    def hold(self, *_: object) -> None:
        assert self.go.wait(10), "the event loop was blocked"

    def stream_prompt(self, *args: Any, **options: Any) -> Iterator[Chunk]:
        try:
            yield from super().stream_prompt(*args, **options)
        finally:
            self.ended += 1

    async def astream_prompt(self, *args: Any, **options: Any) -> AsyncIterator[Chunk]:
        stream = super().astream_prompt(*args, **options)
        try:
            async for chunk in stream:
                yield chunk
        finally:
            await stream.aclose()  # type: ignore[attr-defined]
            self.ended += 1


async def test_the_event_loop_stays_free() -> None:
    engine = Held()
    model = DraftSieveLLM(engine=engine, max_tokens=3)

    async def streamed(stream: Any) -> Any:
        return [response async for response in await stream][-1]

    for call in (
        model.achat(ASKED),
        model.acomplete(QUESTION),
        streamed(model.astream_chat(ASKED)),
        streamed(model.astream_complete(QUESTION)),
    ):
        engine.go.clear()
        task = asyncio.create_task(call)
        await asyncio.sleep(0.05)
        assert not task.done()
        engine.go.set()
        response = await task
        assert response.raw["usage"]["completion_tokens"] == 3


async def test_an_abandoned_stream_ends_in_the_core() -> None:
    engine = Held()
    engine.go.set()
    model = DraftSieveLLM(engine=engine, max_tokens=500)
    for _ in model.stream_chat(ASKED):
        break
    gc.collect()
    assert engine.ended == 1
    pieces = await model.astream_chat(ASKED)
    await anext(pieces)
    await pieces.aclose()
    del pieces
    gc.collect()
    async with asyncio.timeout(10):
        while engine.ended == 1:  # the event loop closes what LlamaIndex leaves behind
            await asyncio.sleep(0.01)


# -- options ------------------------------------------------------------------------------------


def test_a_call_overrides_the_objects_options() -> None:
    model = llm(temperature=1.0, seed=1)
    first = model.complete(QUESTION).text
    assert model.complete(QUESTION).text == first
    assert model.complete(QUESTION, seed=2).text != first
    greedy = model.complete(QUESTION, temperature=0.0).text
    assert greedy == llm().complete(QUESTION).text
    assert model.chat(ASKED, max_tokens=2).raw["usage"]["completion_tokens"] == 2
    assert list(model.stream_chat(ASKED, temperature=0.0))[-1].message.content == greedy
    shorter = llm().chat(with_documents(), method=METHOD)
    assert shorter.raw["usage"]["prompt_tokens"] < shorter.raw["usage"]["original_prompt_tokens"]
    assert model.complete(QUESTION, min_p=1.0).text == greedy  # only the likeliest is left
    with pytest.raises(RequestTimeoutError):
        model.chat(ASKED, timeout=1e-9)
    for wrong in ({"temprature": 0.5}, {"method": "specpc"}, {"on_error": "ignore"}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            model.chat(ASKED, **wrong)


def test_stop_strings_end_an_answer_before_them() -> None:
    full = llm(max_tokens=20).complete(QUESTION).text
    stop = full[5:7]
    for response in (
        llm(max_tokens=20).complete(QUESTION, stop=[stop]),
        llm(max_tokens=20, stop=[stop]).complete(QUESTION),
        list(llm(max_tokens=20, stop=[stop]).stream_complete(QUESTION))[-1],
    ):
        assert response.text == full[: full.index(stop)]
        assert response.raw["finish_reason"] == "stop_string"
    assert llm(max_tokens=20, stop=[stop]).complete(QUESTION, stop=[]).text == full


def test_invalid_options_fail_before_a_model_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError):
        DraftSieveLLM(model=str(tmp_path / "gone"))
    with pytest.raises(ConfigError, match="capacty"):
        llm(capacty=3)
    with pytest.raises(ConfigError, match="top_p"):
        DraftSieveLLM(model="gone", top_p=1.5)
    with pytest.raises(ModelError, match="draft="):
        DraftSieveLLM(model="gone", method=METHOD)
    with pytest.raises(ModelError, match="draft="):
        DraftSieveLLM(engine=Engine(tiny_model(32, seed=1), tiny_tokenizer()), method=METHOD)


def test_a_method_that_reads_without_a_draft_needs_none() -> None:
    plain = Engine(tiny_model(64, seed=2), tiny_tokenizer())
    method = SpecKV(capacity=90, scorer="snapkv")
    found = DraftSieveLLM(engine=plain, method=method, max_tokens=4).chat(with_documents())
    assert found.raw["method"]["scorer"] == "snapkv"
    assert found.raw["usage"]["completion_tokens"] == 4
    with pytest.raises(ModelError, match="draft="):
        DraftSieveLLM(engine=plain, method=SpecKV(capacity=90))


def test_the_cache_of_a_whole_prompt_can_be_evicted() -> None:
    response = llm(method=SpecKV(capacity=90)).chat(with_documents())
    assert response.raw["method"]["name"] == "SpecKV"
    assert response.raw["usage"]["completion_tokens"] == 6


def test_failed_compression_answers_from_whole_documents(caplog: pytest.LogCaptureFixture) -> None:
    response = llm(method=TINY).chat(with_documents())
    assert response.message.content == llm().chat(with_documents()).message.content
    assert "BudgetError" in response.raw["fallback"]
    assert caplog.records
    with pytest.raises(BudgetError):
        llm(method=TINY, on_error="raise").chat(with_documents())


def test_the_component_describes_itself_and_comes_back(tmp_path: Path) -> None:
    model = llm(method=METHOD, temperature=0.5, stop=["x"], system_prompt="Be short.")
    metadata = model.metadata
    assert (metadata.context_window, metadata.num_output) == (1024, 6)
    assert metadata.is_chat_model
    assert metadata.is_function_calling_model
    assert metadata.model_name == "tiny"
    assert DraftSieveLLM.class_name() == model.to_dict()["class_name"] == "DraftSieveLLM"
    stored = model.to_json()
    assert DraftSieveLLM.from_json(stored, engine=tiny_engine()).to_json() == stored
    assert "engine" not in json.loads(stored)
    for part in (tiny_model(32, seed=1), tiny_tokenizer()):
        part.save_pretrained(tmp_path)
    folder = str(tmp_path)
    loaded = DraftSieveLLM(
        model=folder, draft=folder, method=METHOD, max_tokens=4, device="cpu", progress=False
    )
    again = DraftSieveLLM.from_dict(loaded.to_dict())
    assert again.to_dict() == loaded.to_dict()
    assert again.chat(with_documents()).message == loaded.chat(with_documents()).message


# -- what LlamaIndex does around it -------------------------------------------------------------


class Recorder(BaseEventHandler):
    """Keeps the events it is shown."""

    _seen: list[Any] = PrivateAttr(default_factory=list)

    def handle(self, event: Any, **kwargs: Any) -> None:
        self._seen.append(event)


async def test_token_counters_and_tracing_see_every_call() -> None:
    counter = TokenCountingHandler(tokenizer=str.split)
    recorder = Recorder()
    get_dispatcher().add_event_handler(recorder)
    model = llm(callback_manager=CallbackManager([counter]))
    try:
        model.chat(ASKED)
        model.complete(QUESTION)
        list(model.stream_chat(ASKED))
        await model.achat(ASKED)
        async for _ in await model.astream_complete(QUESTION):
            pass
    finally:
        get_dispatcher().event_handlers.remove(recorder)
    prompt = llm().complete(QUESTION).raw["usage"]["prompt_tokens"]
    assert [c.prompt_token_count for c in counter.llm_token_counts] == [prompt] * 5
    assert counter.completion_llm_token_count == 5 * 6
    ends = [e for e in recorder._seen if isinstance(e, LLMChatEndEvent | LLMCompletionEndEvent)]
    assert len(ends) == 5


def test_predict_puts_the_system_prompt_in_front() -> None:
    template = PromptTemplate("Tell me: {what}")
    said = llm(system_prompt="Be short.").predict(template, what=QUESTION)
    turns = [ChatMessage("Be short.", role="system"), ChatMessage(f"Tell me: {QUESTION}")]
    assert said == llm().chat(turns).message.content
    assert "".join(llm(system_prompt="Be short.").stream(template, what=QUESTION)) == said


def test_the_prompt_has_one_beginning_of_sequence() -> None:
    tokenizer = deepcopy(tiny_tokenizer())
    tokenizer.bos_token = "<|im_start|>"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", tokenizer.bos_token_id)]
    )
    tokenizer.chat_template = "{{ bos_token }}" + TEMPLATE
    assert tokenizer("a").input_ids[0] == tokenizer.bos_token_id
    model = DraftSieveLLM(engine=Engine(tiny_model(32, seed=1), tokenizer), max_tokens=1)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}], add_generation_prompt=True, return_dict=False
    )
    assert ids.count(tokenizer.bos_token_id) == 3  # once in front, once in front of each turn
    for response in (model.complete(QUESTION), model.chat(ASKED)):
        assert response.raw["usage"]["prompt_tokens"] == len(ids)


# -- messages and documents ---------------------------------------------------------------------


def test_a_broken_call_of_an_earlier_answer_is_named() -> None:
    block = ToolCallBlock(tool_call_id="c1", tool_name="lookup", tool_kwargs='{"id": 3')
    turns = [ChatMessage(QUESTION), ChatMessage([block], role="assistant")]
    with pytest.raises(PromptError, match="call of 'lookup' are no JSON object"):
        llm().chat(turns)
    with pytest.raises(PromptError, match="call of 'lookup' are no JSON object"):
        llm().get_tool_calls_from_response(ChatResponse(message=turns[1]))


@pytest.mark.parametrize(
    "given",
    [
        TEXTS,
        [Passage(t) for t in TEXTS],
        [TextNode(text=t, metadata={"file": "a.md"}) for t in TEXTS],
        [NodeWithScore(node=TextNode(text=t), score=0.5) for t in TEXTS],
    ],
)
def test_documents_of_a_call_stand_before_the_question(given: list[Any]) -> None:
    found = llm(method=METHOD).chat(ASKED, documents=given)
    blocks = [CitableBlock(title="t", source=f"s{n}", content=t) for n, t in enumerate(TEXTS)]
    same = llm(method=METHOD).chat([ChatMessage([*blocks, TextBlock(text=QUESTION)])])
    assert found.message == same.message
    assert found.raw["usage"] == same.raw["usage"]
    assert {s["passage"] for s in same.raw["spans"]} <= {"s0", "s1", "s2"}
    assert llm(method=METHOD).complete(QUESTION, documents=given).text == found.message.content


def test_messages_become_a_prompt() -> None:
    turns = [
        ChatMessage("rules", role="developer"),
        ChatMessage([TextBlock(text="a"), TextBlock(text="b")], role="user"),
        ChatMessage(
            [
                ThinkingBlock(content="hm"),
                TextBlock(text="I look."),
                CitationBlock(
                    cited_content="c", source="s", title="t", additional_location_info={}
                ),
                ToolCallBlock(tool_call_id="c1", tool_name="lookup", tool_kwargs='{"id": 3}'),
            ],
            role="assistant",
        ),
        ChatMessage("seven", role="tool", additional_kwargs={"tool_call_id": "c1"}),
        ChatMessage("so it is", role="chatbot"),
        ChatMessage(
            [
                DocumentBlock(data=b"Alpha text here.", title="A"),
                CitableBlock(title="B", source="b.md", content=[TextBlock(text="Beta text.")]),
                CachePoint(cache_control=CacheControl(type="ephemeral")),
                TextBlock(text="Which?"),
            ]
        ),
    ]
    prompt = as_prompt(turns, ["Zero."])
    assert mappings(prompt) == [
        ("system", "rules"),
        ("user", "a\nb"),
        ("assistant", "I look."),
        ("tool", "seven"),
        ("assistant", "so it is"),
        ("user", "[1] Zero.\n\n[2] Alpha text here.\n\n[3] Beta text.\n\nWhich?"),
    ]
    assert [p.id for p in prompt.passages] == ["1", "2", "b.md"]
    call = {"id": "c1", "type": "function", "function": {"name": "lookup", "arguments": {"id": 3}}}
    assert prompt.messages[2].extra == {"tool_calls": [call]}
    assert prompt.messages[3].extra == {"tool_call_id": "c1"}
    assert llm().chat(turns).raw["usage"]["completion_tokens"] == 6


@pytest.mark.parametrize(
    ("block", "said"),
    [
        (ImageBlock(url="https://example.org/a.png"), "ImageBlock"),
        (ThinkingBlock(content="hm"), "ThinkingBlock"),
        (DocumentBlock(data=b"%PDF-1.7 text"), "no plain text"),
        (DocumentBlock(data=b"\xff\xfe\xfd!", document_mimetype="text/plain"), "UTF-8"),
        (DocumentBlock(url="https://example.org/a.txt"), "no plain text"),
    ],
)
def test_what_cannot_be_read_is_named(block: Any, said: str) -> None:
    with pytest.raises(PromptError, match=said):
        llm().chat([ChatMessage([block, TextBlock(text="What is it?")])])


def test_messages_are_not_changed() -> None:
    turns = with_documents()
    before = deepcopy(turns)
    llm(method=METHOD).chat(turns)
    assert turns == before

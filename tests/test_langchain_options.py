"""Options of ChatDraftSieve and DraftSieveLLM: a call's own, wrong ones, messages, caches."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from langchain_core.caches import InMemoryCache
from langchain_core.globals import set_llm_cache
from langchain_core.messages import (
    AIMessage,
    ChatMessage,
    HumanMessage,
    RemoveMessage,
    SystemMessage,
    ToolMessage,
)

from draftsieve.core.config import SpecKV, SpecKVPC
from draftsieve.core.engine import Engine
from draftsieve.core.errors import BudgetError, ConfigError, ModelError, PromptError
from draftsieve.integrations.langchain import ChatDraftSieve, DraftSieveLLM
from draftsieve.integrations.langchain.messages import as_mappings

from .adapters_fixtures import (
    QUESTION,
    TEXTS,
    counted,
    tiny_engine,
    tiny_model,
    tiny_tokenizer,
)
from .langchain_fixtures import (
    METHOD,
    TINY,
    add,
    chat,
    document_messages,
    llm,
    pair_folder,
    text_of,
)


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
    with pytest.raises(ConfigError, match="temprature"):
        model.invoke(QUESTION, temprature=0.5)
    with pytest.raises(ConfigError, match="SpecPC or SpecKV or SpecKVPC") as wrong:
        model.invoke(QUESTION, method="specpc")
    assert str(wrong.value).count(".") == 1  # one sentence
    with pytest.raises(ConfigError, match="on_error"):
        model.invoke(QUESTION, on_error="ignore")


def test_invalid_options_fail_before_a_model_is_loaded() -> None:
    with pytest.raises(ConfigError, match="top_p"):
        ChatDraftSieve(model="gone", top_p=1.5)
    with pytest.raises(ModelError, match="draft="):
        ChatDraftSieve(model="gone", method=METHOD)
    plain = Engine(tiny_model(32, seed=1), tiny_tokenizer())
    with pytest.raises(ModelError, match="draft="):
        ChatDraftSieve(engine=plain, method=METHOD)


def test_a_method_that_reads_without_a_draft_needs_none() -> None:
    plain = Engine(tiny_model(64, seed=2), tiny_tokenizer())
    for scorer in ("snapkv", "laq", "key_norm"):
        method = SpecKV(capacity=90, scorer=scorer)
        model = ChatDraftSieve(engine=plain, method=method, max_tokens=4)
        found = model.invoke(document_messages())
        assert found.response_metadata["method"]["scorer"] == scorer
        assert found.usage_metadata["output_tokens"] == 4
    with pytest.raises(ModelError, match="draft="):
        ChatDraftSieve(engine=plain, method=SpecKV(capacity=90))
    with pytest.raises(ModelError, match="draft="):
        ChatDraftSieve(engine=plain, method=SpecKVPC(speckv=SpecKV(scorer="snapkv")))


def test_a_chat_model_loads_a_pair_when_it_is_made(tmp_path: Path) -> None:
    folder = str(pair_folder(tmp_path))
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


def unnamed(seed: int, **draft: Any) -> Engine:
    target = tiny_model(64, seed=seed)
    target.config.name_or_path = ""
    return Engine(target, tiny_tokenizer(), **draft)


@pytest.fixture
def cache_for_all() -> Iterator[None]:
    """LangChain's global cache."""
    set_llm_cache(InMemoryCache())
    yield
    set_llm_cache(None)


@pytest.mark.usefixtures("cache_for_all")
def test_a_cache_tells_unnamed_models_apart() -> None:
    for make in (ChatDraftSieve, DraftSieveLLM):
        first, second = (make(engine=unnamed(seed), max_tokens=6) for seed in (2, 3))
        assert first.model == second.model == "target"
        expected = [make(engine=unnamed(s), max_tokens=6, cache=False) for s in (2, 3)]
        own = [text_of(model.invoke(QUESTION)) for model in expected]
        assert own[0] != own[1]
        assert [text_of(model.invoke(QUESTION)) for model in (first, second)] == own
        again = make(engine=unnamed(2), max_tokens=6)
        with counted(again.engine) as calls:
            assert text_of(again.invoke(QUESTION)) == own[0]
        assert calls == []  # the same weights share what is known


def test_drafts_templates_and_quantisation_identify_a_model() -> None:
    drafts = [unnamed(2)]
    drafts += [unnamed(2, draft_model=tiny_model(32, seed=seed)) for seed in (1, 2)]
    drafts += [unnamed(2, template_options={"enable_thinking": True})]
    half = unnamed(2)
    half.target.to(torch.bfloat16)
    found = {json.dumps(ChatDraftSieve(engine=e)._identifying_params) for e in (*drafts, half)}
    assert len(found) == 5


def test_a_cache_tells_methods_apart() -> None:
    cache = InMemoryCache()
    whole = chat(cache=cache).invoke(document_messages())
    short = chat(cache=cache, method=METHOD).invoke(document_messages())
    assert short.usage_metadata["input_tokens"] < whole.usage_metadata["input_tokens"]
    with counted(tiny_engine()) as calls:
        chat(cache=cache, method=METHOD).invoke(document_messages())
    assert calls == []


@pytest.mark.usefixtures("cache_for_all")
@pytest.mark.parametrize("everywhere", [False, True])
async def test_a_cache_does_not_confuse_documents(everywhere: bool) -> None:
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

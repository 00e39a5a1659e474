from __future__ import annotations

from typing import Any

import pytest

from draftsieve.core.errors import PromptError
from draftsieve.core.prompt.messages import DEFAULT_SYSTEM, Prompt
from draftsieve.core.types import Passage, Segment


def content(prompt: Prompt, index: int = -1) -> str:
    return "".join(part.text for part in prompt.layout(prompt.messages[index]))


def test_question_layout_is_the_one_the_bundled_pair_was_trained_on() -> None:
    prompt = Prompt.from_question("Who?", ["first text", "second text"])
    assert [m.role for m in prompt.messages] == ["system", "user"]
    assert content(prompt, 0) == DEFAULT_SYSTEM
    assert content(prompt) == "[1] first text\n\n[2] second text\n\nQuestion: Who?"
    assert prompt.question == "Who?"
    assert prompt.documents_text == "[1] first text\n\n[2] second text"


def test_question_without_passages_or_system() -> None:
    for system in (None, ""):
        prompt = Prompt.from_question("Who?", [], system=system)
        assert len(prompt.messages) == 1
        assert content(prompt) == "Question: Who?"
        assert prompt.documents_text == ""


@pytest.mark.parametrize("empty", ["", " \n\t"])
def test_numbers_stay_when_passages_are_emptied(empty: str) -> None:
    prompt = Prompt.from_question("Who?", ["a", Passage("b", "x", {"k": 1}), "c"])
    shorter = prompt.with_texts([empty, "B", "c"])
    assert content(shorter) == "[2] B\n\n[3] c\n\nQuestion: Who?"
    assert shorter.documents_text == "[2] B\n\n[3] c"
    assert [p.id for p in shorter.passages] == ["1", "x", "3"]
    assert shorter.passages[1].metadata == {"k": 1}
    assert content(prompt.with_texts([empty] * 3)) == "Question: Who?"
    assert content(prompt).startswith("[1] a")


def test_segments() -> None:
    prompt = Prompt.from_question("Who?", ["a", "b"])
    kinds = [(p.text, p.segment, p.passage) for p in prompt.layout(prompt.messages[1])]
    assert kinds == [
        ("[1] ", Segment.NUMBER, None),
        ("a", Segment.PASSAGE, 0),
        ("\n\n", Segment.MESSAGE, None),
        ("[2] ", Segment.NUMBER, None),
        ("b", Segment.PASSAGE, 1),
        ("\n\n", Segment.MESSAGE, None),
        ("Question: ", Segment.MESSAGE, None),
        ("Who?", Segment.QUESTION, None),
    ]


def test_documents_stand_before_the_last_user_message() -> None:
    calls = [{"type": "function", "function": {"name": "find", "arguments": {"q": "x"}}}]
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "tool", "content": "found", "tool_call_id": "7"},
        {"role": "user", "content": "Who?"},
        {"role": "assistant", "content": ""},
    ]
    prompt = Prompt.from_messages(messages, ["a", "b"], [{"name": "find"}])
    assert content(prompt, 4) == "[1] a\n\n[2] b\n\nWho?"
    assert content(prompt, 1) == "Hello"
    assert prompt.question == "Who?"
    assert prompt.messages[2].extra == {"tool_calls": calls, "content": None}
    assert prompt.messages[3].extra == {"tool_call_id": "7"}
    assert prompt.tools == ({"name": "find"},)
    segments = [p.segment for m in prompt.messages for p in m.parts if p.text]
    assert segments == [Segment.SYSTEM, Segment.MESSAGE, Segment.MESSAGE, Segment.QUESTION]


def test_document_blocks_stay_in_place_and_are_numbered_after_the_documents() -> None:
    document = {"type": "document", "text": "in place", "id": 5, "title": "T", "metadata": {"p": 2}}
    blocks = [
        {"type": "text", "text": "Read "},
        {"type": "text", "text": "this:"},
        document,
        {"type": "text", "text": "Who?"},
    ]
    prompt = Prompt.from_messages([{"role": "user", "content": blocks}], ["given"])
    assert content(prompt) == "[1] given\n\nRead this:\n\n[2] in place\n\nWho?"
    assert prompt.passages[1] == Passage("in place", "5", {"title": "T", "p": 2})
    assert prompt.question == "Read this:Who?"
    assert prompt.documents_text == "[1] given\n\n[2] in place"
    assert content(prompt.with_texts(["given", ""])) == "[1] given\n\nRead this:Who?"


def test_ids_of_duplicates_are_kept() -> None:
    prompt = Prompt.from_question("Who?", [Passage("a", "same"), Passage("a", "same")])
    assert [p.id for p in prompt.passages] == ["same", "same"]


@pytest.mark.parametrize(
    ("question", "passages", "message"),
    [
        ("", ["a"], "question is empty"),
        (" \n", ["a"], "question is empty"),
        (3, ["a"], "question must be a string, not int"),
        ("q", ["a", 3], "Passage 2 must be a string or a Passage, not int"),
        ("q", [Passage(None)], "passage 1 must be a string, not NoneType"),  # type: ignore[arg-type]
        ("q", "text", "not one string"),
    ],
)
def test_wrong_questions(question: Any, passages: Any, message: str) -> None:
    with pytest.raises(PromptError, match=message):
        Prompt.from_question(question, passages)


@pytest.mark.parametrize(
    ("messages", "documents", "message"),
    [
        ([], [], "non-empty sequence"),
        ([{"content": "x"}], [], "Message 1 is not a mapping with a 'role'"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], [], "'image_url'"),
        ([{"role": "user", "content": [{"type": "text"}]}], [], "'text' of a text block"),
        ([{"role": "user", "content": 3}], [], "not int"),
        ([{"role": "user", "content": " "}], [], "last user message is empty"),
        ([{"role": "assistant", "content": "x"}], ["a"], "no user message"),
    ],
)
def test_wrong_messages(messages: Any, documents: Any, message: str) -> None:
    with pytest.raises(PromptError, match=message):
        Prompt.from_messages(messages, documents)


def test_wrong_number_of_texts() -> None:
    with pytest.raises(PromptError, match="Got 1 texts for 2 passages"):
        Prompt.from_question("q", ["a", "b"]).with_texts(["a"])


@pytest.mark.parametrize(
    ("call", "said"),
    [
        ({"name": "find", "arguments": '{"q": "cut o'}, "call of 'find' are no JSON object"),
        ({"name": "find", "arguments": "[1]"}, "call of 'find' are no JSON object"),
        ({"name": "find", "arguments": 3}, "call of 'find' are no JSON object"),
        ({"arguments": {}}, "no mapping with a function's name"),
        ("find", "no mapping with a function's name"),
    ],
)
def test_calls_that_cannot_be_read_are_named(call: Any, said: str) -> None:
    for whole in (call, {"type": "function", "function": call}):
        turns = [
            {"role": "user", "content": "Hello"},
            {"role": "assistant", "content": None, "tool_calls": [whole]},
        ]
        with pytest.raises(PromptError, match=said):
            Prompt.from_messages(turns)

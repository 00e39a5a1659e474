"""Grammars: what they allow, against brute force; decoding under them; what a cut answer is."""

from __future__ import annotations

import json
import logging
import random
import sys
from typing import Any

import pytest
import regex
import torch

from draftsieve.core.config import Generation, SpecPC
from draftsieve.core.engine import Engine
from draftsieve.core.errors import GrammarError, MissingExtraError
from draftsieve.core.generation.constrained import Constraint, Grammars
from draftsieve.core.generation.row_text import RowText
from draftsieve.core.grammar import Grammar
from draftsieve.core.prompt.messages import Prompt
from draftsieve.core.types import Answer

from .adapters_fixtures import (
    QUESTION,
    TEXTS,
    tiny_engine,
    tiny_model,
    tiny_tokenizer,
)
from .tokenizer_styles import STYLES

END = 1  # <|im_end|>
SCHEMA = {
    "type": "object",
    "properties": {
        "place": {"enum": ["Holm", "harbour"]},
        "open": {"type": "boolean"},
        "hour": {"type": "integer", "minimum": 0, "maximum": 23},
    },
    "required": ["place", "hour"],
}
TOOLS = [
    {
        "type": "function",
        "function": {"name": "ferry", "description": "Times.", "parameters": SCHEMA},
    },
    {"type": "function", "function": {"name": "museum", "description": "Opening hours."}},
]


def grammars() -> Grammars:
    return Grammars(tiny_tokenizer().backend_tokenizer)


def start(grammar: Grammar) -> Constraint:
    return grammars().start(grammar, frozenset([END]))


def allowed(grammar: Grammar, text: str, width: int = 400) -> set[int] | None:
    """Ids that may follow a text; None where the text itself is not allowed."""
    constraint = start(grammar)
    zeros = torch.zeros(width)
    for token in tiny_tokenizer().encode(text, add_special_tokens=False):
        if constraint.complete or constraint.mask(zeros)[token] != 0:
            return None
        constraint.accept(token)
    return set(torch.nonzero(constraint.mask(zeros) == 0).flatten().tolist())


def fits(grammar: Grammar, text: str) -> bool:
    """Whether a whole text is allowed."""
    found = allowed(grammar, text)
    return found is not None and END in found


def ask(grammar: Grammar | None, **options: Any) -> Answer:
    generation = Generation(**{"max_new_tokens": 60, "grammar": grammar, **options})
    return tiny_engine().generate(prompt(), generation=generation)


def prompt(question: str = QUESTION, tools: Any = None) -> Prompt:
    return Prompt.from_messages([{"role": "user", "content": question}], TEXTS, tools)


# -- what is allowed ----------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", "f", "fe", "ferry 1", "ferry 12", "ferry 12 "])
def test_allowed_tokens_are_those_of_brute_force(text: str) -> None:
    pattern = r"(ferry|fee) [0-9]+( at)?"
    tokenizer = tiny_tokenizer()
    expected = {END} if regex.fullmatch(pattern, text) else set()
    for token in range(2, len(tokenizer)):
        piece = tokenizer.decode([token])
        if regex.fullmatch(pattern, text + piece, partial=True):
            expected.add(token)
    assert allowed(Grammar.regex(pattern), text) == expected


def test_logits_beyond_the_tokenizer_are_forbidden() -> None:
    wide = allowed(Grammar.regex("[a-z]*"), "", width=480)
    assert wide == allowed(Grammar.regex("[a-z]*"), "", width=400)


@pytest.mark.parametrize(
    ("text", "good"),
    [
        ('{"place": "Holm", "hour": 7}', True),
        ('{"place": "Holm", "open": true, "hour": 23}', True),
        ('{"place": "Holm"}', False),
        ('{"place": "Holm", "hour": 24}', False),
        ('{"place": "Oslo", "hour": 7}', False),
        ('{"place": "Holm", "hour": 7, "more": 1}', False),
        ('{"place": "Holm",  "hour": 7}', False),
    ],
)
def test_json_fits_its_schema(text: str, good: bool) -> None:
    assert fits(Grammar.json_schema(SCHEMA), text) == good


def test_objects_are_closed_unless_the_schema_opens_them() -> None:
    inner = {"type": "object", "properties": {"a": {"type": "integer"}}}
    nested = {"type": "object", "properties": {"o": inner, "properties": {"type": "boolean"}}}
    assert fits(Grammar.json_schema(nested), '{"o": {"a": 1}, "properties": true}')
    assert not fits(Grammar.json_schema(nested), '{"o": {"b": 1}}')
    assert fits(Grammar.json_schema({**inner, "additionalProperties": True}), '{"b": 1}')
    assert fits(Grammar.json_schema({"type": "object"}), '{"b": [1, "x"]}')
    both = {"allOf": [inner, {"type": "object", "properties": {"b": {"type": "integer"}}}]}
    assert fits(Grammar.json_schema(both), '{"a": 1, "b": 2}')
    assert nested["properties"]["o"] is inner  # the caller's schema is not changed
    assert "additionalProperties" not in inner


def test_integers_are_exact_everywhere_unless_bounded() -> None:
    free = Grammar.json_schema({"type": "integer"})
    assert fits(free, str(2**53 - 1))
    assert fits(free, str(1 - 2**53))
    assert not fits(free, str(2**53))
    assert fits(Grammar.json_schema({"type": "integer", "minimum": 0}), str(2**53))


@pytest.mark.parametrize("choice", ["auto", "any", "ferry", "museum"])
def test_calls_fit_the_choice(choice: str) -> None:
    ferry = (
        '<tool_call>\n{"name": "ferry", "arguments": {"place": "Holm", "hour": 7}}\n</tool_call>'
    )
    museum = '<tool_call>\n{"name": "museum", "arguments": {}}\n</tool_call>'
    grammar = Grammar.tool_calls(TOOLS, choice)
    assert fits(grammar, "It leaves at seven.") == (choice == "auto")
    assert fits(grammar, ferry) == (choice != "museum")
    assert fits(grammar, museum) == (choice != "ferry")
    assert fits(grammar, f"{ferry}\n{museum}") == (choice in ("auto", "any"))
    assert fits(grammar, f"I look.\n{museum} Done") == (choice == "auto")
    assert not fits(grammar, museum.replace("{}", '{"x": 1}'))
    assert not fits(grammar, museum.replace("museum", "station"))
    assert not fits(grammar, museum[:-3])


def test_one_call_where_calls_may_not_be_parallel() -> None:
    call = '<tool_call>\n{"name": "museum", "arguments": {}}\n</tool_call>'
    for choice in ("auto", "any", "museum"):
        one = Grammar.tool_calls(TOOLS, choice, parallel=False)
        assert fits(one, call)
        assert fits(Grammar.tool_calls(TOOLS, choice), f"{call}\n{call}")
        # words may follow a call where words are allowed, and they may look like a call
        assert fits(one, f"{call}\n{call}") == (choice == "auto")


@pytest.mark.parametrize("style", ["chatml", "llama3", "llama2", "llama2_legacy", "gemma", "phi3"])
def test_random_walks_end_in_text_that_fits(style: str) -> None:
    """Byte-level and byte-fallback tokenizers: what is decoded is what the grammar allowed."""
    tokenizer = STYLES[style]()
    end = tokenizer.eos_token_id
    found = Grammars(tokenizer.backend_tokenizer)
    draw = random.Random(0)
    for pattern in ("[a-z]{2,5} [0-9]{1,3}", "x(é|東京)+ ?[.]", '"[^"]{0,4}", "b"'):
        for _ in range(5):
            constraint = found.start(Grammar.regex(pattern), frozenset([end]))
            row = RowText(tokenizer.backend_tokenizer, frozenset([end]), (), 200, constraint)
            text = ""
            while row.finish_reason is None:
                mask = constraint.mask(torch.zeros(len(tokenizer))) == 0
                token = draw.choice(torch.nonzero(mask).flatten().tolist())
                constraint.accept(token)
                text += row.push(token)
            assert row.finish_reason == "stop"
            assert regex.fullmatch(pattern, text)


@pytest.mark.parametrize("style", ["unigram", "wordpiece"])
def test_tokenizers_that_cannot_spell_every_byte_are_refused(style: str) -> None:
    found = Grammars(STYLES[style]().backend_tokenizer)
    with pytest.raises(GrammarError, match="tokenizer"):
        found.start(Grammar.regex("a"), frozenset([1]))


@pytest.mark.parametrize(
    ("text", "closing"),
    [
        ('{"name": "Ann', '"'),
        ('{"name": "Ann", "ages": [3', "]"),
        ('{"name": "Ann", "ages": [3]', "}"),
        ('{"name": "Ann"', ","),
    ],
)
def test_the_wish_to_end_closes_what_is_open(text: str, closing: str) -> None:
    ages = {"type": "array", "items": {"type": "integer"}}
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string"}, "ages": ages},
        "required": ["name", "ages"],
    }
    tokenizer = tiny_tokenizer()
    constraint = start(Grammar.json_schema(schema))
    for token in tokenizer.encode(text, add_special_tokens=False):
        constraint.accept(token)
    logits = torch.zeros(400)
    logits[END] = 3.0
    masked = constraint.mask(logits)
    assert int(masked.argmax()) == tokenizer.convert_tokens_to_ids(closing)
    assert masked.max() == 3.0
    assert logits.count_nonzero() == 1  # the given ones are not changed


# -- decoding -----------------------------------------------------------------------------------


def test_an_answer_fits_its_schema_and_ends_with_it() -> None:
    grammar = Grammar.json_schema(SCHEMA)
    assert not fits(grammar, ask(None).text)
    answers = [ask(grammar), *(ask(grammar, temperature=2.0, seed=seed) for seed in range(6))]
    for answer in answers:
        assert fits(grammar, answer.text)
        assert json.loads(answer.text)["hour"] in range(24)
        assert answer.finish_reason == "stop"
    assert len({answer.text for answer in answers}) > 1
    assert ask(grammar, temperature=2.0, seed=3).text == answers[4].text


def test_other_samplers_stay_inside_the_grammar() -> None:
    grammar = Grammar.json_schema(SCHEMA)
    options = {"top_k": 5, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.3}
    for seed in range(3):
        assert fits(grammar, ask(grammar, temperature=1.0, seed=seed, **options).text)


def test_rows_of_a_batch_have_their_own_grammars() -> None:
    prompts = [prompt(), prompt("When?"), prompt("Is it open on Sundays, and when?")]
    generations = [
        Generation(max_new_tokens=40, grammar=Grammar.json_schema(SCHEMA)),
        Generation(max_new_tokens=12),
        Generation(
            max_new_tokens=30, grammar=Grammar.regex("[a-z ]{5,9}[.]"), temperature=1, seed=4
        ),
    ]
    method = SpecPC(ratio=0.5)
    together = tiny_engine().generate_many(prompts, generation=generations, method=method)
    for asked, generation, answer in zip(prompts, generations, together, strict=True):
        alone = tiny_engine().generate(asked, generation=generation, method=method)
        assert answer.text == alone.text
        assert answer.finish_reason == alone.finish_reason
    assert fits(generations[0].grammar, together[0].text)  # type: ignore[arg-type]
    assert together[1].usage.completion_tokens == 12
    assert regex.fullmatch("[a-z ]{5,9}[.]", together[2].text)


def test_a_cut_answer_is_the_beginning_of_an_allowed_one() -> None:
    grammar = Grammar.json_schema(SCHEMA)
    whole, cut = ask(grammar), ask(grammar, max_new_tokens=6)
    assert cut.finish_reason == "length"
    assert cut.usage.completion_tokens == 6
    assert whole.text.startswith(cut.text)
    assert not fits(grammar, cut.text)
    assert allowed(grammar, cut.text)


def test_a_grammar_ends_an_answer_of_a_model_without_end_token() -> None:
    answer = ask(Grammar.regex("[0-9]{3}"))
    assert len(answer.text) == 3
    assert answer.finish_reason == "stop"
    assert answer.usage.completion_tokens <= 3


async def test_streams_under_a_grammar_add_up() -> None:
    generation = Generation(max_new_tokens=60, grammar=Grammar.json_schema(SCHEMA))
    chunks = list(tiny_engine().stream_prompt(prompt(), generation=generation))
    expected = ask(generation.grammar).text
    assert "".join(chunk.text for chunk in chunks) == expected
    slow = [c async for c in tiny_engine().astream_prompt(prompt(), generation=generation)]
    assert "".join(chunk.text for chunk in slow) == expected


def test_tool_calls_of_an_answer_are_plain_values() -> None:
    asked = prompt(tools=TOOLS)
    grammar = Grammar.tool_calls(TOOLS, "ferry", parallel=False)
    generation = Generation(max_new_tokens=200, grammar=grammar)
    answer = tiny_engine().generate(asked, generation=generation)
    (call,) = answer.tool_calls
    assert call.name == "ferry"
    assert call.arguments["place"] in ("Holm", "harbour")
    assert answer.text == ""
    assert answer.broken_calls == ()
    chunks = list(tiny_engine().stream_prompt(asked, generation=generation))
    assert tuple(call for chunk in chunks for call in chunk.tool_calls) == answer.tool_calls
    assert chunks[-1].answer is not None
    assert chunks[-1].answer.tool_calls == answer.tool_calls
    cut = generation.model_copy(update={"max_new_tokens": 20})
    answer = tiny_engine().generate(asked, generation=cut)
    assert answer.tool_calls == ()
    assert len(answer.broken_calls) == 1
    assert answer.finish_reason == "length"


JSON = '{"place": "Holm", "hour": 7}'
CALL = '<tool_call>\n{"name": "museum", "arguments": {}}\n</tool_call>'


@pytest.mark.parametrize(
    ("text", "good"),
    [
        (JSON, True),
        (CALL, True),
        (f"{CALL}\n{CALL}", True),
        ("At seven.", False),
        (f"{JSON}\n{CALL}", False),
        (f"{CALL}\n{JSON}", False),
        ("", False),
    ],
)
def test_an_answer_is_calls_or_json_of_the_schema(text: str, good: bool) -> None:
    assert fits(Grammar.tool_calls(TOOLS, "auto", answer=SCHEMA), text) == good
    single = Grammar.tool_calls(TOOLS, "auto", parallel=False, answer=SCHEMA)
    assert fits(single, text) == (good and text.count("<tool_call>") < 2)


def test_a_chosen_tool_leaves_nothing_to_say() -> None:
    for choice in ("any", "ferry"):
        assert Grammar.tool_calls(TOOLS, choice, answer=SCHEMA) == Grammar.tool_calls(TOOLS, choice)


def test_json_that_spells_a_call_is_no_call() -> None:
    said = '{"said": "<tool_call>{}</tool_call>"}'
    schema = {"type": "object", "properties": {"said": {"const": "<tool_call>{}</tool_call>"}}}
    needed = {**schema, "required": ["said"]}
    grammar = Grammar.tool_calls(TOOLS, "auto", answer=needed)
    generation = Generation(max_new_tokens=200, grammar=grammar)
    engine, asked = json_first(), prompt(tools=TOOLS)
    answer = engine.generate(asked, generation=generation)
    assert (answer.text, answer.tool_calls, answer.broken_calls) == (said, (), ())
    chunks = list(engine.stream_prompt(asked, generation=generation))
    assert "".join(chunk.text for chunk in chunks) == said


def json_first() -> Engine:
    """A tiny model that rather opens an object than a call."""
    model = tiny_model(64, seed=2)
    brace = tiny_tokenizer().convert_tokens_to_ids("{")
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(len(tiny_tokenizer())))
    model.lm_head.bias.data[brace] = 1e4
    return Engine(model, tiny_tokenizer())


# -- what cannot be used ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Grammar.regex("[0-9"), "regex"),
        (lambda: Grammar.json_schema({"type": "foo"}), "foo"),
        (lambda: Grammar.json_schema([1]), "mapping"),  # type: ignore[arg-type]
        (lambda: Grammar.tool_calls([], "auto"), "tools are"),
        (lambda: Grammar.tool_calls(TOOLS, "station"), "station"),
    ],
)
def test_grammars_that_cannot_be_used(make: Any, message: str) -> None:
    with pytest.raises(GrammarError, match=message):
        start(make())


def test_what_is_not_enforced_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        start(Grammar.json_schema({"type": "array", "uniqueItems": True}))
    assert "uniqueItems" in caplog.text


def test_a_missing_library_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(MissingExtraError, match=r'pip install "draftsieve\[tools\]"'):
        Grammar.regex("a")


def test_equal_grammars_are_compiled_once() -> None:
    found = grammars()
    for _ in range(3):
        found.start(Grammar.json_schema(SCHEMA), frozenset([END]))
    assert found._compiled.cache_info().misses == 1


def test_answers_of_one_grammar_do_not_disturb_each_other() -> None:
    found, grammar, ends = grammars(), Grammar.regex("ab|cd"), frozenset([END])
    first, second = found.start(grammar, ends), found.start(grammar, ends)
    a, c = (tiny_tokenizer().convert_tokens_to_ids(letter) for letter in "ac")
    first.accept(a)
    second.accept(c)
    assert not torch.equal(first.mask(torch.zeros(400)), second.mask(torch.zeros(400)))

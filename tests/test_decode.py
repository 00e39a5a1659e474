"""Decoding of batches: a finished row leaves, and the others get what they get alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, OPTConfig, OPTForCausalLM, PreTrainedModel

from draftsieve import Engine, Generation, Grammar, Prompt, SpecKV
from draftsieve.core.config import Method
from draftsieve.core.generation.constrained import Constraint, Grammars
from draftsieve.core.generation.decode import Batch, Row, next_tokens
from draftsieve.core.generation.row_text import RowText
from draftsieve.core.kv_cache.greedy import guess
from draftsieve.core.kv_cache.prefill import Start, from_scratch
from draftsieve.core.kv_cache.rows import Rows
from draftsieve.core.speckv.evict import evict

from . import families
from .adapters_fixtures import QUESTION, TEXTS, tiny_engine, tiny_model, tiny_tokenizer

PROMPTS = [
    Prompt.from_question(QUESTION, TEXTS),
    Prompt.from_question("Where are tickets sold?", TEXTS[:2]),
    Prompt.from_question("What does the museum show?", TEXTS[1:]),
]
LENGTHS = [4, 20, 11]
EACH = [Generation(max_new_tokens=length) for length in LENGTHS]


def learned_positions(name: str, window: int) -> PreTrainedModel:
    """A tiny random model that looks positions up in a table of `window` rows."""
    torch.manual_seed(3)
    vocabulary = len(tiny_tokenizer())
    if name == "gpt2":
        config = GPT2Config(
            vocab_size=vocabulary, n_positions=window, n_embd=32, n_layer=2, n_head=4
        )
        config.bos_token_id = config.eos_token_id = None
        return GPT2LMHeadModel(config).eval()
    opt = OPTConfig(
        vocab_size=vocabulary,
        max_position_embeddings=window,
        hidden_size=32,
        word_embed_proj_dim=32,
        ffn_dim=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        pad_token_id=1,
        bos_token_id=None,
        eos_token_id=None,
    )
    return OPTForCausalLM(opt).eval()


@contextmanager
def fed(model: PreTrainedModel) -> Iterator[list[int]]:
    """Rows of each forward pass that reads one token a row."""
    rows: list[int] = []

    def note(_module: object, _args: object, given: dict[str, torch.Tensor]) -> None:
        ids = given["input_ids"]
        if ids.shape[1] == 1:
            rows.append(ids.shape[0])

    hook = model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield rows
    finally:
        hook.remove()


@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_a_row_that_has_filled_the_window_is_read_no_further(name: str) -> None:
    size = tiny_engine().generate(PROMPTS[0], generation=EACH[0]).usage.prompt_tokens
    engine = Engine(learned_positions(name, size + 3), tiny_tokenizer())
    options = Generation(max_new_tokens=30)
    alone = [engine.generate(prompt, generation=options) for prompt in PROMPTS[:2]]
    assert [answer.usage.completion_tokens for answer in alone] == [3, 30]
    together = engine.generate_many(PROMPTS[:2], generation=options)
    assert [answer.text for answer in together] == [answer.text for answer in alone]
    assert [answer.usage for answer in together] == [answer.usage for answer in alone]


@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_a_guess_that_has_filled_the_drafts_window_is_read_no_further(name: str) -> None:
    draft, prompts = learned_positions(name, 43), [torch.arange(5, 45), torch.arange(9, 19)]
    alone = [
        guess(draft, [prompt], limit)[0] for prompt, limit in zip(prompts, (3, 30), strict=True)
    ]
    assert [row.tolist() for row in guess(draft, prompts, [3, 30])] == [a.tolist() for a in alone]


@pytest.mark.parametrize(
    "method",
    [
        None,
        SpecKV(ratio=0.4, lookahead_tokens=4),
        SpecKV(ratio=0.4, lookahead_tokens=4, head_budgets="adaptive", layer_budgets="pyramid"),
    ],
    ids=["full", "evicted", "uneven"],
)
@pytest.mark.parametrize("sampled", [False, True])
def test_finished_rows_leave_every_kind_of_cache(method: Method | None, sampled: bool) -> None:
    engine, each = tiny_engine(), EACH
    if sampled:
        each = [o.model_copy(update={"temperature": 1.3, "seed": 5}) for o in EACH]
    alone = [
        engine.generate(prompt, method=method, generation=options)
        for prompt, options in zip(PROMPTS, each, strict=True)
    ]
    with fed(engine.target) as rows:
        together = engine.generate_many(PROMPTS, method=method, generation=each)
    assert [answer.text for answer in together] == [answer.text for answer in alone]
    assert rows == [3] * 4 + [2] * 7 + [1] * 9  # a pass for each token, and nothing beyond


class Watched(Constraint):
    """Counts how often it is asked and told."""

    asked = told = 0

    def mask(self, logits: torch.Tensor) -> torch.Tensor:
        self.asked += 1
        return super().mask(logits)

    def accept(self, token: int) -> None:
        self.told += 1
        super().accept(token)


def test_grammars_of_finished_rows_stay_where_they_are() -> None:
    model, tokenizer = tiny_model(64, seed=2), tiny_tokenizer()
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    prompts = [torch.arange(5, 25), torch.arange(30, 50), torch.arange(60, 85)]
    texts = (("ferry", 60), ("(lamp ){40}", 5), ("(lamp ){4}", 60))
    rows = []
    for prompt, (text, limit) in zip(prompts, texts, strict=True):
        grammar = Grammars(tokenizer.backend_tokenizer).start(Grammar.regex(text), frozenset([end]))
        watched = Watched(grammar._matcher, grammar._ends, grammar._closing)
        ends, backend = frozenset([end]), tokenizer.backend_tokenizer
        said = RowText(backend, ends, (), limit, constraint=watched)
        rows.append(Row(prompt, Generation(max_new_tokens=60), said))
    batch, answers = Batch(model, from_scratch(model, prompts), rows), dict.fromkeys(rows, "")
    while batch.rows:
        for row, piece in batch.step():
            answers[row] += piece
    assert answers[rows[0]] == "ferry"
    assert answers[rows[2]] == "lamp " * 4
    assert [row.text.finish_reason for row in rows] == ["stop", "length", "stop"]
    for row in rows:
        assert isinstance(row.text.constraint, Watched)
        assert row.text.constraint.asked == row.text.constraint.told == row.text.tokens


# -- rows that join while others go on ----------------------------------------------------------

# step, tokens of the prompt, tokens of the answer
LATER = ((0, 18, 30), (3, 45, 9), (4, 9, 12), (14, 30, 12))


def together(model: PreTrainedModel, starts: Sequence[Start]) -> tuple[list[list[int]], list[int]]:
    """Greedy answers of rows that come and go as `LATER` says, and the columns of each step."""
    said: list[list[int]] = [[] for _ in starts]
    places: list[int] = []  # of the rows that are being decoded
    running, columns = Rows(model, starts[0]), []

    def step(rows: Rows, its: list[int]) -> None:
        tokens = rows.read().argmax(-1).tolist()
        rows.feed(tokens)
        for place, token in zip(its, tokens, strict=True):
            said[place].append(token)

    for now in range(40):
        for place, (when, _, _) in enumerate(LATER):
            if when == now and place:
                step(new := Rows(model, starts[place]), [place])
                running.join(new)
            if when == now:
                places.append(place)
        if not places:
            break
        step(running, places)
        columns.append(running.mask.shape[1])
        staying = [i for i, place in enumerate(places) if len(said[place]) < LATER[place][2]]
        places = [places[i] for i in staying]
        if places:
            running.keep(staying)
    return said, columns


@pytest.mark.parametrize(("name", "implementation"), families.CASES)
def test_rows_that_come_and_go_get_what_they_get_alone(name: str, implementation: str) -> None:
    model = families.build(name, implementation)
    prompts = [families.ids(length, seed=length)[0] for _, length, _ in LATER]
    alone = [
        [t for (t,) in next_tokens(model, [prompt], Generation(max_new_tokens=length))]
        for prompt, (*_, length) in zip(prompts, LATER, strict=True)
    ]
    said, columns = together(model, [from_scratch(model, [prompt]) for prompt in prompts])
    assert said == alone
    assert max(columns) > 45
    assert columns[-1] <= 18 + 30 + 1, "the padding went with the longest row"


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_evicted_rows_go_on_beside_full_ones(implementation: str) -> None:
    model, options = families.build("llama", implementation), SpecKV(window_size=4)
    prompts = [families.ids(length, seed=length)[0] for _, length, _ in LATER]

    def start(place: int) -> Start:
        prompt, capacity = prompts[place], (12, None, 6, 20)[place]
        if capacity is None:
            return from_scratch(model, [prompt])
        guess_ = families.ids(3, seed=place)[0]
        return evict(model, [prompt], [guess_], options, [capacity]).start

    alone = []
    for place, (*_, length) in enumerate(LATER):
        more = Generation(max_new_tokens=length)
        steps = next_tokens(model, [prompts[place]], more, start(place))
        alone.append([token for (token,) in steps])
    assert together(model, [start(i) for i in range(len(LATER))])[0] == alone


def test_what_cannot_go_on_beside_others_is_known() -> None:
    prompt, none = families.ids(40, seed=1)[0], torch.tensor([], dtype=torch.int64)

    def joins(name: str, method: SpecKV | None = None) -> bool:
        model = families.build(name, "sdpa")
        start = from_scratch(model, [prompt])
        if method is not None:
            start = evict(model, [prompt], [none], method, [20]).start
        text = RowText(tiny_tokenizer().backend_tokenizer, frozenset(), (), limit=9)
        row = Row(prompt, Generation(), text)
        (batch := Batch(model, start, [row])).step()
        return batch.can_join(batch)

    assert joins("llama")
    assert joins("gemma3")
    assert joins("llama", SpecKV(window_size=4))
    assert not joins("gemma3", SpecKV(window_size=4)), "the window counts other columns"
    assert not joins("llama", SpecKV(window_size=4, head_budgets="adaptive"))

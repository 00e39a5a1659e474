"""Decoding of batches: a finished row leaves, and the others get what they get alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, OPTConfig, OPTForCausalLM, PreTrainedModel

from draftsieve import Engine, Generation, Grammar, Prompt, SpecKV
from draftsieve.core.compressor import Compressor
from draftsieve.core.config import Method
from draftsieve.core.generation.constrained import Constraint, Grammars
from draftsieve.core.generation.decode import RowText, decode_text

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
    tokenizer = tiny_tokenizer()
    size = tiny_engine().generate(PROMPTS[0], generation=EACH[0]).usage.prompt_tokens
    draft = Compressor(learned_positions(name, size + 3), tokenizer)
    alone = [draft.guess(prompt, 30).tolist() for prompt in PROMPTS[:2]]
    assert [len(guess) for guess in alone] == [3, 30]
    assert [guess.tolist() for guess in draft.guess_many(PROMPTS[:2], [30, 30])] == alone


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
    rows = []
    for text, limit in (("ferry", 60), ("(lamp ){40}", 5), ("(lamp ){4}", 60)):
        grammar = Grammars(tokenizer.backend_tokenizer).start(Grammar.regex(text), frozenset([end]))
        watched = Watched(grammar._matcher, grammar._ends, grammar._closing)
        rows.append(
            RowText(tokenizer.backend_tokenizer, frozenset([end]), (), limit, constraint=watched)
        )
    prompts = [torch.arange(5, 25), torch.arange(30, 50), torch.arange(60, 85)]
    options = [Generation(max_new_tokens=60)] * 3
    said = [
        "".join(parts) for parts in zip(*decode_text(model, prompts, options, rows), strict=True)
    ]
    assert said[0] == "ferry"
    assert said[2] == "lamp " * 4
    assert [row.finish_reason for row in rows] == ["stop", "length", "stop"]
    for row in rows:
        assert isinstance(row.constraint, Watched)
        assert row.constraint.asked == row.constraint.told == row.tokens

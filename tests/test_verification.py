"""Drafts change nothing: every family and cache, greedy and sampled, whole and streamed."""

from __future__ import annotations

import gc
import random
from collections.abc import Callable, Sequence

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel, models
from transformers.cache_utils import DynamicLayer

from draftsieve import Engine, Generation, Prompt, Quantization, SpecKV, SpecPC
from draftsieve.core.config import DraftKind
from draftsieve.core.errors import ModelError
from draftsieve.core.generation.decode import next_tokens
from draftsieve.core.generation.sampling import Sampler
from draftsieve.core.generation.speculative.drafters.tree import EMPTY, TokenTree
from draftsieve.core.generation.speculative.tree_attention import TreeReader, obstacle
from draftsieve.core.generation.speculative.verify import Speculation, Tally, verified_tokens
from draftsieve.core.kv_cache.prefill import Start, from_scratch
from draftsieve.core.speckv.evict import evict

from . import families
from .adapters_fixtures import QUESTION, TEXTS, tiny_engine, tiny_model, tiny_tokenizer

KINDS: tuple[DraftKind, ...] = ("aded", "lookup", "lookahead", "model", "graph", "auto")
STEPS = 24


class Scripted:
    """Knows the answer, and hides a part of it among wrong guesses."""

    def __init__(self, answer: Sequence[int], seed: int = 0) -> None:
        self.answer, self.said, self.chance = answer, 0, random.Random(seed)

    def propose(self, context: Sequence[int]) -> TokenTree:
        rest = list(self.answer[self.said : self.said + self.chance.randrange(5)])
        right = self.chance.randrange(4)
        paths = [[self.chance.randrange(3, 128) for _ in range(3)] for _ in range(4)]
        paths.insert(right, [*rest, 3])
        if rest:
            paths.insert(self.chance.randrange(5), [*rest[:-1], 4, 5])
        return TokenTree.from_paths(paths)

    def observe(self, accepted: Sequence[int]) -> None:
        self.said += len(accepted)


def decode(
    model: PreTrainedModel,
    prompt: torch.Tensor,
    begin: Callable[[], Start | None],
    options: Generation,
) -> tuple[list[int], list[int], Tally]:
    """The tokens without and with drafts."""
    plain = [t for (t,) in next_tokens(model, [prompt], options, begin())]
    tally = Tally()
    speculation = Speculation(Scripted(plain), tally)
    steps = next_tokens(model, [prompt], options, begin(), speculation=speculation)
    return plain, [t for (t,) in steps], tally


@pytest.mark.parametrize(("name", "implementation"), families.CASES)
def test_greedy_answers_are_the_plain_ones_on_every_family(name: str, implementation: str) -> None:
    model = families.build(name, implementation)
    prompt = families.ids(18, seed=1)[0]  # the sliding window of 24 begins to slide on the way
    options = Generation(max_new_tokens=STEPS)
    plain, drafted, tally = decode(model, prompt, lambda: None, options)
    assert drafted == plain
    assert tally.tokens == STEPS - 1 == tally.forwards + tally.accepted
    assert 5 < tally.accepted < tally.drafted
    assert tally.note is None


@pytest.mark.parametrize(("name", "implementation"), families.CASES)
def test_logits_of_a_tree_are_those_of_its_paths(name: str, implementation: str) -> None:
    model = families.build(name, implementation)
    ids = families.ids(40, seed=2)
    start = from_scratch(model, [ids[0]])
    with torch.no_grad():
        model(input_ids=ids, past_key_values=start.cache, use_cache=True)
    reader = TreeReader(model, start.cache, start.mask)
    lines = [[], [0], [0, 1], [0], [0, 3], [0, 3, 4], [0, 1, 2]]  # ancestors of each node
    tokens = [11, 12, 13, 14, 15, 16, 17]
    parents = [line[-1] if line else -1 for line in lines]
    logits = torch.cat([reader.read(tokens[:4], parents[:4]), reader.read(tokens[4:], parents[4:])])
    kept = [0, 3, 4]
    reader.keep(kept)
    after = reader.read([18, 19], [-1, -1])
    text = ids[0].tolist()
    for node, line in enumerate(lines):
        whole = [*text, *(tokens[a] for a in line), tokens[node]]
        _close(model, whole, logits[node])
    for token, row in zip([18, 19], after, strict=True):
        _close(model, [*text, *(tokens[node] for node in kept), token], row)


@pytest.mark.parametrize("name", ["mistral", "gemma3"])
def test_a_path_may_be_longer_than_the_sliding_window(name: str) -> None:
    model, ids = families.build(name, "sdpa"), families.ids(30, seed=7)
    start = from_scratch(model, [ids[0]])
    with torch.no_grad():
        model(input_ids=ids, past_key_values=start.cache, use_cache=True)
    tokens = [9, *families.ids(35, seed=8)[0].tolist()]
    parents = [-1, -1, *range(1, 35)]  # a sibling, and a chain
    reader = TreeReader(model, start.cache, start.mask)
    logits = reader.read(tokens, parents)
    for node in (5, 24, 35):
        _close(model, [*ids[0].tolist(), *tokens[1 : node + 1]], logits[node])


def _close(model: PreTrainedModel, tokens: list[int], logits: torch.Tensor) -> None:
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([tokens])).logits[0, -1]
    torch.testing.assert_close(logits, expected, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize(
    "method",
    [
        SpecKV(capacity=24, window_size=8),
        SpecKV(capacity=24, window_size=8, head_budgets="adaptive"),
    ],
    ids=["even", "uneven"],
)
@pytest.mark.parametrize(
    ("name", "implementation"),
    [("llama", "sdpa"), ("llama", "eager"), ("gemma3", "sdpa"), ("gpt_oss", "eager")],
)
def test_greedy_answers_are_the_plain_ones_on_evicted_caches(
    name: str, implementation: str, method: SpecKV
) -> None:
    model = families.build(name, implementation)
    prompt, guess = families.ids(60, seed=3)[0], families.ids(5, seed=4)[0]

    def begin() -> Start:
        return evict(model, [prompt], [guess], method, [24]).start

    plain, drafted, tally = decode(model, prompt, begin, Generation(max_new_tokens=STEPS))
    assert drafted == plain
    assert tally.accepted > 5
    assert tally.note is None


@pytest.mark.parametrize("bits", [4, 8])
def test_greedy_answers_are_the_plain_ones_with_quantised_weights(bits: int) -> None:
    engine = Engine.load(
        "builtin:target", quantization=Quantization(bits=bits), device="cpu", progress=False
    )
    prompt = torch.tensor(engine.encode_text("Badge AK-731 was issued to Mira Tolen. " * 3))
    options = Generation(max_new_tokens=12)
    plain, drafted, tally = decode(engine.target, prompt, lambda: None, options)
    assert drafted == plain
    assert tally.accepted > 2


@pytest.mark.parametrize("border", [25, 30])
def test_trees_stay_on_one_side_of_a_longrope_border(border: int) -> None:
    """Phi's rotary frequencies change once more than `border` tokens are read."""
    torch.manual_seed(0)
    config = models.phi3.Phi3Config(
        **{k: v for k, v in families.COMMON.items() if k != "head_dim"},
        original_max_position_embeddings=border,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0] * 4,
            "long_factor": [5.0] * 4,
            "original_max_position_embeddings": border,
        },
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0.0, 1.6 / parameter.shape[-1] ** 0.5)
    model.generation_config.eos_token_id = None
    prompt = families.ids(18, seed=5)[0]
    plain, drafted, tally = decode(model, prompt, lambda: None, Generation(max_new_tokens=STEPS))
    assert drafted == plain
    assert tally.accepted > 3


# -- sampling -----------------------------------------------------------------------------------


def test_sampled_answers_are_the_plain_ones_of_the_same_seed() -> None:
    model, prompt = families.build("llama", "sdpa"), families.ids(18, seed=6)[0]
    different = set()
    for seed in range(6):
        options = Generation(
            max_new_tokens=16, temperature=1.5, top_p=0.9, repetition_penalty=1.3, seed=seed
        )
        plain, drafted, tally = decode(model, prompt, lambda: None, options)
        assert drafted == plain
        assert tally.accepted > 2
        different.add(tuple(plain))
    assert len(different) > 3


class Table:
    """A model whose next token depends on the last one only: (vocabulary, vocabulary) logits."""

    def __init__(self, logits: torch.Tensor) -> None:
        self.logits = logits

    def room(self) -> int:
        return 100

    def read(self, tokens: Sequence[int], parents: Sequence[int]) -> torch.Tensor:
        return self.logits[list(tokens)]

    def keep(self, path: Sequence[int]) -> None:
        pass


class Always:
    """Proposes the same tree."""

    def __init__(self, tree: TokenTree) -> None:
        self.tree = tree

    def propose(self, context: Sequence[int]) -> TokenTree:
        return self.tree

    def observe(self, accepted: Sequence[int]) -> None:
        pass


@pytest.mark.parametrize(
    ("options", "critical"),
    [
        (Generation(temperature=1.4, seed=1), 37.7),  # 15 degrees of freedom, 0.1 %
        (Generation(temperature=1.0, top_p=0.8, seed=2), None),
    ],
)
def test_verified_tokens_follow_the_plain_distribution(
    options: Generation, critical: float | None
) -> None:
    """20,000 pairs of tokens against the product of their probabilities: chi-square.

    What the sampler may draw from each row of logits is drawn in advance, which is fast.
    """
    draws, size = 20_000, 4
    table = torch.tensor([[2.0, 1.0, 0.5, 0.0], [0.0, 1.5, 1.0, 0.2], [1, 1, 1, 1], [0, 2, 0, 1.0]])
    processors = Sampler(torch.tensor([0]), options).processors
    ids = torch.zeros(size, 1, dtype=torch.int64)
    chances = processors(ids, table).softmax(-1)  # type: ignore[arg-type]
    rows = torch.stack([_distribution(row, options) for row in table])  # (last, next)
    torch.testing.assert_close(chances, rows)
    generator = torch.Generator().manual_seed(options.seed or 0)
    drawn = torch.multinomial(chances, 2 * draws, True, generator=generator).tolist()
    supply = [iter(row) for row in drawn]
    tree = TokenTree.from_paths([(0, 1), (1, 1), (0, 2), (2,)])
    counts = torch.zeros(size, size)
    reader, speculation = Table(torch.arange(size).unsqueeze(1)), Speculation(Always(tree), Tally())
    for _ in range(draws):
        pair = verified_tokens(
            reader,  # type: ignore[arg-type]
            lambda row: next(supply[int(row)]),
            speculation,
            [0],
            0,
            2,
        )
        first, second = pair
        counts[first, second] += 1
    expected = (rows[0].unsqueeze(1) * rows).flatten() * draws
    seen = counts.flatten()
    assert bool((seen[expected == 0] == 0).all())
    possible = expected > 0
    limit = critical or {5: 20.6, 6: 22.5, 7: 24.4, 8: 26.2, 9: 27.9}[int(possible.sum()) - 1]
    assert _chi_square(seen[possible], expected[possible]) < limit
    assert speculation.tally.accepted > draws / 2


def test_the_chi_square_would_notice_a_draw_for_every_row() -> None:
    """The published rule: each row draws anew, a row whose draw is its own token is accepted."""
    chance = torch.Generator().manual_seed(0)
    wanted, draws = torch.tensor([0.5, 0.3, 0.2]), 20_000
    rows = torch.multinomial(wanted, 3 * draws, True, generator=chance).view(3, draws)
    emitted = torch.where(rows[0] == 0, 0, torch.where(rows[1] == 1, 1, rows[2]))
    assert _chi_square(torch.bincount(emitted, minlength=3).float(), wanted * draws) > 1000


def _distribution(logits: torch.Tensor, options: Generation) -> torch.Tensor:
    """Temperature, then the smallest set of likeliest tokens that holds top_p."""
    chances = (logits / options.temperature).softmax(-1)
    ordered, order = chances.sort(descending=True)
    kept = ordered.cumsum(-1) - ordered < options.top_p
    chances = torch.zeros_like(chances).scatter(0, order[kept], ordered[kept])
    return chances / chances.sum()


def _chi_square(seen: torch.Tensor, expected: torch.Tensor) -> float:
    return float(((seen - expected) ** 2 / expected).sum())


# -- through the engine -------------------------------------------------------------------------

GREEDY = Generation(max_new_tokens=20)
PENALISED = Generation(max_new_tokens=20, temperature=1.2, top_k=40, repetition_penalty=1.3, seed=5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", [None, SpecPC(ratio=0.5), SpecKV(ratio=0.5)])
def test_answers_are_the_plain_ones(kind: DraftKind, method: SpecPC | SpecKV | None) -> None:
    engine = tiny_engine()
    for options in (GREEDY, PENALISED):
        plain = engine.answer(QUESTION, TEXTS, method=method, generation=options)
        drafted = engine.answer(
            QUESTION, TEXTS, method=method, generation=options.model_copy(update={"drafting": kind})
        )
        assert drafted.text == plain.text
        assert drafted.usage == plain.usage
        assert drafted.finish_reason == plain.finish_reason
        assert plain.drafting is None
        assert drafted.drafting is not None
        assert drafted.drafting.note is None
        assert drafted.drafting.tokens == drafted.drafting.forwards + drafted.drafting.accepted
        assert drafted.drafting.tokens_per_forward >= 1.0


def test_stop_strings_end_tokens_and_streams_work_with_drafts() -> None:
    engine = Engine(tiny_model(64, seed=2), tiny_tokenizer(), draft_model=tiny_model(64, seed=2))
    options = GREEDY.model_copy(update={"drafting": "model"})  # the draft is the target
    plain = engine.answer(QUESTION, TEXTS, generation=GREEDY)
    drafted = engine.answer(QUESTION, TEXTS, generation=options)
    assert drafted.drafting is not None
    assert drafted.drafting.tokens_per_forward > 2
    *pieces, last = engine.stream(QUESTION, TEXTS, generation=options)
    assert "".join(piece.text for piece in pieces) == plain.text
    assert len(pieces) > 8
    assert last.answer is not None
    assert last.answer.drafting is not None
    stop = plain.text[7:10]
    cut = engine.answer(QUESTION, TEXTS, generation=options.model_copy(update={"stop": (stop,)}))
    assert (cut.text, cut.finish_reason) == (plain.text[: plain.text.index(stop)], "stop_string")
    ids = engine.encode_text(plain.text)
    engine.target.generation_config.eos_token_id = ids[5]
    fresh = Engine(engine.target, tiny_tokenizer(), draft_model=engine.draft)
    ended = [fresh.answer(QUESTION, TEXTS, generation=o) for o in (GREEDY, options)]
    assert ended[0].text == ended[1].text
    assert ended[0].usage == ended[1].usage
    one = fresh.answer(QUESTION, TEXTS, generation=options.model_copy(update={"max_new_tokens": 1}))
    assert one.usage.completion_tokens == 1


def test_sessions_draft_too() -> None:
    engine = tiny_engine()
    session = engine.session(TEXTS)
    for method in (None, SpecKV(ratio=0.5)):
        plain = session.answer(QUESTION, method=method, generation=GREEDY)
        options = GREEDY.model_copy(update={"drafting": "auto"})
        assert session.answer(QUESTION, method=method, generation=options).text == plain.text


def test_batches_are_answered_without_drafts_and_say_so() -> None:
    engine = tiny_engine()
    prompts = [Prompt.from_question(QUESTION, TEXTS[:n]) for n in (1, 2)]
    options = GREEDY.model_copy(update={"drafting": "lookup"})
    plain = engine.generate_many(prompts, generation=GREEDY)
    drafted = engine.generate_many(prompts, generation=options)
    assert [a.text for a in drafted] == [a.text for a in plain]
    for answer in drafted:
        assert answer.drafting is not None
        assert answer.drafting.note == "decoded in a batch of 2 prompts"


def test_what_cannot_be_verified_is_decoded_plainly_and_says_so() -> None:
    class StrangeLayer(DynamicLayer):
        pass

    model, prompt = families.build("llama", "sdpa"), families.ids(10)[0]

    def begin() -> Start:
        start = from_scratch(model, [prompt])
        start.cache.layers = [StrangeLayer() for _ in start.cache.layers]  # type: ignore[no-untyped-call]
        return start

    plain, drafted, tally = decode(model, prompt, begin, Generation(max_new_tokens=6))
    assert drafted == plain
    assert tally.note == "cache layers without support for trees: StrangeLayer"
    assert tally.forwards == 0
    flex = families.build("llama", "flex_attention")
    assert "flex_attention" in str(obstacle(flex, DynamicCache(config=flex.config)))
    assert obstacle(model, DynamicCache(config=model.config)) is None


def test_missing_drafts_are_named_before_anything_is_read() -> None:
    alone = Engine(tiny_model(64, seed=2), tiny_tokenizer())
    for kind in ("model", "graph", "lookahead"):
        with pytest.raises(ModelError, match="no draft model"):
            alone.answer(QUESTION, TEXTS, generation=Generation(drafting=kind))
    options = GREEDY.model_copy(update={"drafting": "auto"})
    assert alone.answer(QUESTION, TEXTS, generation=options).drafting is not None


def test_a_closed_stream_frees_its_cache_and_its_drafter() -> None:
    def alive() -> int:
        gc.collect()
        return sum(issubclass(type(o), DynamicCache | TreeReader) for o in gc.get_objects())

    engine, before = tiny_engine(), alive()
    options = Generation(max_new_tokens=200, drafting="model")
    stream = engine.stream(QUESTION, TEXTS, generation=options)
    for _ in range(5):
        next(stream)
    assert alive() > before
    stream.close()  # type: ignore[attr-defined]
    assert alive() == before


def test_no_room_means_no_tree() -> None:
    reader = Table(torch.eye(3))
    reader.room = lambda: 1  # type: ignore[method-assign]
    tally = Tally()
    speculation = Speculation(Always(TokenTree.chain([0, 0, 0])), tally)
    tokens = list(verified_tokens(reader, lambda row: int(row.argmax()), speculation, [0], 0, 4))  # type: ignore[arg-type]
    assert tokens == [0, 0, 0, 0]
    assert tally.drafted == 0
    assert TokenTree.chain([1]).cut(depth=0) == EMPTY

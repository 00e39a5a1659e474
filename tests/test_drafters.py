"""Drafters: trees, copies, the tri-gram store and its searches, draft models, when to stop."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from draftsieve import Engine, Generation
from draftsieve.core.errors import ModelError
from draftsieve.core.generation.speculative.drafters.aded import AdedDrafter
from draftsieve.core.generation.speculative.drafters.auto import SIZES, AutoDrafter, Pace
from draftsieve.core.generation.speculative.drafters.graph import GraphDrafter
from draftsieve.core.generation.speculative.drafters.lookahead import LookaheadDrafter
from draftsieve.core.generation.speculative.drafters.lookup import LookupDrafter
from draftsieve.core.generation.speculative.drafters.model import ModelDrafter
from draftsieve.core.generation.speculative.drafters.search import (
    _expand,
    _Node,
    _rollout,
    best_first,
    puct,
)
from draftsieve.core.generation.speculative.drafters.store import (
    WAYS,
    TrigramStore,
    build_store,
    vocabulary_fingerprint,
)
from draftsieve.core.generation.speculative.drafters.tree import (
    EMPTY,
    Drafter,
    TokenTree,
    UnionDrafter,
)
from draftsieve.core.generation.speculative.verify import Tally
from draftsieve.integrations.cli import main

from . import families
from .adapters_fixtures import QUESTION, TEXTS, tiny_engine, tiny_model, tiny_tokenizer


def check_tree(tree: TokenTree, nodes: int = 64) -> None:
    """Parents stand in front, depths fit, siblings differ."""
    assert len(tree) == len(tree.parents) == len(tree.depths) <= nodes
    for node, (parent, depth) in enumerate(zip(tree.parents, tree.depths, strict=True)):
        assert -1 <= parent < node
        assert depth == 1 + (tree.depths[parent] if parent >= 0 else 0)
    assert len(set(zip(tree.parents, tree.tokens, strict=True))) == len(tree)


def paths(tree: TokenTree) -> list[tuple[int, ...]]:
    """The tokens from the root to each node."""
    found: list[tuple[int, ...]] = []
    for token, parent in zip(tree.tokens, tree.parents, strict=True):
        found.append((*(found[parent] if parent >= 0 else ()), token))
    return found


# -- trees --------------------------------------------------------------------------------------


def test_paths_that_begin_alike_are_merged_and_any_beginning_is_a_tree() -> None:
    tree = TokenTree.from_paths([(1, 2, 3), (1, 2, 4), (5,), (1, 2, 3)])
    assert tree == TokenTree((1, 2, 3, 4, 5), (-1, 0, 1, 1, -1), (1, 2, 3, 3, 1))
    for nodes in range(6):
        check_tree(tree.cut(nodes=nodes), nodes)
    assert paths(tree.cut(depth=1)) == [(1,), (5,)]
    assert paths(tree.cut(nodes=4, depth=2)) == [(1,), (1, 2)]
    assert tree.cut(depth=0) == tree.cut(nodes=0) == tree.cut(depth=-1) == EMPTY
    assert tree.follow([1, 2, 4, 9]) == [0, 1, 3]
    assert len(TokenTree.from_paths([(1, 2), (3, 4)], nodes=3)) == 3
    assert TokenTree.chain([7, 8]) == TokenTree.from_paths([(7, 8)])


def test_a_union_takes_turns_under_one_budget() -> None:
    class Fixed:
        def __init__(self, tree: TokenTree) -> None:
            self.tree, self.seen = tree, list[int]()

        def propose(self, context: Sequence[int]) -> TokenTree:
            return self.tree

        def observe(self, accepted: Sequence[int]) -> None:
            self.seen += accepted

    members = [
        Fixed(TokenTree.chain([1, 2, 3, 4])),
        Fixed(EMPTY),
        Fixed(TokenTree.from_paths([(1, 9), (6, 7, 8)])),
    ]
    union = UnionDrafter(members, nodes=6)
    tree = union.propose([0])
    check_tree(tree, 6)
    assert paths(tree)[:4] == [(1,), (1, 2), (1, 9), (1, 2, 3)]
    assert len(tree) == 6
    union.observe([4, 5])
    assert all(member.seen == [4, 5] for member in members)


# -- copying ------------------------------------------------------------------------------------


def test_lookup_copies_from_the_original_prompt_and_from_the_answer() -> None:
    original = [1, 2, 3, 10, 11, 12, 4, 2, 3, 20, 21, 5]
    drafter = LookupDrafter(original, length=3)
    compressed = [1, 5]
    drafter.observe([2, 3])
    tree = drafter.propose([*compressed, 2, 3])
    check_tree(tree)
    assert paths(tree)[:3] == [(20,), (20, 21), (20, 21, 5)]  # the newest place first
    assert (10, 11, 12) in paths(tree)
    drafter.observe([99, 98, 97, 99])
    assert paths(drafter.propose([*compressed, 2, 3, 99, 98, 97, 99]))[0] == (98,)
    assert drafter.propose([5]) != EMPTY  # it ends the prompt and stands before the answer
    assert LookupDrafter(original).propose([77]) == EMPTY
    assert LookupDrafter([]).propose([1]) == EMPTY


def test_lookup_prefers_the_longest_match_and_trusts_it_for_longer() -> None:
    text = [7, 8, 9, *range(30, 50), 1, 9, 60, 61, 62, 63, 64, 2]
    tree = LookupDrafter(text).propose([7, 8, 9])
    assert paths(tree)[-1] == tuple(range(30, 46))  # 4 * 3 + 4
    assert paths(LookupDrafter(text).propose([5, 9]))[0] == (60,)
    assert max(LookupDrafter(text).propose([5, 9]).depths) == 8


@pytest.mark.parametrize("seed", range(3))
def test_lookup_finds_what_a_slow_search_finds(seed: int) -> None:
    chance = random.Random(seed)
    prompt = [chance.randrange(4) for _ in range(60)]
    drafter, context = LookupDrafter(prompt, places=1), list(prompt)
    found = {True: 0, False: 0}
    for step in range(100):  # longer than the room made at first
        token = chance.randrange(4) if step % 9 else 100 + step  # nobody said that before
        drafter.observe([token])
        context.append(token)
        best = max(
            range(len(context) - 1),
            key=lambda end: (_matching(context[: end + 1], context), end),
        )
        tree = drafter.propose(context)
        known = _matching(context[: best + 1], context) > 0
        found[known] += 1
        if known:
            assert paths(tree)[-1] == tuple(context[best + 1 :][: len(tree)])
        else:
            assert tree == EMPTY
    assert found == {True: 88, False: 12}


def _matching(left: list[int], right: list[int]) -> int:
    """How many last tokens agree, at most 8."""
    for size in range(8, 0, -1):
        if len(left) >= size and left[-size:] == right[-size:]:
            return size
    return 0


def test_a_lookahead_is_followed_left_and_taken_up_again() -> None:
    guess = [11, 12, 13, 14, 15, 11, 17]
    drafter = LookaheadDrafter(guess, length=3)
    context = [1, 2, 3, 11]
    drafter.observe([11])
    assert drafter.propose(context).tokens == (12, 13, 14)
    drafter.observe([12, 13, 99])
    assert drafter.propose([*context, 12, 13, 99]) == EMPTY
    drafter.observe([14])
    assert drafter.propose([*context, 12, 13, 99, 14]).tokens == (15, 11, 17)
    drafter.observe([15, 11])  # "11" stands twice: what came before it decides
    assert drafter.propose([*context, 12, 13, 99, 14, 15, 11]).tokens == (17,)


# -- the store ----------------------------------------------------------------------------------


def test_weights_are_shares_and_updates_add_to_them() -> None:
    store = build_store([[1, 2, 3, 1, 2, 3, 1, 2, 4], [1, 2]])
    assert store.successors(1, 2) == ((3, pytest.approx(2 / 3)), (4, pytest.approx(1 / 3)))
    assert store.successors(9, 9) == ()
    for _ in range(3):
        store.reinforce([1, 2, 4, 8])
    assert dict(store.successors(1, 2))[4] == pytest.approx(1 / 3 + 3 * 0.04)
    assert store.successors(2, 4) == ((8, pytest.approx(0.12)),)
    for _ in range(200):
        store.reinforce([1, 2, 4])
    assert store.successors(1, 2)[0] == (4, pytest.approx(3.0))  # the cap


def test_learning_counts_like_a_slow_count() -> None:
    chance = random.Random(0)
    texts = [[chance.randrange(6) for _ in range(50)] for _ in range(4)]
    store = build_store(texts, pairs=1024)
    counts = Counter(
        ((a, b), c) for text in texts for a, b, c in zip(text, text[1:], text[2:], strict=False)
    )
    totals = Counter(pair for (pair, _), times in counts.items() for _ in range(times))
    for (pair, third), times in counts.items():
        assert dict(store.successors(*pair))[third] == pytest.approx(times / totals[pair])
    assert len(store) == len(totals)


def test_a_full_store_forgets_the_pair_touched_longest_ago_and_keeps_its_size() -> None:
    store = TrigramStore(pairs=WAYS)  # one set
    size = store.bytes
    for first in range(WAYS):
        store.learn([first, 100, 7])
    store.reinforce([0, 100, 7])  # the oldest is touched again
    store.learn([50, 100, 7])
    assert len(store) == WAYS
    assert store.successors(1, 100) == ()
    assert store.successors(0, 100)
    assert store.successors(50, 100) == ((7, 1.0),)
    chance = random.Random(1)
    store.learn([chance.randrange(1000) for _ in range(2000)])
    assert len(store) == WAYS
    assert store.bytes == size


def test_updates_find_trigrams_that_were_forgotten_and_came_back() -> None:
    """A small store that is overwritten again and again, against a count of every update."""
    store, chance = TrigramStore(pairs=WAYS), random.Random(2)  # one set
    for step in range(3000):
        window = [chance.randrange(4) for _ in range(6)]
        before = {
            gram: dict(store.successors(*gram[:2])).get(gram[2], 0.0)
            for gram in zip(window, window[1:], window[2:], strict=False)
        }
        store.reinforce(window)
        newest = (window[-3], window[-2], window[-1])
        after = dict(store.successors(*newest[:2]))[newest[2]]
        assert after >= min(3.0, before[newest]) or after == pytest.approx(0.04), step
        assert len(store) <= WAYS


def test_a_full_pair_forgets_its_lightest_successor() -> None:
    store = TrigramStore(pairs=64)
    store.learn([token for third in range(12) for token in (1, 2, third + 10)] * 2)
    store.learn([1, 2, 10])
    store.reinforce([1, 2, 99])
    found = dict(store.successors(1, 2))
    assert len(found) == 12
    assert 99 in found
    assert 10 in found


def test_a_store_is_saved_as_plain_numbers(tmp_path: Path) -> None:
    store = build_store([list(range(50)) * 3], pairs=256, vocabulary="abc")
    store.reinforce([3, 4, 5, 6])
    file = tmp_path / "deep" / "store.safetensors"
    store.save(file)
    again = TrigramStore.load(file)
    assert (again.sets, again.vocabulary, len(again)) == (store.sets, "abc", len(store))
    for first, second in pairwise(range(50)):
        assert again.successors(first, second) == store.successors(first, second)
    again.learn([900, 901, 902])
    assert len(again) == len(store) + 1
    with safe_open(str(file), framework="numpy") as opened:
        assert "keys" in opened.keys()  # noqa: SIM118
        assert json.loads(opened.metadata()["about"])["vocabulary"] == "abc"
    with pytest.raises(ModelError, match="cannot be read"):
        TrigramStore.load(tmp_path / "missing.safetensors")
    torch.save({"keys": 1}, tmp_path / "pickle.safetensors")
    with pytest.raises(ModelError, match="cannot be read"):
        TrigramStore.load(tmp_path / "pickle.safetensors")


def test_threads_share_a_store() -> None:
    store = TrigramStore(pairs=4096)

    def work(seed: int) -> None:
        for _ in range(50):
            store.reinforce([seed, 1000, 2000, seed])
            assert store.successors(seed, 1000)[0][0] == 2000

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(work, range(6)))
    for seed in range(6):
        assert store.successors(seed, 1000) == ((2000, pytest.approx(2.0)),)
    assert len(dict(store.successors(1000, 2000))) == 6


def test_engines_share_a_store_only_when_told_and_with_one_tokenizer() -> None:
    tokenizer = tiny_tokenizer()
    own = [Engine(tiny_model(64, seed=2), tokenizer) for _ in range(2)]
    options = Generation(max_new_tokens=20, drafting="aded")
    own[0].answer(QUESTION, TEXTS, generation=options)
    assert len(own[0].draft_store) > 10
    assert len(own[1].draft_store) == 0
    shared = TrigramStore(vocabulary=vocabulary_fingerprint(tokenizer.get_vocab()))
    both = [Engine(tiny_model(64, seed=2), tokenizer, draft_store=shared) for _ in range(2)]
    both[0].answer(QUESTION, TEXTS, generation=options)
    assert both[1].draft_store is shared
    again = both[1].answer(QUESTION, TEXTS, generation=options)
    assert again.drafting is not None
    assert again.drafting.accepted > 5  # the same answer a second time
    with pytest.raises(ModelError, match="another tokenizer"):
        Engine(tiny_model(64, seed=2), tokenizer, draft_store=TrigramStore(vocabulary="other"))


# -- searches -----------------------------------------------------------------------------------


def test_best_first_takes_the_likeliest_paths() -> None:
    chance = np.random.default_rng(0)
    table = {
        (a, b): tuple(
            (int(c), float(w))
            for c, w in zip(
                chance.permutation(4), sorted(chance.uniform(0.1, 3.0, 4))[::-1], strict=True
            )
        )
        for a in range(4)
        for b in range(4)
    }
    tree = best_first(lambda a, b: table[a, b], 0, 1, nodes=20, depth=3, floor=0.0)
    check_tree(tree, 20)
    worth: dict[tuple[int, ...], float] = {(): 1.0}
    for depth in range(3):  # all paths, slowly
        for path in [p for p in worth if len(p) == depth]:
            pair = (0, 1, *path)[-2:]
            total = sum(weight for _, weight in table[pair])
            worth |= {(*path, c): worth[path] * weight / total for c, weight in table[pair]}
    del worth[()]
    assert set(paths(tree)) == set(sorted(worth, key=lambda p: -worth[p])[:20])
    short = best_first(lambda a, b: table[a, b], 0, 1, depth=3, floor=0.1)
    assert set(paths(short)) == {path for path, share in worth.items() if share >= 0.1}
    assert best_first(lambda a, b: (), 0, 1) == EMPTY


def test_puct_values_the_trigram_that_is_passed() -> None:
    """Two equal first tokens; only the value of what follows can tell them apart."""
    table = {
        (0, 1): ((2, 0.5), (3, 0.5)),
        (1, 2): ((4, 0.01),),
        (1, 3): ((5, 3.0),),
        (2, 4): ((6, 0.01),),
        (3, 5): ((7, 3.0),),
        (5, 7): ((8, 1.0),),
    }
    tree = puct(lambda a, b: table.get((a, b), ()), 0, 1)
    check_tree(tree)
    assert paths(tree)[0] == (3,)
    assert (3, 5, 7, 8) in paths(tree)  # three searched, one added
    assert (2, 4, 6) in paths(tree)
    assert puct(lambda a, b: (), 0, 1) == EMPTY


def test_a_rollouts_value_is_the_weight_of_all_it_passes() -> None:
    table = {(0, 1): ((2, 0.5),), (1, 2): ((3, 0.25),), (2, 3): ((4, 2.0),), (3, 4): ((5, 9.0),)}

    def after(first: int, second: int) -> tuple[tuple[int, float], ...]:
        return table.get((first, second), ())

    root = _Node(0, 1, ())
    _expand(root, after)
    (child,) = root.children
    _expand(child, after)
    (grandchild,) = child.children
    assert (child.prior, child.reached, grandchild.reached) == (0.5, 0.5, 0.75)
    for node in (root, child, grandchild):  # three tri-grams behind the root, however begun
        assert _rollout(node, after, random.Random(0)) == 2.75


def test_puct_stays_within_its_limits() -> None:
    chance = random.Random(3)
    store = build_store([[chance.randrange(12) for _ in range(4000)]])
    tree = puct(store.successors, 1, 2)
    check_tree(tree, 64)
    assert len(tree) >= 24
    assert max(tree.depths) <= 4
    assert tree == puct(store.successors, 1, 2)  # the same seed
    check_tree(puct(store.successors, 1, 2, nodes=5), 5)


@pytest.mark.parametrize("search", ["puct", "best_first"])
def test_aded_learns_what_is_said(search: str) -> None:
    store = TrigramStore()
    drafter = AdedDrafter(store, [1, 2], search=search)  # type: ignore[arg-type]
    assert drafter.propose([1, 2]) == EMPTY
    drafter.observe([3])
    drafter.observe([4, 1, 2])
    assert paths(drafter.propose([1, 2, 3, 4, 1, 2]))[:2] == [(3,), (3, 4)]
    assert drafter.propose([1]) == EMPTY


# -- draft models -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gemma3"])
@pytest.mark.parametrize("kind", [ModelDrafter, GraphDrafter])
def test_a_draft_model_that_went_along_guesses_like_a_fresh_one(
    kind: type[ModelDrafter] | type[GraphDrafter], name: str
) -> None:
    model = families.build(name, "sdpa")
    ids = families.ids(30, seed=4)[0]
    drafter, context = kind(model, ids), [*ids.tolist(), 5]
    chance, kept = random.Random(0), 0
    for step in range(6):
        tree = drafter.propose(context)
        check_tree(tree)
        assert tree == kind(model, torch.tensor(context[:-1])).propose(context)
        follow = [node for node in range(len(tree)) if tree.depths[node] <= 1 + step % 3]
        accepted = list(paths(tree)[chance.choice(follow)]) if follow else []
        accepted.append(chance.randrange(3, 128))
        before = drafter.draft.reader.length
        drafter.observe(accepted)
        kept += drafter.draft.reader.length - before
        context += accepted
        assert drafter.draft.reader.length < len(context)
    if kind is ModelDrafter:  # guesses that came true are not read again
        assert kept > 2


def test_the_first_path_of_a_chain_is_the_drafts_greedy_answer() -> None:
    model = families.build("llama", "sdpa")
    ids = families.ids(20, seed=1)[0]
    chain = ModelDrafter(model, ids[:-1], width=1, floor=0.0, depth=5).propose(ids.tolist())
    context = ids.unsqueeze(0)
    for token in chain.tokens:
        with torch.no_grad():
            assert int(model(context).logits[0, -1].argmax()) == token
        context = torch.cat([context, torch.tensor([[token]])], dim=1)
    assert len(chain) == 5


def test_a_graph_holds_branches_and_reuses_meeting_paths() -> None:
    drafter = object.__new__(GraphDrafter)  # with a draft whose tokens follow from the last one
    chances = torch.zeros(10, 10)
    chances[0, [1, 2]] = torch.tensor([0.5, 0.45])
    chances[1, 3] = chances[2, 3] = 0.9
    chances[3, 4] = 0.8
    chances[4, 5] = 0.2  # unsure: kept, not expanded

    class Draft:
        passes = 0
        read_tokens = 0

        def catch_up(self, context: Sequence[int], room: int) -> torch.Tensor:
            return chances[context[-1]]

        def read(self, edges: Sequence[tuple[int, int]]) -> tuple[list[int], torch.Tensor]:
            self.passes += 1
            self.read_tokens += len(edges)
            return list(range(len(edges))), chances[[token for _, token in edges]]

    draft = Draft()
    drafter.draft, drafter.depth, drafter.recent, drafter.nodes = draft, 12, 0, 64  # type: ignore[assignment]
    tree = drafter.propose([0])
    check_tree(tree)
    assert (1, 3, 4, 5) in paths(tree)
    assert (2, 3, 4, 5) in paths(tree)  # the second path's rest was not drafted
    assert draft.read_tokens == 4  # 1, 2, 3 and 4


# -- when to draft ------------------------------------------------------------------------------


def _run_auto(
    right: Sequence[bool],
    cost: float,
    *,
    nodes: int = 16,
    jump: float = 0.0,
    drafting: float = 0.0,
    pace: Pace | None = None,
) -> list[int]:
    """Drive an `AutoDrafter` with simulated seconds; returns the nodes of each pass.

    Args:
        right: For each token of the answer, whether the guesses behind it are right.
        cost: Seconds of each node; a plain pass takes 1.
        nodes: Of the whole tree.
        jump: Seconds that any tree costs.
        drafting: Seconds that a guess takes.
        pace: Of the engine.
    """
    tally, sizes, said = Tally(), list[int](), [0]

    class Chain:
        def propose(self, context: Sequence[int]) -> TokenTree:
            tally.seconds += drafting
            ahead = range(said[0] + 1, said[0] + 1 + nodes)
            return TokenTree.chain(ahead if right[said[0]] else [-token for token in ahead])

        def observe(self, accepted: Sequence[int]) -> None:
            pass

    drafter: Drafter = AutoDrafter(Chain(), pace or Pace(), tally)
    drafter.observe([])
    while said[0] < len(right):
        tree = drafter.propose([])
        sizes.append(len(tree))
        tally.forwards += 1
        tally.last_nodes = len(tree)
        tally.last_seconds = 1.0 + cost * len(tree) + (jump if len(tree) else 0.0)
        path = tree.follow(range(said[0] + 1, len(right)))
        fresh = range(said[0] + 1, said[0] + 2 + len(path))
        said[0] += len(fresh)
        drafter.observe(fresh)
    return sizes


def _slowdown(sizes: Sequence[int], cost: float) -> float:
    """Seconds against plain decoding where all guesses are wrong, and passes mean tokens."""
    return 1.0 + sum(cost * size for size in sizes) / len(sizes)


@pytest.mark.parametrize("length", [50, 100, 300])
@pytest.mark.parametrize("cost", [0.005, 0.05, 0.2])
def test_auto_costs_little_where_guesses_are_wrong(length: int, cost: float) -> None:
    pace = Pace()
    first, second = (_run_auto([False] * length, cost, pace=pace) for _ in range(2))
    assert _slowdown(first, cost) <= 1.05
    assert _slowdown(second, cost) <= _slowdown(first, cost)
    guesses = _run_auto([False] * length, cost, pace=pace, drafting=0.2)
    assert _slowdown(guesses, cost) <= 1.05


def test_auto_watches_seldom_where_guesses_are_dear() -> None:
    calls: list[int] = []

    class Counting:
        def propose(self, context: Sequence[int]) -> TokenTree:
            calls.append(1)
            tally.seconds += 0.2
            return TokenTree.chain([-1] * 8)

        def observe(self, accepted: Sequence[int]) -> None:
            tally.seconds += 0.02  # more than watching may take: no reason never to guess again

    tally = Tally()
    drafter = AutoDrafter(Counting(), Pace(), tally)
    drafter.observe([1])
    for _ in range(800):
        nodes = len(drafter.propose([1]))
        tally.forwards, tally.last_nodes = tally.forwards + 1, nodes
        tally.last_seconds = 1.0 + 0.1 * nodes
        drafter.observe([1])
    assert 10 < len(calls) < 40


def test_auto_begins_where_guesses_come_true_and_ends_where_they_do_not() -> None:
    pace = Pace()
    for _ in range(3):  # the engine's requests so far: nothing to draft
        _run_auto([False] * 200, 0.05, pace=pace)
    mixed = _run_auto([False] * 100 + [True] * 200 + [False] * 200, 0.05, pace=pace)
    plain = [place for place, size in enumerate(mixed) if size == 0]
    assert plain[:100] == list(range(100))
    assert 8 < sum(size > 0 for size in mixed) < 40  # the 200 tokens in the middle
    assert not any(mixed[-150:])


def test_auto_drafts_as_much_as_pays() -> None:
    assert _run_auto([True] * 200, cost=0.01)[-2] == 16
    long = _run_auto([True] * 2000, cost=0.05, nodes=64, jump=6.0)
    assert long[-2] == 64  # although short copies do not pay
    chance = random.Random(0)
    right = [chance.random() < 0.25 for _ in range(1000)]
    dear, cheap = _run_auto(right, cost=0.6), _run_auto(right, cost=0.005)
    assert sum(dear) / len(dear) < 1 < 4 <= sum(cheap) / len(cheap)
    assert sum(1 + 0.6 * size for size in dear) < 1.1 * len(right)


def test_auto_tells_its_drafter_everything_before_it_guesses() -> None:
    told: list[int] = []

    class Listening:
        def propose(self, context: Sequence[int]) -> TokenTree:
            assert told == list(context)
            tally.seconds += 0.1
            return TokenTree.chain([-1] * 8)

        def observe(self, accepted: Sequence[int]) -> None:
            told.extend(accepted)

    tally, context = Tally(), [0]
    drafter = AutoDrafter(Listening(), Pace(), tally)
    drafter.observe([0])
    for token in range(1, 200):
        nodes = len(drafter.propose(context))
        tally.forwards, tally.last_nodes = tally.forwards + 1, nodes
        tally.last_seconds = 1.0 + 0.1 * nodes
        context.append(token)
        drafter.observe([token])
        assert len(context) - len(told) < 32


def test_a_first_slow_pass_does_not_count() -> None:
    pace = Pace()
    for size in SIZES[1:]:
        pace.record(size, 100.0)
    assert sum(_run_auto([True] * 100, 0.01, pace=pace)) > 0


def test_slow_passes_do_not_end_drafting_for_good() -> None:
    pace = Pace()
    for size in SIZES:
        for _ in range(10):
            pace.record(size, 100.0 if size else 1.0)
    sizes = [_run_auto([True] * 300, 0.01, pace=pace) for _ in range(20)]
    assert not any(sizes[0][:200])
    assert sum(sizes[-1]) / len(sizes[-1]) > 8


# -- command line -------------------------------------------------------------------------------


def test_the_command_line_builds_a_store(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "a.md").write_text("\n\n".join(TEXTS), encoding="utf-8")
    answers = tmp_path / "answers.jsonl"
    answers.write_text(json.dumps({"answer": "It leaves at seven."}) + "\n", encoding="utf-8")
    engine = tiny_engine()
    engine.target.config.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    out = tmp_path / "store.safetensors"
    line = ["drafts", "build", "--docs", str(tmp_path / "docs"), "--answers", str(answers)]
    line += ["--target", str(tmp_path / "model"), "--out", str(out)]
    assert main(line) == 0
    store = TrigramStore.load(out)
    ids = engine.encode_text("It leaves at seven.")
    assert store.successors(*ids[:2])
    assert store.vocabulary == vocabulary_fingerprint(tiny_tokenizer().get_vocab())
    assert str(len(store)) in capsys.readouterr().out
    assert main(["drafts", "build", "--target", str(tmp_path / "model"), "--out", str(out)]) == 1
    assert "--docs" in capsys.readouterr().err


def test_a_long_chunk_is_learnt_whole() -> None:
    store, tokens = TrigramStore(), list(range(100, 150))
    drafter = AdedDrafter(store, tokens[:5])
    drafter.observe(tokens[5:])
    for first, second, third in zip(tokens[3:], tokens[4:], tokens[5:], strict=False):
        assert drafter.propose([first, second]).tokens[:1] == (third,)

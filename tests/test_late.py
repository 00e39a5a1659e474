"""Late interaction finds what a naive comparison of keys and queries finds."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from langchain_core.documents import Document
from llama_index.core.schema import TextNode
from torch.nn import functional

from draftsieve import Compressor, Passage, PassageStore, Prompt, SpecPC
from draftsieve.core.errors import ConfigError, PromptError
from draftsieve.core.models.loading import fingerprint
from draftsieve.core.specpc.bm25 import bm25
from draftsieve.core.specpc.head_weights import HeadWeights
from draftsieve.core.specpc.stored import late_heads as late_heads_module
from draftsieve.core.specpc.stored import layout as layout_module
from draftsieve.core.specpc.stored import passage_store as store_module
from draftsieve.core.specpc.stored import reading as reading_module
from draftsieve.core.specpc.stored.late import BEHIND, late_scores, standard
from draftsieve.core.specpc.stored.late_heads import SHIPPED, LateHeads, late_heads
from draftsieve.retrievers import late as late_module
from draftsieve.retrievers.langchain import LateInteractionRetriever
from draftsieve.retrievers.late import LateIndex
from draftsieve.retrievers.llama_index import LateInteractionRetriever as NodeRetriever

from .adapters_fixtures import QUESTION, TEXTS, tiny_model, tiny_tokenizer

LONG = " ".join(TEXTS)
WIDTH = 8  # of the tiny model's heads
HEADS = LateHeads(
    alike=((0, 1), (2, 0)),
    looking=((1, 3, 0.5), (2, 1, 0.25)),
    passage_mean=torch.linspace(-0.5, 0.5, 2 * WIDTH).view(2, WIDTH),
    question_mean=torch.linspace(0.3, -0.3, 2 * WIDTH).view(2, WIDTH),
    weights="any",
)


def _store(codec: Any = "float16") -> PassageStore:
    draft = Compressor(tiny_model(32, seed=1, layers=4), tiny_tokenizer(), progress=False)
    return PassageStore.open(":memory:", draft, codec=codec, layers="all")


def _index(texts: list[str], store: PassageStore | None = None, **options: Any) -> LateIndex:
    options = {"heads": HEADS, "lexical_weight": 0.0, **options}
    return LateIndex.from_texts(texts, store or _store(), **options)


def _projected(store: PassageStore, ids: torch.Tensor, jump: int) -> dict[str, torch.Tensor]:
    """(layers, heads, tokens, width) keys and queries before rotation, behind the beginning."""
    model, found = store.draft.model, {"k": [], "q": []}  # type: ignore[var-annotated]
    hooks = [
        getattr(layer.self_attn, f"{kind}_proj").register_forward_hook(
            lambda _module, _inputs, out, kind=kind: found[kind].append(out[0])
        )
        for layer in model.get_decoder().layers
        for kind in found
    ]
    begin = len(store.frame.ids)
    positions = torch.cat([torch.arange(begin), torch.arange(len(ids)) + begin + jump])[None]
    with torch.no_grad():
        model(input_ids=torch.cat([store.frame.ids, ids])[None], position_ids=positions)
    for hook in hooks:
        hook.remove()
    return {
        kind: torch.stack([own[begin:].view(len(ids), -1, WIDTH) for own in layers]).transpose(1, 2)
        for kind, layers in found.items()
    }


def _naive(store: PassageStore, texts: list[str], question: str) -> list[float]:
    """Scores of texts with tokens, one dot product after the other."""
    tail = store.frame.tail(question)
    asked = _projected(store, tail.ids, BEHIND)
    passages = [_projected(store, store.frame.passage(text)[0], 0)["k"] for text in texts]
    words = [
        {store.draft.text([token]).strip().casefold() for token in store.frame.passage(text)[0]}
        for text in texts
    ]
    totals = []
    for unit, share in [("alike", 1.0), (0, 0.5), (1, 0.25)]:
        values = torch.zeros(len(texts))
        for place in tail.question.tolist():
            row = torch.zeros(len(texts))
            for number, keys in enumerate(passages):
                if unit == "alike":
                    pairs = [
                        functional.cosine_similarity(
                            asked["k"][layer, head, place] - HEADS.question_mean[at],
                            keys[layer, head] - HEADS.passage_mean[at],
                            dim=-1,
                        )
                        for at, (layer, head) in enumerate(HEADS.alike)
                    ]
                    row[number] = torch.stack(pairs).mean(0).max()
                else:
                    layer, head, _ = HEADS.looking[int(unit)]
                    row[number] = (keys[layer, head // 2] @ asked["q"][layer, head, place]).max()
            if unit == "alike":
                row = (row - row.mean()) / row.std(correction=0)
            word = store.draft.text([int(tail.ids[place])]).strip().casefold()
            held = sum(word in own for own in words)
            values += row * math.log(1 + (len(texts) - held + 0.5) / (held + 0.5))
        totals.append(share * (values - values.mean()) / values.std(correction=0))
    total = sum(totals)
    return ((total - total.mean()) / total.std(correction=0)).tolist()  # type: ignore[union-attr]


@pytest.mark.parametrize(("codec", "near"), [("float16", 0.01), ("int8", 0.1)])
def test_scores_are_those_of_a_naive_comparison(codec: str, near: float) -> None:
    texts = [*TEXTS, LONG, "Dogs travel free.", "At noon."]
    store = _store(codec)
    index = _index(texts, store)
    for question in (QUESTION, "Who sells tickets for dogs?"):
        found = index.scores(question)
        assert found.tolist() == pytest.approx(_naive(store, texts, question), abs=near)
        assert found.std(correction=0) == pytest.approx(1.0, abs=1e-4)


def test_pieces_of_a_long_passage_count_from_the_beginning_each() -> None:
    store = _store()
    store.piece = 16
    ids = store.frame.passage(LONG)[0]
    naive = torch.cat([_projected(store, part, 0)["k"] for part in torch.split(ids, 16)], 2)
    index = _index([LONG], store)
    tokens = index._groups[0].tokens[2 * WIDTH :, 0].T.float()  # keys of the heads that look
    wanted = torch.cat([naive[1, 1], naive[2, 0]], -1)
    assert torch.allclose(tokens, wanted, atol=0.01)


def test_passages_without_tokens_are_never_found() -> None:
    index = _index(["", TEXTS[0], " ", TEXTS[1], ""])
    assert (index.scores(QUESTION) == -torch.inf).tolist() == [True, False, False, False, True]
    assert len(index.search(QUESTION, 5)) == 3
    assert _index([""]).search(QUESTION) == []
    assert _index([]).search(QUESTION) == []


def test_only_the_best_by_bm25_are_compared() -> None:
    texts = [*TEXTS, "A ferry.", "Nothing."]
    best = max(range(len(texts)), key=lambda place: bm25(QUESTION, texts)[place])
    scores = _index(texts, first=1).scores(QUESTION)
    assert [place for place, score in enumerate(scores) if score > -torch.inf] == [best]
    few = _index(texts, first=2).scores(QUESTION)
    order = sorted(range(len(texts)), key=lambda place: -bm25(QUESTION, texts)[place])[:2]
    assert sorted(order) == [place for place, score in enumerate(few) if score > -torch.inf]


def test_words_count_beside_keys_by_their_share() -> None:
    alone, words = _index(TEXTS).scores(QUESTION), torch.tensor(bm25(QUESTION, TEXTS))
    for share in (0.25, 4.0):
        both = _index(TEXTS, lexical_weight=share).scores(QUESTION)
        assert torch.allclose(both, alone + share * standard(words.float()), atol=1e-5)


def test_what_is_stored_is_not_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    store = _store()
    first = _index(TEXTS, store).scores(QUESTION)

    def fail(*_: object) -> None:
        raise AssertionError("the draft reads again")

    monkeypatch.setattr("draftsieve.core.specpc.stored.indexing.read_blocks", fail)
    assert torch.equal(_index(TEXTS, store).scores(QUESTION), first)


def test_equal_opinions_count_nothing() -> None:
    matches = torch.rand(3, 4, 5)
    matches[0] = 0.25
    found = late_scores(HEADS, matches, torch.ones(4))
    looks = [standard(matches[at].sum(0)) for at in (1, 2)]
    assert torch.allclose(found, standard(0.5 * looks[0] + 0.25 * looks[1]), atol=1e-5)


def test_the_bundled_draft_finds_passages_by_its_first_keys() -> None:
    draft = Compressor.load("builtin:draft", device="cpu", progress=False)
    width = draft.model.config.head_dim
    heads = LateHeads(((0, 0),), (), torch.zeros(1, width), torch.zeros(1, width), "any")
    index = LateIndex.from_texts(
        TEXTS, PassageStore.open(":memory:", draft), heads=heads, lexical_weight=0.0
    )
    assert index.search("When does the museum of Holm open?", 1)[0][0].id == "3"
    assert index.search("What does a ticket for dogs cost?", 1)[0][0].id == "2"


def test_faults_are_told() -> None:
    store = _store()
    with pytest.raises(ConfigError, match="No heads are known"):
        LateIndex.from_texts(TEXTS, store)
    with pytest.raises(ConfigError, match=r"lexical_weight=-1\.0"):
        _index(TEXTS, store, lexical_weight=-1.0)
    with pytest.raises(ConfigError, match="first=0"):
        _index(TEXTS, store, first=0)
    with pytest.raises(PromptError, match="k is 0"):
        _index(TEXTS, store).search(QUESTION, 0)
    lacking = LateHeads(((9, 0),), (), torch.zeros(1, WIDTH), torch.zeros(1, WIDTH), "any")
    with pytest.raises(ConfigError, match=r"lacks keys .* \(9, 0\)"):
        _index(TEXTS, store, heads=lacking)


def test_the_shipped_heads_can_be_read() -> None:
    found = [LateHeads.load(path) for path in SHIPPED.glob("*.json")]
    assert found
    for heads in found:
        assert heads.passage_mean.shape == heads.question_mean.shape
        assert len(heads.passage_mean) == len(heads.alike)
    assert late_heads(tiny_model(32, seed=1)) is None


def test_documents_and_nodes_come_back_as_they_were() -> None:
    store, options = _store(), {"heads": HEADS, "first": 2}
    documents = [Document(text, id=str(n), metadata={"n": n}) for n, text in enumerate(TEXTS)]
    found = LateInteractionRetriever.from_documents(documents, store, k=1, **options).invoke(
        QUESTION
    )
    wanted = LateIndex([Passage(t, str(n)) for n, t in enumerate(TEXTS)], store, **options)
    best = int(wanted.search(QUESTION, 1)[0][0].id or "")
    assert found == [documents[best]]
    nodes = [TextNode(text=text, id_=str(n), metadata={"n": n}) for n, text in enumerate(TEXTS)]
    (node,) = NodeRetriever.from_nodes(nodes, store, similarity_top_k=1, **options).retrieve(
        QUESTION
    )
    assert (node.node.node_id, node.node.metadata) == (str(best), {"n": best})
    assert node.score == pytest.approx(wanted.search(QUESTION, 1)[0][1])


@pytest.mark.real
def test_a_real_draft_finds_passages_by_what_they_mean(smollm2: str) -> None:
    draft = Compressor.load(smollm2, dtype="float32", device="cpu", progress=False)
    store = PassageStore.open(":memory:", draft, tier="keys")
    index = LateIndex.from_texts(TEXTS, store, lexical_weight=0.0)
    assert index.search("At which hour does the boat depart?", 1)[0][0].id == "1"
    assert index.search("Do kids pay for the trip?", 1)[0][0].id == "2"
    assert index.search("When does the gallery open its doors?", 1)[0][0].id == "3"


@pytest.mark.parametrize("options", [{"first_layer": 0}, {"tier": "keys"}])
def test_compression_asks_it_which_passage_where_upper_layers_are_not_stored(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    draft = Compressor(tiny_model(32, seed=1, layers=4), tiny_tokenizer(), progress=False)
    monkeypatch.setitem(late_heads_module._KNOWN, draft.model, HEADS)
    heads = torch.zeros(4, 4)
    heads[2, 2] = 1.0
    weights = HeadWeights(heads, 0.0, fingerprint(draft.model), rows="mean")
    monkeypatch.setattr(layout_module, "_weights", lambda _: weights)
    monkeypatch.setattr(reading_module, "head_weights", lambda *_: weights)
    monkeypatch.setattr(store_module, "head_weights", lambda *_: weights)
    monkeypatch.setattr(layout_module, "head_weights", lambda *_: weights)
    monkeypatch.setattr(layout_module, "settled", lambda method, _: method)
    store = PassageStore.open(":memory:", draft, codec="float16", **options)
    assert not store.layout.reaches_top
    method = SpecPC(
        ratio=0.5,
        unit="sentence",
        passages_apart=True,
        likelihood_weight=0.5,
        head_weights="any.json",
    )
    texts = [*TEXTS, LONG]
    prompt = Prompt.from_question(QUESTION, texts)
    asked, note = store.settled(method)
    assert note is not None
    assert "late interaction" in note
    found = store.reading(prompt, draft.encoder.encode(prompt), asked)
    if options.get("tier"):  # one pass does for both, right behind the longest passage
        monkeypatch.setattr(late_module, "BEHIND", max(map(draft.count_tokens, texts)))
    expected = _index(texts, store).scores(QUESTION)
    assert found.likelihood is not None
    torch.testing.assert_close(found.likelihood, expected, rtol=0.01, atol=0.01)
    assert len(set(found.likelihood.tolist())) == len(texts)

"""Small real embedders: hashed words, and a random Bert in a folder of sentence-transformers."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from .adapters_fixtures import QUESTION, TEXTS

WIDTH = 64
CONTROL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
WORDS = sorted(set(re.findall(r"\w+|[^\w\s]", " ".join([QUESTION, *TEXTS, "[ ] SEP ask find :"]))))


def hashed(text: str) -> list[float]:
    """Counts of words by their hash; the first place is always one, so that none is zero."""
    row = [1.0] + [0.0] * (WIDTH - 1)
    for word in re.findall(r"\w+", text.lower()):
        row[1 + crc32(word.encode()) % (WIDTH - 1)] += 1.0
    return row


class Words:
    """A function from texts to vectors that tells what it was asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __call__(self, texts: Sequence[str]) -> list[list[float]]:
        self.asked += texts
        return [hashed(text) for text in texts]


class Pair:
    """An embedder that tells questions and documents apart; it has no hash."""

    __hash__ = None  # type: ignore[assignment]

    def __init__(self) -> None:
        self.documents: list[str] = []
        self.questions: list[str] = []

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Pair)

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        self.documents += texts
        return [hashed(text) for text in texts]

    def embed_query(self, text: str) -> list[float]:
        self.questions.append(text)
        return hashed(text)


def write_encoder(
    folder: Path,
    *,
    inner: str = "",
    pooling: Mapping[str, Any] | None = None,
    modules: Sequence[str] = ("Transformer", "Pooling", "Normalize"),
    prompts: Mapping[str, str] | None = None,
    length: int | None = None,
    lower: bool = False,
    cased: bool = True,
) -> Path:
    """A tiny random Bert over the words of the texts, as sentence-transformers writes one."""
    torch.manual_seed(5)
    backend = Tokenizer(
        models.WordLevel({w: i for i, w in enumerate([*CONTROL, *WORDS])}, unk_token="[UNK]")
    )
    if not cased:
        backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]"}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=64,
        **{f"{name}_token": token for name, token in names.items()},
    )
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
        initializer_range=0.5,
    )
    BertModel(config).save_pretrained(folder / inner)
    tokenizer.save_pretrained(folder / inner)
    paths = [inner, *(f"{place}_{kind}" for place, kind in enumerate(modules) if place)]
    rows = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(zip(paths, modules, strict=True))
    ]
    write(folder / "modules.json", rows)
    (folder / "1_Pooling").mkdir(exist_ok=True)
    said = {"pooling_mode_mean_tokens": True} if pooling is None else pooling
    write(folder / "1_Pooling" / "config.json", {"word_embedding_dimension": 16, **said})
    about = {"max_seq_length": length, "do_lower_case": lower}
    write(folder / inner / "sentence_bert_config.json", about)
    write(folder / "config_sentence_transformers.json", {"prompts": prompts or {}})
    return folder


def write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")

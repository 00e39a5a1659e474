"""Which texts a question is about, without a draft: scores for `baselines.ranked_sentences`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

import torch
from transformers import AutoModel, AutoTokenizer

from ..errors import MissingExtraError, ModelNotFoundError
from ..specpc.bm25 import words
from .squad import Scorer

BATCH = 64  # texts that an encoder reads together


def tfidf(question: str, texts: Sequence[str]) -> list[float]:
    """Cosine of TF-IDF vectors, fitted on the question and the texts themselves."""
    vectors = _tfidf(question, texts)
    return [float(value) for value in (vectors[1:] @ vectors[0].T).toarray().ravel()]


def lsa(question: str, texts: Sequence[str], topics: int = 50) -> list[float]:
    """Cosine after latent semantic analysis of the TF-IDF vectors (Deerwester et al., 1990)."""
    vectors = _tfidf(question, texts)
    size = min(topics, *(side - 1 for side in vectors.shape))
    if size < 2:
        return tfidf(question, texts)
    from sklearn.decomposition import TruncatedSVD
    from sklearn.preprocessing import normalize

    dense = normalize(TruncatedSVD(size, random_state=0).fit_transform(vectors))
    return [float(value) for value in dense[1:] @ dense[0]]


def embedding(name: str) -> Scorer:
    """Cosine of the vectors of `encoder`; arguments and errors as there."""
    vectors = encoder(name)

    def score(question: str, texts: Sequence[str]) -> list[float]:
        found: list[float] = (vectors(texts) @ vectors([question])[0]).tolist()
        return found

    return score


def encoder(name: str) -> Callable[[Sequence[str]], torch.Tensor]:
    """Mean-pooled hidden states of an encoder model, as (texts, hidden) rows of length one.

    Args:
        name: A folder or a hub id, for example of a sentence-transformers model.

    Raises:
        ModelNotFoundError: The model cannot be loaded.
    """
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(name)
        model: Any = AutoModel.from_pretrained(name, use_safetensors=True).eval()
    except (OSError, ValueError) as error:
        raise ModelNotFoundError(
            f"Cannot load the embedding model {name!r}: give a folder or a hub id that this "
            "machine can reach."
        ) from error

    def pooled(texts: list[str]) -> torch.Tensor:
        batch = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
        with torch.no_grad():
            states = model(**batch).last_hidden_state  # (texts, tokens, hidden)
        mask = batch["attention_mask"].unsqueeze(-1)
        mean = (states * mask).sum(1) / mask.sum(1)
        return torch.nn.functional.normalize(mean, dim=-1)

    def vectors(texts: Sequence[str]) -> torch.Tensor:
        whole = list(texts)
        return torch.cat([pooled(whole[i : i + BATCH]) for i in range(0, len(whole), BATCH)])

    return vectors


def require_eval(module: str, user: str) -> None:
    """Check that a package of the extra `[eval]` is installed.

    Raises:
        MissingExtraError: It is not; the message names the pip command.
    """
    if find_spec(module) is None:
        raise MissingExtraError(
            f'{user} needs {module}, which is not installed: pip install "draftsieve[eval]"'
        )


def _tfidf(question: str, texts: Sequence[str]) -> Any:
    """(1 + texts, words) sparse, rows of unit length; the question comes first."""
    require_eval("sklearn", "TF-IDF")
    from sklearn.feature_extraction.text import TfidfVectorizer

    return TfidfVectorizer(analyzer=words).fit_transform([question, *texts])

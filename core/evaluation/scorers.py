"""Which texts a question is about, without a draft: scores for `baselines.ranked_sentences`."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

from ..errors import MissingExtraError
from ..models.embedder import TextVectors
from ..models.shared import shared_encoder
from ..specpc.bm25 import words
from .squad import Scorer


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
    """Cosines of an encoder's vectors, made anew for every question so that its seconds count.

    Args:
        name: As for `load_encoder`, and its errors.
    """
    encoder = shared_encoder(name)

    def score(question: str, texts: Sequence[str]) -> list[float]:
        found: list[float] = TextVectors().cosines(encoder, question, texts).tolist()
        return found

    return score


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

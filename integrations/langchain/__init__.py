"""LangChain: compressor and indexer, chat model, LLM, middleware; each call is one core call."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ...retrievers.extras import require

require("langchain_core", "langchain", "draftsieve.integrations.langchain")

from .chat_model import ChatDraftSieve  # noqa: E402
from .compressor import DraftCompressor  # noqa: E402
from .indexer import DraftIndexer  # noqa: E402
from .llm import DraftSieveLLM  # noqa: E402

if TYPE_CHECKING:
    from .middleware import DraftCompressionMiddleware

__all__ = [
    "ChatDraftSieve",
    "DraftCompressionMiddleware",
    "DraftCompressor",
    "DraftIndexer",
    "DraftSieveLLM",
]


def __getattr__(name: str) -> Any:
    """Import the middleware when it is first used: it alone needs langchain, not only its core."""
    if name != "DraftCompressionMiddleware":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .middleware import DraftCompressionMiddleware

    return DraftCompressionMiddleware

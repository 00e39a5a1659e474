"""LangChain: a document compressor, a chat model and an LLM; each call is one core call."""

from ...retrievers.extras import require

require("langchain_core", "langchain", "draftsieve.integrations.langchain")

from .chat_model import ChatDraftSieve  # noqa: E402
from .compressor import DraftCompressor  # noqa: E402
from .llm import DraftSieveLLM  # noqa: E402

__all__ = ["ChatDraftSieve", "DraftCompressor", "DraftSieveLLM"]

"""LlamaIndex: LLM, node postprocessor, indexer and memory block; each call is one core call."""

from ...retrievers.extras import require

require("llama_index.core", "llama-index", "draftsieve.integrations.llama_index")

from .indexer import DraftIndexer  # noqa: E402
from .llm import DraftSieveLLM  # noqa: E402
from .memory import DraftSieveMemoryBlock  # noqa: E402
from .postprocessor import DraftSievePostprocessor  # noqa: E402

__all__ = ["DraftIndexer", "DraftSieveLLM", "DraftSieveMemoryBlock", "DraftSievePostprocessor"]

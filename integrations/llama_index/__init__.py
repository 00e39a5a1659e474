"""LlamaIndex: an LLM, a node postprocessor; each call is one core call."""

from ...retrievers.extras import require

require("llama_index.core", "llama-index", "draftsieve.integrations.llama_index")

from .llm import DraftSieveLLM  # noqa: E402
from .postprocessor import DraftSievePostprocessor  # noqa: E402

__all__ = ["DraftSieveLLM", "DraftSievePostprocessor"]

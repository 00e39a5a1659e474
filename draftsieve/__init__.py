"""draftsieve: a small draft model reads the prompt first; only what matters reaches the target."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from draftsieve.core.compressor import Compressor
    from draftsieve.core.config import Generation, Quantization, SpecKV, SpecKVPC, SpecPC
    from draftsieve.core.engine import Engine
    from draftsieve.core.errors import (
        BudgetError,
        ConfigError,
        DraftSieveError,
        GrammarError,
        MissingExtraError,
        ModelError,
        ModelNotFoundError,
        OutOfMemoryError,
        PromptError,
        RequestTimeoutError,
        StoreError,
    )
    from draftsieve.core.generation.speculative.drafters.store import TrigramStore
    from draftsieve.core.grammar import Grammar
    from draftsieve.core.prompt.messages import Prompt
    from draftsieve.core.session import Session
    from draftsieve.core.specpc.stored.passage_store import PassageStore
    from draftsieve.core.types import (
        Answer,
        Chunk,
        CompressedContext,
        Passage,
        Span,
        ToolCall,
        Trace,
    )

__version__ = "0.1.0"

_HOMES = {
    "Answer": "types",
    "BudgetError": "errors",
    "Chunk": "types",
    "CompressedContext": "types",
    "Compressor": "compressor",
    "ConfigError": "errors",
    "DraftSieveError": "errors",
    "Engine": "engine",
    "Generation": "config",
    "Grammar": "grammar",
    "GrammarError": "errors",
    "MissingExtraError": "errors",
    "ModelError": "errors",
    "ModelNotFoundError": "errors",
    "OutOfMemoryError": "errors",
    "Passage": "types",
    "PassageStore": "specpc.stored.passage_store",
    "Prompt": "prompt.messages",
    "PromptError": "errors",
    "Quantization": "config",
    "RequestTimeoutError": "errors",
    "Session": "session",
    "Span": "types",
    "SpecKV": "config",
    "SpecKVPC": "config",
    "SpecPC": "config",
    "StoreError": "errors",
    "ToolCall": "types",
    "Trace": "types",
    "TrigramStore": "generation.speculative.drafters.store",
}

__all__ = [
    "Answer",
    "BudgetError",
    "Chunk",
    "CompressedContext",
    "Compressor",
    "ConfigError",
    "DraftSieveError",
    "Engine",
    "Generation",
    "Grammar",
    "GrammarError",
    "MissingExtraError",
    "ModelError",
    "ModelNotFoundError",
    "OutOfMemoryError",
    "Passage",
    "PassageStore",
    "Prompt",
    "PromptError",
    "Quantization",
    "RequestTimeoutError",
    "Session",
    "Span",
    "SpecKV",
    "SpecKVPC",
    "SpecPC",
    "StoreError",
    "ToolCall",
    "Trace",
    "TrigramStore",
    "__version__",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that `import draftsieve` stays light."""
    if name not in _HOMES:
        raise AttributeError(f"module 'draftsieve' has no attribute {name!r}")
    value = getattr(import_module(f"draftsieve.core.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)

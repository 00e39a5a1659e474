"""The options of `DraftSieveLLM`, and how a call overrides them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from llama_index.core.llms.function_calling import FunctionCallingLLM
from pydantic import ConfigDict

from ...core.prompt.tool_calls import answer_grammar
from .._shared import options as shared
from .._shared.options import CallOptions


class EngineOptions(shared.EngineOptions, FunctionCallingLLM):
    __doc__ = shared.EngineOptions.__doc__

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid")
    apart: ClassVar[frozenset[str]] = frozenset({"tools", "response_format"})

    def options_of(self, options: Mapping[str, Any]) -> CallOptions:
        """Merge the object's options with those of one call.

        Args:
            options: The call's keyword arguments. A `response_format` becomes a grammar unless
                there is one.

        Returns:
            Validated options.

        Raises:
            ConfigError: An option is unknown or invalid.
            GrammarError: The response format cannot be used.
        """
        if options.get("grammar") is not None:
            return self.call_options(options)
        form = options.get("response_format")
        return self.call_options(options, answer_grammar(None, "auto", False, form))

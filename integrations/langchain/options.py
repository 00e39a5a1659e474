"""What the chat model and the LLM share: how LangChain's calls, caches and traces see options."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any, ClassVar

from langchain_core.language_models import BaseLanguageModel, LangSmithParams
from pydantic import ConfigDict

from ...core.config import Method
from ...core.types import Answer
from .._shared import options as shared
from .._shared.identity import identity
from .._shared.options import CallOptions
from .._shared.report import named, report
from .._shared.tools import grammar_of
from .tools import TOOL_OPTIONS

STRICT = ConfigDict(extra="forbid")  # of each class: LangChain's bases ignore unknown options


class EngineOptions(shared.EngineOptions, BaseLanguageModel[Any]):
    __doc__ = shared.EngineOptions.__doc__

    model_config = STRICT
    apart: ClassVar[frozenset[str]] = TOOL_OPTIONS | {"stream"}

    max_retries: int = 0
    """Taken so that models can be exchanged, and without effect: there is no network, and a
    request that fails here fails again."""

    def options_of(self, stop: list[str] | None, options: Mapping[str, Any]) -> CallOptions:
        """Merge the object's options with those of one call.

        Args:
            stop: The call's stop strings; None for the object's.
            options: The call's keyword arguments.

        Returns:
            Validated options.

        Raises:
            ConfigError: An option is unknown or invalid.
            GrammarError: Tools or a schema cannot be used.
        """
        return self.call_options({**options, "stop": stop}, grammar_of(options))

    @cached_property
    def _identity(self) -> dict[str, Any]:
        return identity(self.loaded)

    @property
    def _identifying_params(self) -> dict[str, Any]:
        """Everything that decides about an answer, as plain values; LangChain's caches use it."""
        own = shared.EngineOptions.model_fields.keys() - {"engine", "progress", "method"}
        plain = self.model_dump(include=own, mode="json")
        return {**plain, "method": named(self.method), "models": self._identity}

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        params = super()._get_ls_params(stop=stop or self.stop, **kwargs)
        params["ls_provider"] = "draftsieve"
        return params

    def get_token_ids(self, text: str) -> list[int]:
        """Encode a text with the target's tokenizer.

        Args:
            text: Any text; control tokens in it count as text.

        Returns:
            Token ids.
        """
        if self.custom_get_token_ids is not None:
            return self.custom_get_token_ids(text)
        return self.loaded.encode_text(text)

    def report(self, answer: Answer, method: Method | None) -> dict[str, Any]:
        """What a response's metadata says about an answer: the model's name, and `report`."""
        return {"model_name": self.loaded.model_name, **report(answer, method)}

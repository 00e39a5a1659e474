"""What the chat model and the LLM share: the options, loading, and how a call overrides them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from langchain_core.documents import Document
from langchain_core.language_models import BaseLanguageModel, LangSmithParams
from pydantic import ConfigDict, Field

from ...core.config import Generation, Method, OnError, Quantization
from ...core.engine import Engine
from ...core.errors import ModelError
from ...core.options import Options, told_as_config_errors
from ...core.speckv.scorers import needs_draft
from ...core.types import Answer, Passage
from .tools import TOOL_OPTIONS, grammar_of

STRICT = ConfigDict(extra="forbid")  # of each class: LangChain's bases ignore unknown options
_NAMES = {"max_tokens": "max_new_tokens"}  # LangChain's name -> ours
_DECODING = (
    "max_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "seed",
    "timeout",
)
# not about decoding, or turned into a grammar
_APART = frozenset({"method", "on_error", "documents", "stream", *TOOL_OPTIONS})
CALL_OPTIONS = frozenset(Generation.model_fields) | _NAMES.keys() | _APART


class CallOptions(Options):
    """The keyword arguments of one core call."""

    method: Method | None
    generation: Generation
    on_error: OnError


class EngineOptions(BaseLanguageModel[Any]):
    """Options of a target with an optional draft; both are loaded when the object is made.

    Args:
        model: "builtin:target", a folder or a hub id of the target.
        draft: "builtin:draft", a folder or a hub id; needed for SpecPC and for SpecKV's own scorer.
        engine: A loaded engine, instead of `model` and `draft`.
        method: How documents (SpecPC) or the cache of the whole prompt (SpecKV) are compressed;
            None leaves them whole.
        on_error: "original" answers from whole documents when their compression fails and logs a
            warning; "raise" raises.
        max_tokens: Most tokens of an answer.
        temperature: 0 for greedy decoding.
        top_p: Nucleus size for sampling.
        top_k: Sample among the k likeliest tokens; 0 for all.
        min_p: Drop tokens below this share of the likeliest one's probability.
        repetition_penalty: Above 1 against repetitions, which small models fall into.
        seed: Seed of the sampling; None draws a fresh one.
        stop: Strings that end an answer; a call's own `stop` replaces them.
        timeout: Seconds after which a request fails with `RequestTimeoutError`.
        max_retries: Taken so that models can be exchanged, and without effect: there is no
            network, and a request that fails here fails again.
        quantization: Weights of the target in 4 or 8 bits.
        draft_quantization: Weights of the draft in 4 or 8 bits.
        device: "auto", "cpu", "cuda", ...
        draft_device: The same for the draft; None for the target's.
        dtype: "auto", "float32", "bfloat16", ...
        template_options: Passed to the chat template.
        trust_remote_code: Run code that a hub repository carries.
        progress: Show progress bars while loading.

    Raises:
        ModelNotFoundError: There is no such model.
        ModelError: A method that needs a draft is given without one.
        ConfigError: An option is unknown or invalid.
    """

    model_config = STRICT

    model: str = "builtin:target"
    draft: str | None = None
    engine: Engine | None = Field(default=None, exclude=True, repr=False)
    method: Method | None = None
    on_error: OnError = "original"
    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: list[str] | None = None
    timeout: float | None = None
    max_retries: int = 0
    quantization: Quantization | None = None
    draft_quantization: Quantization | None = None
    device: str = "auto"
    draft_device: str | None = None
    dtype: str = "auto"
    template_options: Mapping[str, Any] | None = None
    trust_remote_code: bool = False
    progress: bool = True

    def __init__(self, **options: Any) -> None:
        with told_as_config_errors(type(self)):
            super().__init__(**options)
        self.generation(None, {})  # invalid options fail here, before anything is loaded
        loaded = self.engine
        drafted = self.draft is not None if loaded is None else loaded.compressor is not None
        if needs_draft(self.method) and not drafted:
            raise ModelError(
                f"{type(self.method).__name__} reads with a draft model and there is none: "
                'give draft="builtin:draft", a folder or a hub id, or an engine that has one.'
            )
        self.engine = loaded or self._load()
        self.model = self.engine.model_name

    def _load(self) -> Engine:
        return Engine.load(
            self.model,
            self.draft,
            quantization=self.quantization,
            draft_quantization=self.draft_quantization,
            device=self.device,
            draft_device=self.draft_device,
            dtype=self.dtype,
            template_options=self.template_options,
            trust_remote_code=self.trust_remote_code,
            progress=self.progress,
        )

    @property
    def loaded(self) -> Engine:
        """The engine; it is there from construction on."""
        assert self.engine is not None
        return self.engine

    def generation(self, stop: list[str] | None, options: Mapping[str, Any]) -> Generation:
        """Merge the object's decoding options with those of one call.

        Args:
            stop: The call's stop strings; None for the object's.
            options: The call's other options, LangChain's or the core's names.

        Returns:
            Validated options.

        Raises:
            ConfigError: An option is unknown or invalid.
        """
        own = {name: getattr(self, name) for name in _DECODING}
        merged = {_NAMES.get(name, name): value for name, value in {**own, **options}.items()}
        ends = self.stop if stop is None else stop
        return Generation(**{**merged, "stop": tuple(ends or ())})

    def call_options(self, stop: list[str] | None, options: Mapping[str, Any]) -> CallOptions:
        """Merge the object's options with those of one call.

        Args:
            stop: The call's stop strings; None for the object's.
            options: The call's keyword arguments; `method`, `on_error`, and what decides about a
                grammar (`TOOL_OPTIONS`) may be among them.

        Returns:
            Validated options.

        Raises:
            ConfigError: An option is unknown or invalid.
            GrammarError: Tools or a schema cannot be used.
        """
        decoding = {name: value for name, value in options.items() if name not in _APART}
        grammar = grammar_of(options)
        wanted = decoding if grammar is None else {**decoding, "grammar": grammar}
        return CallOptions(
            method=options.get("method", self.method),
            generation=self.generation(stop, wanted),
            on_error=options.get("on_error", self.on_error),
        )

    @property
    def _identifying_params(self) -> dict[str, Any]:
        """Everything that decides about an answer, as plain values."""
        own = set(EngineOptions.model_fields) - set(BaseLanguageModel.model_fields)
        plain = self.model_dump(include=own - {"engine", "progress", "method"}, mode="json")
        return {**plain, "method": _named(self.method)}

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
        """What a response's metadata says about an answer.

        Args:
            answer: The core's answer.
            method: The method that was asked for.

        Returns:
            "model_name", "finish_reason", "timings" (seconds per stage), "method" (None, or its
            name and options), "spans" (kept characters of the documents' original texts) and
            "fallback" (why documents were left whole although a method was given, else None).
        """
        return {
            "model_name": self.loaded.model_name,
            "finish_reason": answer.finish_reason,
            "timings": dict(answer.timings),
            "method": _named(method),
            "spans": [
                {
                    "passage": span.passage_id,
                    "index": span.passage_index,
                    "start": span.start,
                    "end": span.end,
                    "score": span.score,
                }
                for span in answer.spans
            ],
            "fallback": answer.fallback,
        }


def _named(method: Method | None) -> dict[str, Any] | None:
    if method is None:
        return None
    return {"name": type(method).__name__, **method.model_dump(mode="json")}


def as_passages(documents: Sequence[str | Document | Passage]) -> list[str | Passage]:
    """Turn a call's `documents` into passages; texts and passages stay as they are."""
    return [Passage(d.page_content, d.id) if isinstance(d, Document) else d for d in documents]

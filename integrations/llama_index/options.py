"""The options of `DraftSieveLLM`: loading, and how a call overrides them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llama_index.core.llms.function_calling import FunctionCallingLLM
from pydantic import ConfigDict, Field

from ...core.config import Generation, Method, OnError, Quantization
from ...core.engine import Engine
from ...core.errors import ModelError
from ...core.options import Options, told_as_config_errors
from ...core.prompt.tool_calls import answer_grammar
from ...core.speckv.scorers import needs_draft

_NAMES = {"max_tokens": "max_new_tokens"}  # LlamaIndex's name -> ours
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
_APART = frozenset({"method", "on_error", "documents", "tools", "response_format"})


class CallOptions(Options):
    """The keyword arguments of one core call."""

    method: Method | None
    generation: Generation
    on_error: OnError


class EngineOptions(FunctionCallingLLM):
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
        timeout: Seconds after which a request fails with `RequestTimeoutError`; None for no limit.
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

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid")

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
        self.call_options({})  # invalid options fail here, before anything is loaded
        if self.engine is not None:
            reader = self.engine.compressor
            self.draft = None if reader is None else reader.model.name_or_path
        if needs_draft(self.method) and self.draft is None:
            raise ModelError(
                f"{type(self.method).__name__} reads with a draft model and there is none: "
                'give draft="builtin:draft", a folder or a hub id, or an engine that has one.'
            )
        self.engine = self.engine or self._load()
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

    def call_options(self, options: Mapping[str, Any]) -> CallOptions:
        """Merge the object's options with those of one call.

        Args:
            options: The call's keyword arguments, under LlamaIndex's or the core's names;
                `documents` and `tools` are left to the caller. A `response_format` becomes a
                grammar unless there is one.

        Returns:
            Validated options.

        Raises:
            ConfigError: An option is unknown or invalid.
            GrammarError: The response format cannot be used.
        """
        given = {name: value for name, value in options.items() if name not in _APART}
        decoding = {**{name: getattr(self, name) for name in _DECODING}, **given}
        if decoding.get("grammar") is None:
            form = options.get("response_format")
            decoding["grammar"] = answer_grammar(None, "auto", False, form)
        stop = self.stop if decoding.get("stop") is None else decoding["stop"]
        named = {_NAMES.get(name, name): value for name, value in decoding.items()}
        return CallOptions(
            method=options.get("method", self.method),
            generation=Generation(**{**named, "stop": tuple(stop or ())}),
            on_error=options.get("on_error", self.on_error),
        )

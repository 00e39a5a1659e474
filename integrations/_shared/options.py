"""The options of a target in any framework: loading, checking, and how a call overrides them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field

from ...core.config import AnyEmbedder, Generation, Method, OnError, stages
from ...core.engine import Engine
from ...core.errors import ConfigError, ModelError
from ...core.grammar import Grammar
from ...core.models.loading import AnyQuantization, load_model
from ...core.models.shared import LoadOptions, shared_model
from ...core.options import Options, told_as_config_errors
from ...core.speckv.scorers import needs_draft
from ...core.specpc.stored.passage_store import PassageStore
from ...retrievers.embedders import as_embedder, settled, with_embedder

_NAMES = {"max_tokens": "max_new_tokens"}  # the frameworks' name -> ours
_DECODING = (
    "max_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "seed",
    "timeout",
    "stop",
)
CALL_OPTIONS = frozenset({*_DECODING, *Generation.model_fields, "method", "on_error", "documents"})


class CallOptions(Options):
    """The keyword arguments of one core call."""

    method: Method | None
    generation: Generation
    on_error: OnError


class EngineOptions(BaseModel):
    """Options of a target with an optional draft; both are loaded when the object is made.

    Drafts of the same options are loaded once in a process (`core.models.shared`).

    Args:
        model: "builtin:target", a folder or a hub id of the target.
        draft: "builtin:draft", a folder or a hub id; needed for SpecPC and for SpecKV's own scorer.
        engine: A loaded engine, instead of `model` and `draft`; its draft has its own store.
        store: Documents that the draft has read before: a `PassageStore`, or the folder of one,
            which is made where it is missing. For methods with a SpecPC.
        store_new: Whether documents that are not in the store are put there.
        method: How documents (SpecPC) or the cache of the whole prompt (SpecKV) are compressed;
            None leaves them whole, as in `Engine.answer`. A SpecPC `ratio` is a share of the
            documents' draft tokens together, a SpecKV one a share of the documents' entries.
        embedder: What a SpecPC's `semantic_weight` asks, also that of a call: a LangChain
            `Embeddings`, a LlamaIndex `BaseEmbedding`, a function from texts to vectors, or a
            model's folder or hub id.
        timeout: Seconds after which a request fails with `RequestTimeoutError`; None for no limit.
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
        gguf_file: Name of the target's GGUF file in its folder or hub repository.
        draft_gguf_file: The same for the draft.
        revision: Branch, tag or commit of the target's hub repository.
        draft_revision: Of the draft's.
        quantization: How the target's weights are quantised: a `Quantization` (4 or 8 bits) or
            one of transformers' configs.
        draft_quantization: The same for the draft's.
        device: "auto", "cpu", "cuda", ...
        draft_device: The same for the draft; None for the target's.
        dtype: "auto", "float32", "bfloat16", ...
        attn_implementation: Of the target: "eager", "sdpa", ...; None for the model's default.
        draft_attn_implementation: Of the draft.
        template_options: Passed to the chat template.
        trust_remote_code: Run code that a hub repository carries.
        progress: Show progress bars.

    Raises:
        ModelNotFoundError: There is no such model.
        ModelError: A method or store that needs a draft is given without one.
        ConfigError: An option is unknown or invalid, or the store cannot serve the method.
        StoreError: The store is another draft's, or none.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid")
    apart: ClassVar[frozenset[str]] = frozenset()
    """Options of a call that are not about decoding, or that become a grammar."""

    model: str = "builtin:target"
    draft: str | None = None
    engine: Engine | None = Field(default=None, exclude=True, repr=False)
    store: PassageStore | str | Path | None = None  # its place, once the object is made
    store_new: bool = False
    method: Method | None = None
    embedder: AnyEmbedder = Field(default=None, repr=False)
    timeout: float | None = None
    on_error: OnError = "original"
    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: list[str] | None = None
    gguf_file: str | None = None
    draft_gguf_file: str | None = None
    revision: str | None = None
    draft_revision: str | None = None
    quantization: AnyQuantization | None = None
    draft_quantization: AnyQuantization | None = None
    device: str = "auto"
    draft_device: str | None = None
    dtype: str = "auto"
    attn_implementation: str | None = None
    draft_attn_implementation: str | None = None
    template_options: Mapping[str, Any] | None = None
    trust_remote_code: bool = False
    progress: bool = False

    def __init__(self, **options: Any) -> None:
        with told_as_config_errors(type(self)):
            super().__init__(**options)
        self.embedder = as_embedder(self.embedder)
        self.call_options({})  # invalid options fail here, before anything is loaded
        self.method = settled(self.method, self.embedder)
        if self.engine is not None:
            if self.store is not None:
                raise ConfigError(
                    "store= is given beside an engine, whose draft has its own: give it to "
                    "Engine.load(..., store=...), or give model and draft in place of the engine."
                )
            reader = self.engine.compressor
            self.draft = None if reader is None else reader.model.name_or_path
        if (self.store or needs_draft(self.method)) and self.draft is None:
            who = "A store" if self.store else type(self.method).__name__
            raise ModelError(
                f"{who} reads with a draft model and there is none: "
                'give draft="builtin:draft", a folder or a hub id, or an engine that has one.'
            )
        self.engine = self.engine or self._load()
        self._check_store(self.engine)
        self.model = self.engine.model_name
        self._on_loaded()

    def _check_store(self, engine: Engine) -> None:
        """A method that the store cannot serve fails here, not in the first call."""
        reader = engine.compressor
        store = None if reader is None else reader.draft.store
        self.store = None if store is None else store.where
        if store is not None and (specpc := stages(self.method)[0]) is not None:
            store.settled(specpc)

    def _on_loaded(self) -> None:
        """For what a framework wants to know of the engine."""

    def _load(self) -> Engine:
        """The target, and a draft that adapters share; only the target may be large."""
        one: LoadOptions = {
            "dtype": self.dtype,
            "trust_remote_code": self.trust_remote_code,
            "progress": self.progress,
            "gguf_file": self.gguf_file,
            "revision": self.revision,
            "quantization": self.quantization,
            "device": self.device,
            "attn_implementation": self.attn_implementation,
        }
        other: LoadOptions = {
            **one,
            "gguf_file": self.draft_gguf_file,
            "revision": self.draft_revision,
            "quantization": self.draft_quantization,
            "device": self.draft_device or self.device,
            "attn_implementation": self.draft_attn_implementation,
        }
        big = load_model(self.model, **one)
        same = (self.draft, other) == (self.model, one)
        small = big if same else self.draft and shared_model(self.draft, **other)
        return Engine(
            big.model,
            big.tokenizer,
            draft_model=small.model if small else None,
            draft_tokenizer=small.tokenizer if small else None,
            template_options=self.template_options,
            name=big.name,
            progress=self.progress,
            store=self.store,
            store_new=self.store_new,
        )

    @property
    def loaded(self) -> Engine:
        """The engine; it is there from construction on."""
        assert self.engine is not None
        return self.engine

    def call_options(
        self, options: Mapping[str, Any], grammar: Grammar | None = None
    ) -> CallOptions:
        """Merge the object's options with those of one call.

        Args:
            options: The call's keyword arguments, under the framework's or the core's names.
            grammar: What the call's tools or response format allow; None for what `options` say.

        Returns:
            Validated options.

        Raises:
            ConfigError: An option is unknown or invalid.
        """
        aside = self.apart | {"method", "on_error", "documents"}
        given = {name: value for name, value in options.items() if name not in aside}
        decoding = {**{name: getattr(self, name) for name in _DECODING}, **given}
        if decoding["stop"] is None:
            decoding["stop"] = self.stop
        decoding["stop"] = tuple(decoding["stop"] or ())
        if grammar is not None:
            decoding["grammar"] = grammar
        named = {_NAMES.get(name, name): value for name, value in decoding.items()}
        return CallOptions(
            method=with_embedder(options.get("method", self.method), self.embedder),
            generation=Generation(**named),
            on_error=options.get("on_error", self.on_error),
        )

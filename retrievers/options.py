"""The draft of an adapter or retriever: which model, loaded how, and how it is asked."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, TypedDict

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat

from ..core.compressor import Compressor
from ..core.config import DEFAULT_METHOD, AnyEmbedder, OnError, SpecPC
from ..core.errors import ConfigError
from ..core.models.loading import AnyQuantization
from ..core.models.shared import shared_model
from ..core.options import told_as_config_errors
from ..core.prompt.messages import DEFAULT_SYSTEM
from ..core.specpc.stored.passage_store import PassageStore
from .embedders import as_embedder, settled


class Asking(TypedDict):
    """What every call of the draft is given, beside the question, the texts and the method."""

    system: str | None
    on_error: OnError
    timeout: float | None


class DraftLoading(BaseModel):
    """Which draft, loaded how, with which store; it is loaded at construction.

    Drafts of the same options are loaded once in a process (`core.models.shared`).

    Args:
        model: "builtin:draft", a folder or a hub id of the draft.
        compressor: A loaded compressor, instead of `model`.
        store: Passages that the draft has read before: a `PassageStore`, or the folder of one,
            which is made where it is missing. Takes the place of the compressor's own.
        gguf_file: Name of the GGUF file in the model's folder or hub repository.
        revision: Branch, tag or commit of the hub repository.
        quantization: How its weights are quantised: a `Quantization` (4 or 8 bits) or one of
            transformers' configs.
        device: "auto", "cpu", "cuda", ...
        dtype: "auto", "float32", "bfloat16", ...
        attn_implementation: "eager", "sdpa", ...; None for the model's default.
        template_options: Passed to the draft's chat template.
        trust_remote_code: Run code that a hub repository carries.
        progress: Show progress bars.

    Raises:
        ModelNotFoundError: There is no such model.
        ConfigError: An option is unknown or invalid.
        StoreError: The store is another draft's, or none.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid")

    model: str = "builtin:draft"
    compressor: Compressor | None = Field(default=None, exclude=True, repr=False)
    store: PassageStore | str | Path | None = None  # its place, once the object is made
    gguf_file: str | None = None
    revision: str | None = None
    quantization: AnyQuantization | None = None
    device: str = "auto"
    dtype: str = "auto"
    attn_implementation: str | None = None
    template_options: Mapping[str, Any] | None = None
    trust_remote_code: bool = False
    progress: bool = False

    def __init__(self, **options: Any) -> None:
        with told_as_config_errors(type(self)):
            super().__init__(**options)
        self.compressor = self._with_draft()
        store = self.compressor.draft.store
        self.store = None if store is None else store.where

    def _with_draft(self) -> Compressor:
        """The draft with its store; its model is one for all who load it alike."""
        if (found := self.compressor) is not None:
            self.model = found.model.name_or_path or self.model
            return found if self.store is None else found.with_store(self.store, self._remembers())
        draft = shared_model(
            self.model,
            gguf_file=self.gguf_file,
            revision=self.revision,
            quantization=self.quantization,
            device=self.device,
            dtype=self.dtype,
            attn_implementation=self.attn_implementation,
            trust_remote_code=self.trust_remote_code,
            progress=self.progress,
        )
        return Compressor(
            draft.model,
            draft.tokenizer,
            template_options=self.template_options,
            progress=self.progress,
            store=self.store,
            store_new=self._remembers(),
        )

    def _remembers(self) -> bool:
        """Whether a question's new passages are put into the store."""
        return False

    @property
    def loaded(self) -> Compressor:
        """The draft; it is there from construction on."""
        assert self.compressor is not None
        return self.compressor


class IndexOptions(DraftLoading):
    """Options of what reads documents into a store; see `DraftLoading` for the others.

    Args:
        store: A `PassageStore`, or the folder of one, which is made where it is missing. How much
            is kept of a token is told to `PassageStore.open`.
        embedder: Keeps its vectors of the sentences too: a LangChain `Embeddings`, a LlamaIndex
            `BaseEmbedding`, a function from texts to vectors, or a model's folder or hub id.

    Raises:
        ConfigError: There is no store.
    """

    embedder: AnyEmbedder = Field(default=None, repr=False)

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.embedder = as_embedder(self.embedder)
        passages = self.passages
        if self.embedder is not None:
            passages.embed_with(self.embedder)

    @property
    def passages(self) -> PassageStore:
        """The store."""
        if (store := self.loaded.draft.store) is None:
            raise ConfigError(
                f"{type(self).__name__} has no store: give store=, a folder or a PassageStore."
            )
        return store


class DraftOptions(DraftLoading):
    """Options of everything that asks a draft; see `DraftLoading` for the others.

    Args:
        store_new: Whether passages that are not in the store are put there.
        timeout: Seconds after which the draft's part of a request fails; None for no limit.
        on_error: "original" goes on with the whole texts when the draft fails, and logs a
            warning; "raise" raises.
        system: The system text that the draft reads in front of the passages; None for none.
    """

    store_new: bool = False
    timeout: PositiveFloat | None = None
    on_error: OnError = "original"
    system: str | None = DEFAULT_SYSTEM

    def _remembers(self) -> bool:
        return self.store_new

    def asking(self) -> Asking:
        """What every core call is given."""
        return {"system": self.system, "on_error": self.on_error, "timeout": self.timeout}


class SieveOptions(DraftOptions):
    """Options of everything that compresses with a draft; see `DraftOptions` and `DraftLoading`.

    Args:
        method: How much is kept, and of what. A `ratio` is a share of the draft tokens of all
            texts of a request together, a `capacity` is for the whole prompt, question and
            template included. None means `DEFAULT_METHOD`, as in the core: whole sentences that
            hold 0.35 of the tokens. `SpecPC()` has the paper's settings.
        embedder: What the method's `semantic_weight` asks: a LangChain `Embeddings`, a LlamaIndex
            `BaseEmbedding`, a function from texts to vectors, or a model's folder or hub id. Where
            `method` is None it counts a half.

    Raises:
        ConfigError: The method never asks the embedder, or the store cannot serve it.
    """

    default: ClassVar[SpecPC] = DEFAULT_METHOD
    method: SpecPC | None = None
    embedder: AnyEmbedder = Field(default=None, repr=False)

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.embedder = as_embedder(self.embedder)
        self.method = settled(self.method, self.embedder, self.default)
        if (store := self.loaded.draft.store) is not None:
            store.settled(self.method or self.default)


class DraftArguments(TypedDict, total=False):
    """The arguments of `DraftOptions`, for classes that are no pydantic models."""

    model: str
    compressor: Compressor | None
    store: PassageStore | str | Path | None
    store_new: bool
    timeout: float | None
    on_error: OnError
    system: str | None
    gguf_file: str | None
    revision: str | None
    quantization: AnyQuantization | None
    device: str
    dtype: str
    attn_implementation: str | None
    template_options: Mapping[str, Any] | None
    trust_remote_code: bool
    progress: bool

"""A LangChain document compressor: retrieved documents in, the same documents shortened out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

from langchain_core.callbacks import Callbacks
from langchain_core.documents import BaseDocumentCompressor, Document
from pydantic import ConfigDict, Field

from ...core.compressor import Compressor, OnError
from ...core.config import Quantization, SpecPC
from ...core.prompt import DEFAULT_SYSTEM
from ...core.types import CompressedContext, Passage
from ...retrievers.provenance import KEY, provenance


class DraftCompressor(BaseDocumentCompressor):
    """Shortens retrieved documents to what a draft model finds relevant to the question.

    The draft is loaded when the object is made. Documents keep their order, number (unless
    `method.drop_empty`), ids and metadata; `metadata["draftsieve"]` tells what was kept: "spans"
    (dicts of "start", "end", "score": characters of the document's original text), "tokens",
    "compressed_tokens", "score", and "fallback" (why the text is unchanged, else None).

    Args:
        model: "builtin:draft", a folder or a hub id of the draft.
        compressor: A loaded compressor, instead of `model`.
        method: How much is kept, and of what.
        system: The system text that the draft reads in front of the documents; None for none.
        on_error: "original" gives the documents back unchanged when a request fails and logs a
            warning; "raise" raises.
        quantization: Weights in 4 or 8 bits.
        device: "auto", "cpu", "cuda", ...
        dtype: "auto", "float32", "bfloat16", ...
        template_options: Passed to the draft's chat template.
        trust_remote_code: Run code that a hub repository carries.
        progress: Show progress bars while loading.

    Raises:
        ModelNotFoundError: There is no such model.
        ValidationError: An option is unknown or invalid.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid")

    model: str = "builtin:draft"
    compressor: Compressor | None = Field(default=None, exclude=True, repr=False)
    method: SpecPC = SpecPC.preset("2026-11", ratio=0.3)
    system: str | None = DEFAULT_SYSTEM
    on_error: OnError = "original"
    quantization: Quantization | None = None
    device: str = "auto"
    dtype: str = "auto"
    template_options: Mapping[str, Any] | None = None
    trust_remote_code: bool = False
    progress: bool = True

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        if self.compressor is not None:
            self.model = self.compressor.model.name_or_path
            return
        self.compressor = Compressor.load(
            self.model,
            quantization=self.quantization,
            device=self.device,
            dtype=self.dtype,
            template_options=self.template_options,
            trust_remote_code=self.trust_remote_code,
            progress=self.progress,
        )

    def compress_documents(
        self, documents: Sequence[Document], query: str, callbacks: Callbacks | None = None
    ) -> list[Document]:
        """Shorten documents to what matters for a question.

        Args:
            documents: Retrieved documents; they are not changed.
            query: The question.
            callbacks: Not used: a compression is one step.

        Returns:
            Shortened copies in the same order.

        Raises:
            DraftSieveError: The request failed and `on_error` is "raise".
        """
        if not documents:
            return []
        assert self.compressor is not None
        context = self.compressor.compress(query, _passages(documents), **self._options())
        return _documents(documents, context)

    async def acompress_documents(
        self, documents: Sequence[Document], query: str, callbacks: Callbacks | None = None
    ) -> list[Document]:
        """Do what `compress_documents` does without blocking the event loop."""
        if not documents:
            return []
        assert self.compressor is not None
        context = await self.compressor.acompress(query, _passages(documents), **self._options())
        return _documents(documents, context)

    def _options(self) -> dict[str, Any]:
        return {"method": self.method, "system": self.system, "on_error": self.on_error}


def _passages(documents: Sequence[Document]) -> list[Passage]:
    return [Passage(document.page_content, document.id) for document in documents]


def _documents(documents: Sequence[Document], context: CompressedContext) -> list[Document]:
    """Copies of the documents with the texts of the context's passages, by index."""
    return [
        documents[index].model_copy(
            update={
                "page_content": passage.text,
                "metadata": {
                    **deepcopy(documents[index].metadata),
                    KEY: provenance(context, index),
                },
            }
        )
        for passage, index in zip(context.passages, context.indices, strict=True)
    ]

"""`/v1/compress`, `/v1/retrieve` and reranking: the draft alone, behind other servers' models."""

from __future__ import annotations

import asyncio
import json
from typing import Annotated, Any
from uuid import uuid4

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field

from ...core.compressor import Compressor
from ...core.config import NEWEST_PRESET, SpecPC
from ...core.conversation.compressor import TurnCompressor
from ...core.conversation.turns import ShortTurns
from ...core.errors import NO_DRAFT, DraftSieveError, ModelError
from ...core.types import Passage
from .._shared.methods import SHARE
from .bodies import passages_of
from .errors import ApiError
from .extension import Extension, method_of
from .originals import Originals
from .service import Service
from .turns import pieces_of, request_of, shortened
from .watching import record_of

_UNBOUND = 2**31  # draft tokens of a conversation: each request says its own bound
_SHORT = 256  # texts of fewer draft tokens stay whole: a note alone takes a tenth of that


class CompressConfig(BaseModel):
    """What is left of a conversation: of the texts that may be shortened, or of all of it."""

    model_config = ConfigDict(extra="ignore")

    ratio: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    capacity: Annotated[int, Field(ge=1)] | None = None


class CompressBody(BaseModel):
    """`POST /v1/compress`. Fields of messages that are not known stay as they are."""

    model_config = ConfigDict(extra="ignore")

    messages: Annotated[list[dict[str, Any]], Field(min_length=1)]
    config: CompressConfig | None = None


class RerankBody(BaseModel):
    """`POST /v1/rerank` and `/v2/rerank`, as Cohere's and Jina's clients send them."""

    model_config = ConfigDict(extra="ignore")

    query: Annotated[str, Field(min_length=1)]
    documents: Annotated[list[str | dict[str, Any]], Field(min_length=1)]
    model: str | None = None
    top_n: Annotated[int, Field(ge=1)] | None = None
    return_documents: bool = True
    draftsieve: Extension = Extension()


def compression(service: Service, originals: Originals) -> APIRouter:
    """The routes that compress.

    Args:
        service: The models.
        originals: Where whole texts are kept.
    """
    router, turns = APIRouter(), _Turns()

    @router.post("/v1/compress")
    async def compress(request: Request, body: CompressBody) -> dict[str, Any]:
        """Shorten old turns and tool results of a conversation; their originals are kept."""
        json.dumps(body.messages, ensure_ascii=False).encode()  # no lone surrogates
        tenant = str(request.state.tenant)
        conversation = turns.of(tenant, _draft(service))
        pieces = pieces_of(body.messages)
        config = body.config or CompressConfig()
        question, texts = request_of(body.messages), [piece.turn for piece in pieces]

        async def work() -> ShortTurns:
            capacity = config.capacity
            if capacity is None:
                share = config.ratio or service.settings.method.ratio or SHARE
                capacity = await asyncio.to_thread(conversation.capacity_of, question, texts, share)
            return await conversation.acompress(
                question,
                texts,
                limit=capacity,
                timeout=service.settings.timeout,
            )

        try:
            found = await service.unless_gone(request, service.placed(work))
            messages, kept = shortened(body.messages, pieces, found)
            await asyncio.to_thread(originals.put, tenant, kept)
        except DraftSieveError as error:
            if isinstance(error, ModelError) or config.capacity is not None:
                raise  # nothing can be compressed, or the bound would be exceeded
            size = await asyncio.to_thread(conversation.size_of, texts)
            why = f"{type(error).__name__}: {error}"
            found, messages, kept = ShortTurns((), size, size, fallback=why), body.messages, {}
        record_of(request).fields |= {
            "tokens_before": found.original_tokens,
            "tokens_after": found.tokens,
            "fallback": found.fallback is not None,
        }
        service.metrics.compressed(found)
        return {
            "messages": messages,
            "tokens_before": found.original_tokens,
            "tokens_after": found.tokens,
            "tokens_saved": found.original_tokens - found.tokens,
            "compression_ratio": found.tokens / max(1, found.original_tokens),
            "ccr_hashes": list(kept),
            "fallback": found.fallback,
        }

    @router.get("/v1/retrieve/{key}")
    async def retrieve(request: Request, key: str) -> dict[str, Any]:
        """The whole text behind a hash of this tenant."""
        text = await asyncio.to_thread(originals.get, str(request.state.tenant), key)
        if text is None:
            raise ApiError(
                404,
                f"There is no text of the hash {key[:64]!r}, or no longer: copy it from the note.",
                "hash",
                "not_found",
            )
        return {"hash": key, "original_content": text}

    @router.post("/v1/rerank")
    @router.post("/v2/rerank")
    async def rerank(request: Request, body: RerankBody) -> dict[str, Any]:
        """Rank documents by the draft's best score in each, with what matters of them."""
        passages = passages_of(service.few(body.documents))
        method, draft = method_of(body.draftsieve, has_draft=True), _draft(service)
        if not isinstance(method, SpecPC):
            raise ApiError(400, "Documents are ranked with the method specpc.", "draftsieve")
        context = await service.unless_gone(
            request,
            service.placed(
                lambda: draft.acompress(
                    body.query,
                    passages,
                    method.model_copy(update={"drop_empty": False}),
                    timeout=service.timeout(body.draftsieve),
                )
            ),
        )
        order = sorted(range(len(passages)), key=lambda index: -context.sizes[index].score)
        results = [
            {
                "index": index,
                "relevance_score": context.sizes[index].score,
                "pruned_text": context.passages[index].text,
                **({"document": {"text": _text(passages[index])}} if body.return_documents else {}),
            }
            for index in order[: body.top_n]
        ]
        read = context.stats.prompt_tokens
        record_of(request).fields |= {"prompt_tokens": read, "documents": len(passages)}
        return {
            "id": f"rerank-{uuid4().hex}",
            "object": "list",
            "model": body.model or draft.model.name_or_path,
            "results": results,
            "usage": {"prompt_tokens": read, "total_tokens": read},
            "meta": {"api_version": {"version": "2"}, "billed_units": {"search_units": 0}},
        }

    return router


class _Turns:
    """What became of the texts of each tenant's conversations, so that each is shortened once."""

    def __init__(self) -> None:
        self._known: dict[str, TurnCompressor] = {}

    def of(self, tenant: str, draft: Compressor) -> TurnCompressor:
        if tenant not in self._known:
            method = SpecPC.preset(NEWEST_PRESET, capacity=_UNBOUND)
            self._known[tenant] = TurnCompressor(
                draft, method, fill=1.0, min_tokens=_SHORT, stable_prefix=True
            )
        return self._known[tenant]


def _draft(service: Service) -> Compressor:
    draft = service.loaded.loaded.compressor
    if draft is None:
        raise ModelError(NO_DRAFT)
    return draft


def _text(passage: str | Passage) -> str:
    return passage if isinstance(passage, str) else passage.text

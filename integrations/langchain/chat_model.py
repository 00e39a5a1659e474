"""A LangChain chat model whose documents a draft sieves before the target reads them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import Any

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import BaseChatModel, ModelProfile
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult

from ...core.config import Method
from ...core.prompt import Prompt
from ...core.types import Answer, Chunk
from .messages import as_mappings, usage_metadata
from .options import STRICT, EngineOptions, as_passages


class ChatDraftSieve(EngineOptions, BaseChatModel):
    """Chats with a target model; documents in the messages are compressed by `method`.

    Documents are content blocks {"type": "document", "text": ...} (or LangChain's "text-plain"
    blocks), which stay where they stand, or a call's `documents=[...]` (texts, documents or
    passages), which go in front of the last human message. Nothing else is ever compressed.

    A call may override `method`, `on_error`, `max_tokens`, `temperature`, `top_p`, `top_k`,
    `min_p`, `repetition_penalty`, `seed` and `stop`; other keyword arguments are refused.

    Options: see `EngineOptions`, and `streaming`: True reports tokens to callbacks as they come in
    `invoke` too, False never streams; left out, LangChain decides.

    The message's `response_metadata` has "model_name", "finish_reason", "timings", "method",
    "spans" and "fallback"; its `usage_metadata` counts what the target really read, with the
    prompt's size before and after compression in `input_token_details`.
    """

    model_config = STRICT

    streaming: bool = False

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        if self.profile is None:  # it was asked for before the engine was there
            self.profile = self._resolve_model_profile()

    @property
    def _llm_type(self) -> str:
        return "draftsieve-chat"

    def _resolve_model_profile(self) -> ModelProfile | None:
        window = None if self.engine is None else self.engine.context_window
        return None if window is None else {"max_input_tokens": window}

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        options = self.call_options(stop, kwargs)
        answer = self.loaded.generate(_prompt(messages, kwargs), **dict(options))
        return self._result(answer, options.method)

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        options = self.call_options(stop, kwargs)
        answer = await self.loaded.agenerate(_prompt(messages, kwargs), **dict(options))
        return self._result(answer, options.method)

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        options = self.call_options(stop, kwargs)
        for piece in self.loaded.stream_prompt(_prompt(messages, kwargs), **dict(options)):
            chunk = self._chunk(piece, options.method)
            if run_manager is not None:
                run_manager.on_llm_new_token(piece.text, chunk=chunk)
            yield chunk

    async def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:
        options = self.call_options(stop, kwargs)
        async for piece in self.loaded.astream_prompt(_prompt(messages, kwargs), **dict(options)):
            chunk = self._chunk(piece, options.method)
            if run_manager is not None:
                await run_manager.on_llm_new_token(piece.text, chunk=chunk)
            yield chunk

    def _result(self, answer: Answer, method: Method | None) -> ChatResult:
        message = AIMessage(
            content=answer.text,
            usage_metadata=usage_metadata(answer.usage),
            response_metadata=self.report(answer, method),
        )
        return ChatResult(generations=[ChatGeneration(message=message)])

    def _chunk(self, piece: Chunk, method: Method | None) -> ChatGenerationChunk:
        """A piece as a message; usage and metadata come once, with the last one."""
        message = AIMessageChunk(content=piece.text)
        if piece.answer is not None:
            message.usage_metadata = usage_metadata(piece.answer.usage)
            message.response_metadata = self.report(piece.answer, method)
            message.chunk_position = "last"
        return ChatGenerationChunk(message=message)


def _prompt(messages: list[BaseMessage], options: dict[str, Any]) -> Prompt:
    documents = as_passages(options.get("documents") or ())
    return Prompt.from_messages(as_mappings(messages), documents)

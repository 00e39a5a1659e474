"""A LangChain chat model whose documents a draft sieves before the target reads them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from typing import Any

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import BaseChatModel, LanguageModelInput, ModelProfile
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_core.runnables import Runnable
from langchain_core.tools import BaseTool
from langchain_core.utils.function_calling import convert_to_openai_tool

from ...core.config import Method
from ...core.errors import ConfigError
from ...core.prompt.messages import Prompt
from ...core.types import Answer, Chunk
from ...retrievers.langchain import as_passages
from .._shared.tools import choice_of, schema_of, tools_of
from .batch import Configs, all_at_once, together
from .batch import answer as ask
from .messages import as_mappings, usage_metadata
from .options import STRICT, EngineOptions
from .structured import structured
from .tools import as_call_chunks, as_calls, as_invalid_calls


class ChatDraftSieve(EngineOptions, BaseChatModel):
    """Chats with a target model; documents in the messages are compressed by `method`.

    Documents are content blocks {"type": "document", "text": ...} (or LangChain's "text-plain"
    blocks), which stay where they stand, or a call's `documents=[...]` (texts, documents or
    passages), which go in front of the last human message. Nothing else is ever compressed.

    A call may override `method`, `on_error`, `max_tokens`, `temperature`, `top_p`, `top_k`,
    `min_p`, `repetition_penalty`, `seed`, `timeout` and `stop`, and give `tools`, `tool_choice`,
    `parallel_tool_calls`, OpenAI's `response_format` or a `Grammar`; other keyword arguments are
    refused.

    Options: see `EngineOptions`, and `streaming`: True reports tokens to callbacks as they come in
    `invoke` too, False never streams; left out, LangChain decides.

    The message's `response_metadata` has "model_name", "finish_reason", "timings", "method",
    "spans" and "fallback"; its `usage_metadata` counts what the target really read, with the
    prompt's size before and after compression in `input_token_details`.
    """

    model_config = STRICT

    streaming: bool = False

    def _on_loaded(self) -> None:
        if self.profile is None:  # it was asked for before the engine was there
            self.profile = self._resolve_model_profile()

    @property
    def _llm_type(self) -> str:
        return "draftsieve-chat"

    def _resolve_model_profile(self) -> ModelProfile | None:
        if self.engine is None:
            return None
        found = ModelProfile(
            name=self.engine.model_name,
            text_inputs=True,
            text_outputs=True,
            image_inputs=False,
            audio_inputs=False,
            video_inputs=False,
            reasoning_output=False,
            tool_calling=True,
            tool_choice=True,
            tool_call_streaming=True,
            structured_output=True,
            temperature=True,
        )
        if self.engine.context_window is not None:
            found["max_input_tokens"] = self.engine.context_window
        return found

    def bind_tools(
        self,
        tools: Sequence[dict[str, Any] | type | Callable[..., Any] | BaseTool],
        *,
        tool_choice: Any = None,
        parallel_tool_calls: bool | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, AIMessage]:
        """Let the model call tools; constrained decoding makes every call fit its schema.

        Args:
            tools: Functions, classes, tools or OpenAI tool schemas.
            tool_choice: None or "auto" for text, calls or both; "any" (or "required", True) for
                calls only; "none" (or False) for no calls; the name of the tool to call.
            parallel_tool_calls: Whether an answer may hold several calls; None allows it where
                text is allowed too ("auto").
            kwargs: More options of the calls. With a `response_format`, an answer that calls no
                tool is JSON of its schema (what `create_agent(response_format=...)` asks for).

        Raises:
            GrammarError: `tool_choice` names no tool, or a schema cannot be enforced.
            MissingExtraError: llguidance is not installed.
        """
        options = {
            "tools": [convert_to_openai_tool(tool) for tool in tools],
            "tool_choice": choice_of(tool_choice),
            "parallel_tool_calls": parallel_tool_calls,
        }
        form = {"response_format": kwargs.get("response_format")}
        self.options_of(None, {**options, **form})  # faults show here, not in the first call
        return self.bind(**options, **kwargs)

    def with_structured_output(
        self,
        schema: dict[str, Any] | type,
        *,
        include_raw: bool = False,
        method: str = "function_calling",
        strict: bool | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, Any]:
        """Answer with a pydantic object or a dict; constrained decoding makes it fit the schema.

        Args:
            schema: A pydantic class, a TypedDict, or a JSON or OpenAI tool schema.
            include_raw: Return {"raw", "parsed", "parsing_error"} instead of raising
                `OutputParserException` where an answer was cut off by `max_tokens`.
            method: "function_calling" for one call of a tool of that schema; "json_schema" for
                bare JSON, with the schema in the system text; "json_mode" for any JSON object,
                with nothing added to the prompt.
            strict: Has no effect: the schema is always enforced.

        Raises:
            ConfigError: There is no such method.
        """
        if method not in ("function_calling", "json_schema", "json_mode") or kwargs:
            raise ConfigError(
                f"with_structured_output(method={method!r}, {', '.join(kwargs)}): methods are "
                '"function_calling", "json_schema" and "json_mode", without further options.'
            )
        return structured(self, schema, method, include_raw)

    def batch(
        self,
        inputs: list[LanguageModelInput],
        config: Configs = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> list[Any]:
        """Answer inputs as one batch of the target, of at most `max_concurrency` (32) rows."""
        if not inputs:
            return []
        configs = all_at_once(config, len(inputs))
        with together(len(inputs)):
            return super().batch(inputs, configs, return_exceptions=return_exceptions, **kwargs)

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        options = self.options_of(stop, kwargs)
        answer = ask(self.loaded, _prompt(messages, kwargs), dict(options))
        return self._result(answer, options.method)

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        options = self.options_of(stop, kwargs)
        answer = await self.loaded.agenerate(_prompt(messages, kwargs), **dict(options))
        return self._result(answer, options.method)

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        options, told = self.options_of(stop, kwargs), 0
        for piece in self.loaded.stream_prompt(_prompt(messages, kwargs), **dict(options)):
            chunk = self._chunk(piece, options.method, told)
            told += len(piece.tool_calls)
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
        options, told = self.options_of(stop, kwargs), 0
        async for piece in self.loaded.astream_prompt(_prompt(messages, kwargs), **dict(options)):
            chunk = self._chunk(piece, options.method, told)
            told += len(piece.tool_calls)
            if run_manager is not None:
                await run_manager.on_llm_new_token(piece.text, chunk=chunk)
            yield chunk

    def _result(self, answer: Answer, method: Method | None) -> ChatResult:
        message = AIMessage(
            content=answer.text,
            tool_calls=as_calls(answer.tool_calls),
            invalid_tool_calls=as_invalid_calls(answer.broken_calls),
            usage_metadata=usage_metadata(answer.usage),
            response_metadata=self.report(answer, method),
        )
        return ChatResult(generations=[ChatGeneration(message=message)])

    def _chunk(self, piece: Chunk, method: Method | None, told: int) -> ChatGenerationChunk:
        """A piece as a message; usage and metadata come once, with the last one.

        Args:
            piece: The core's chunk.
            method: The method that was asked for.
            told: Tool calls of the pieces before.
        """
        broken = () if piece.answer is None else piece.answer.broken_calls
        chunks = as_call_chunks(piece.tool_calls, broken, told)
        message = AIMessageChunk(content=piece.text, tool_call_chunks=chunks)
        if piece.answer is not None:
            message.usage_metadata = usage_metadata(piece.answer.usage)
            message.response_metadata = self.report(piece.answer, method)
            message.chunk_position = "last"
        return ChatGenerationChunk(message=message)


def _prompt(messages: list[BaseMessage], options: Mapping[str, Any]) -> Prompt:
    documents = as_passages(options.get("documents") or ())
    return Prompt.from_messages(
        as_mappings(messages), documents, tools_of(options), schema_of(options)
    )

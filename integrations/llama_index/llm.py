"""A LlamaIndex LLM whose documents a draft sieves before the target reads them."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator, Mapping, Sequence
from typing import Any

from llama_index.core.base.llms.generic_utils import (
    astream_chat_response_to_completion_response,
    chat_response_to_completion_response,
    prompt_to_messages,
    stream_chat_response_to_completion_response,
)
from llama_index.core.base.llms.types import (
    ChatMessage,
    ChatResponse,
    ChatResponseAsyncGen,
    ChatResponseGen,
    CompletionResponse,
    CompletionResponseAsyncGen,
    CompletionResponseGen,
    LLMMetadata,
    MessageRole,
    TextBlock,
    ToolCallBlock,
)
from llama_index.core.constants import DEFAULT_CONTEXT_WINDOW
from llama_index.core.llms.callbacks import llm_chat_callback, llm_completion_callback
from llama_index.core.llms.llm import ToolSelection
from llama_index.core.program.function_program import FunctionCallingProgram
from llama_index.core.program.utils import get_program_for_llm
from llama_index.core.prompts import PromptTemplate
from llama_index.core.tools.types import BaseTool
from llama_index.core.types import BasePydanticProgram, Model

from ...core.config import Method
from ...core.errors import ModelError
from ...core.prompt.messages import Prompt
from ...core.prompt.tool_calls import answer_grammar, stated_schema
from ...core.types import Answer, Chunk
from .._shared.report import cut_off
from .._shared.tools import choice_of
from .messages import as_prompt, report, token_counts
from .options import EngineOptions
from .tools import call_blocks, call_mapping, selections, tool_schema


class DraftSieveLLM(EngineOptions):
    """Chats with a target model; documents in the messages are compressed by `method`.

    Documents are document blocks (`DocumentBlock(data=text.encode())`) and citable blocks, which
    stay where they stand, or a call's `documents=[...]` (texts, nodes or passages), which go in
    front of the last user message. Text is never compressed, also not the context that a query
    engine writes into its prompt: put a `DraftSievePostprocessor` before it, or use SpecKV, which
    evicts from the cache of the whole prompt.

    `complete` makes its prompt one user message, as chat models do; `formatted` changes nothing.

    A call may override `method`, `on_error`, `max_tokens`, `temperature`, `top_p`, `top_k`,
    `min_p`, `repetition_penalty`, `seed`, `stop` and `timeout`, and give OpenAI's
    `response_format` or a `grammar` (see `core.grammar.Grammar`); other keyword arguments are
    refused.

    Tools (`chat_with_tools`, `FunctionAgent`, `structured_predict`, `as_structured_llm`) are
    called by constrained decoding: calls always fit the tools' schemas, unless `max_tokens` cuts
    them off; such a call is left out and told in `raw["broken_calls"]`. `tool_choice` is "auto",
    "any" (or "required"), "none", or a tool's name. In a stream a call comes as a whole. With a
    `response_format`, an answer that calls no tool is JSON of its schema.

    Options: see `EngineOptions`; `system_prompt`, `callback_manager`, `output_parser` and the rest
    of LlamaIndex's own work as for any LLM.

    A response's `raw` has "usage", "model", "finish_reason", "timings", "method", "spans" and
    "fallback"; its `additional_kwargs` have the token counts too. In a stream the last piece
    carries both.
    """

    @classmethod
    def class_name(cls) -> str:
        """The name under which LlamaIndex stores this component."""
        return "DraftSieveLLM"

    @property
    def metadata(self) -> LLMMetadata:
        """What LlamaIndex plans its prompts with; an unknown window counts as its default."""
        return LLMMetadata(
            context_window=self.loaded.context_window or DEFAULT_CONTEXT_WINDOW,
            num_output=self.max_tokens,
            is_chat_model=True,
            is_function_calling_model=True,
            model_name=self.model,
        )

    @llm_chat_callback()
    def chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        """Answer a conversation."""
        return self._answer(messages, kwargs)

    @llm_chat_callback()
    async def achat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        """Do what `chat` does without blocking the event loop."""
        return await self._aanswer(messages, kwargs)

    @llm_chat_callback()
    def stream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseGen:
        """Answer a conversation piece by piece; close the stream to cancel."""
        return self._stream(messages, kwargs)

    @llm_chat_callback()
    async def astream_chat(
        self, messages: Sequence[ChatMessage], **kwargs: Any
    ) -> ChatResponseAsyncGen:
        """Do what `stream_chat` does without blocking the event loop."""
        return self._astream(messages, kwargs)

    @llm_completion_callback()
    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        """Answer one user message."""
        response = self._answer(prompt_to_messages(prompt), kwargs)
        return chat_response_to_completion_response(response)

    @llm_completion_callback()
    async def acomplete(
        self, prompt: str, formatted: bool = False, **kwargs: Any
    ) -> CompletionResponse:
        """Do what `complete` does without blocking the event loop."""
        response = await self._aanswer(prompt_to_messages(prompt), kwargs)
        return chat_response_to_completion_response(response)

    @llm_completion_callback()
    def stream_complete(
        self, prompt: str, formatted: bool = False, **kwargs: Any
    ) -> CompletionResponseGen:
        """Answer one user message piece by piece; close the stream to cancel."""
        responses = self._stream(prompt_to_messages(prompt), kwargs)
        return stream_chat_response_to_completion_response(responses)

    @llm_completion_callback()
    async def astream_complete(
        self, prompt: str, formatted: bool = False, **kwargs: Any
    ) -> CompletionResponseAsyncGen:
        """Do what `stream_complete` does without blocking the event loop."""
        responses = self._astream(prompt_to_messages(prompt), kwargs)
        return astream_chat_response_to_completion_response(responses)

    def _prepare_chat_with_tools(
        self,
        tools: Sequence[BaseTool],
        user_msg: str | ChatMessage | None = None,
        chat_history: list[ChatMessage] | None = None,
        verbose: bool = False,
        allow_parallel_tool_calls: bool = False,
        tool_required: bool = False,
        tool_choice: str | Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        asked = ChatMessage(user_msg) if isinstance(user_msg, str) else user_msg
        messages = [*(chat_history or ()), *(() if asked is None else (asked,))]
        choice = choice_of(tool_choice)
        choice = "any" if choice == "auto" and tool_required else choice
        if not tools or choice == "none":
            return {"messages": messages, **kwargs}
        schemas = [tool_schema(tool) for tool in tools]
        form = kwargs.get("response_format")
        grammar = answer_grammar(schemas, choice, allow_parallel_tool_calls, form)
        return {"messages": messages, "tools": schemas, "grammar": grammar, **kwargs}

    def get_tool_calls_from_response(
        self, response: ChatResponse, error_on_no_tool_call: bool = True, **kwargs: Any
    ) -> list[ToolSelection]:
        """The tool calls of a response.

        Args:
            response: What a chat method returned.
            error_on_no_tool_call: Raise where there are none.

        Raises:
            ModelError: There are none.
        """
        calls = selections(response.message)
        if not calls and error_on_no_tool_call:
            raise ModelError(_no_call(response))
        return calls

    def _structured_stream_call(
        self,
        output_cls: type[Model],
        prompt: PromptTemplate,
        llm_kwargs: dict[str, Any] | None = None,
        **prompt_args: Any,
    ) -> Generator[Any, None, None]:
        program = self._program(output_cls, prompt)
        last = None
        for last in program.stream_call(llm_kwargs=llm_kwargs, **prompt_args):
            yield last
        _check_end(program, last)

    async def _structured_astream_call(
        self,
        output_cls: type[Model],
        prompt: PromptTemplate,
        llm_kwargs: dict[str, Any] | None = None,
        **prompt_args: Any,
    ) -> AsyncGenerator[Any, None]:
        program = self._program(output_cls, prompt)
        found = await program.astream_call(llm_kwargs=llm_kwargs, **prompt_args)

        async def objects() -> AsyncGenerator[Any, None]:
            last = None
            async for last in found:
                yield last
            _check_end(program, last)

        return objects()

    def _program(
        self, output_cls: type[Model], prompt: PromptTemplate
    ) -> BasePydanticProgram[Model]:
        """LlamaIndex's program, which by itself would leave a streaming model free not to call."""
        mode = self.pydantic_program_mode
        return get_program_for_llm(output_cls, prompt, self, mode, tool_choice="any")

    def _answer(self, messages: Sequence[ChatMessage], options: Mapping[str, Any]) -> ChatResponse:
        call = self.options_of(options)
        answer = self.loaded.generate(_prompt(messages, options), **dict(call))
        calls = call_blocks(answer.tool_calls)
        return self._response(_message(answer.text, calls), None, answer, call.method)

    async def _aanswer(
        self, messages: Sequence[ChatMessage], options: Mapping[str, Any]
    ) -> ChatResponse:
        call = self.options_of(options)
        answer = await self.loaded.agenerate(_prompt(messages, options), **dict(call))
        calls = call_blocks(answer.tool_calls)
        return self._response(_message(answer.text, calls), None, answer, call.method)

    def _stream(
        self, messages: Sequence[ChatMessage], options: Mapping[str, Any]
    ) -> ChatResponseGen:
        call = self.options_of(options)
        pieces = self.loaded.stream_prompt(_prompt(messages, options), **dict(call))

        def responses() -> ChatResponseGen:
            so_far = _message("", [])
            for piece in pieces:
                so_far = _grown(so_far, piece)
                yield self._response(so_far, piece.text, piece.answer, call.method)

        return responses()

    def _astream(
        self, messages: Sequence[ChatMessage], options: Mapping[str, Any]
    ) -> ChatResponseAsyncGen:
        call = self.options_of(options)
        pieces = self.loaded.astream_prompt(_prompt(messages, options), **dict(call))

        async def responses() -> ChatResponseAsyncGen:
            so_far = _message("", [])
            async for piece in pieces:
                so_far = _grown(so_far, piece)
                yield self._response(so_far, piece.text, piece.answer, call.method)

        return responses()

    def _response(
        self, message: ChatMessage, delta: str | None, answer: Answer | None, method: Method | None
    ) -> ChatResponse:
        """Counts and report come once, with the answer."""
        return ChatResponse(
            message=message,
            delta=delta,
            raw=answer and report(answer, self.model, method),
            additional_kwargs={} if answer is None else token_counts(answer),
        )


def _check_end(program: BasePydanticProgram[Any], last: object) -> None:
    """A stream of tool calls that was cut off ends in half an object."""
    wanted = program.output_cls
    if isinstance(program, FunctionCallingProgram) and not isinstance(last, wanted):
        raise ModelError(
            f"The stream ended before it held a whole {wanted.__name__}, cut off by max_tokens: "
            "allow more max_tokens."
        )


def _no_call(response: ChatResponse) -> str:
    """Why a response holds no tool call."""
    raw = response.raw if isinstance(response.raw, dict) else {}
    if raw.get("broken_calls"):
        tokens = raw["usage"]["completion_tokens"]
        return cut_off(raw["finish_reason"], tokens, "whole tool call")
    return (
        f"The model called no tool (it said {response.message.content!r}): pass "
        "tool_required=True where it must."
    )


def _prompt(messages: Sequence[ChatMessage], options: Mapping[str, Any]) -> Prompt:
    schema = stated_schema(options.get("response_format"))
    return as_prompt(messages, options.get("documents") or (), options.get("tools"), schema)


def _grown(message: ChatMessage, piece: Chunk) -> ChatMessage:
    """The message of a stream with its next piece."""
    calls = [block for block in message.blocks if isinstance(block, ToolCallBlock)]
    text = (message.content or "") + piece.text
    return _message(text, [*calls, *call_blocks(piece.tool_calls)])


def _message(text: str, calls: Sequence[ToolCallBlock]) -> ChatMessage:
    """An answer; LlamaIndex looks for the calls in its blocks, and its programs beside them."""
    said = [] if calls and not text else [TextBlock(text=text)]
    extra = {"tool_calls": [call_mapping(call) for call in calls]} if calls else {}
    return ChatMessage([*said, *calls], role=MessageRole.ASSISTANT, additional_kwargs=extra)

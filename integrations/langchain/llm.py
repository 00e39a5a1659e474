"""A LangChain text LLM: each prompt is one user message, many prompts are one batch."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import Any

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import BaseLLM
from langchain_core.outputs import Generation, GenerationChunk, LLMResult

from ...core.config import Method
from ...core.errors import GrammarError
from ...core.prompt.messages import Prompt
from ...core.types import Answer, Chunk
from ...retrievers.langchain import as_passages
from .._shared.options import CALL_OPTIONS
from .._shared.tools import schema_of
from .messages import usage_metadata
from .options import STRICT, EngineOptions


class DraftSieveLLM(EngineOptions, BaseLLM):
    """Completes prompts with a target model; a call's `documents` are compressed by `method`.

    A plain prompt is one user message and is never compressed. `documents=[...]` of a call
    (texts, documents or passages) stand in front of each of its prompts.

    A call may override `method`, `on_error`, `max_tokens`, `temperature`, `top_p`, `top_k`,
    `min_p`, `repetition_penalty`, `seed`, `timeout` and `stop`, and give OpenAI's
    `response_format` or a `Grammar`; other keyword arguments are refused.

    Options: see `EngineOptions`.

    LangChain's cache of text LLMs would confuse calls that differ in such options, `documents`
    included: they go round it.

    A generation's `generation_info` has what `ChatDraftSieve` puts into `response_metadata`, and
    "usage".
    """

    model_config = STRICT

    @property
    def _llm_type(self) -> str:
        return "draftsieve"

    def generate(
        self, prompts: list[str], stop: list[str] | None = None, *args: Any, **kwargs: Any
    ) -> LLMResult:
        """Answer prompts as `BaseLLM.generate` does; a call with options goes round the cache."""
        caller = self._uncached(kwargs)
        return super(DraftSieveLLM, caller).generate(prompts, stop, *args, **kwargs)

    async def agenerate(
        self, prompts: list[str], stop: list[str] | None = None, *args: Any, **kwargs: Any
    ) -> LLMResult:
        """Do what `generate` does without blocking the event loop."""
        caller = self._uncached(kwargs)
        return await super(DraftSieveLLM, caller).agenerate(prompts, stop, *args, **kwargs)

    def _uncached(self, options: dict[str, Any]) -> DraftSieveLLM:
        """LangChain's cache of text LLMs knows no option of a call but `stop`."""
        own = options.keys() & (CALL_OPTIONS | self.apart)
        return self.model_copy(update={"cache": False}) if own else self

    def _generate(
        self,
        prompts: list[str],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> LLMResult:
        options = self.options_of(stop, kwargs)
        answers = self.loaded.generate_many([_prompt(p, kwargs) for p in prompts], **dict(options))
        return self._result(answers, options.method)

    async def _agenerate(
        self,
        prompts: list[str],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> LLMResult:
        options = self.options_of(stop, kwargs)
        asked = [_prompt(prompt, kwargs) for prompt in prompts]
        answers = await self.loaded.agenerate_many(asked, **dict(options))
        return self._result(answers, options.method)

    def _stream(
        self,
        prompt: str,
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[GenerationChunk]:
        options = self.options_of(stop, kwargs)
        for piece in self.loaded.stream_prompt(_prompt(prompt, kwargs), **dict(options)):
            chunk = self._chunk(piece, options.method)
            if run_manager is not None:
                run_manager.on_llm_new_token(piece.text, chunk=chunk)
            yield chunk

    async def _astream(
        self,
        prompt: str,
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[GenerationChunk]:
        options = self.options_of(stop, kwargs)
        async for piece in self.loaded.astream_prompt(_prompt(prompt, kwargs), **dict(options)):
            chunk = self._chunk(piece, options.method)
            if run_manager is not None:
                await run_manager.on_llm_new_token(piece.text, chunk=chunk)
            yield chunk

    def _result(self, answers: list[Answer], method: Method | None) -> LLMResult:
        generations = [
            [Generation(text=answer.text, generation_info=self._info(answer, method))]
            for answer in answers
        ]
        return LLMResult(generations=generations)

    def _chunk(self, piece: Chunk, method: Method | None) -> GenerationChunk:
        info = None if piece.answer is None else self._info(piece.answer, method)
        return GenerationChunk(text=piece.text, generation_info=info)

    def _info(self, answer: Answer, method: Method | None) -> dict[str, Any]:
        return {**self.report(answer, method), "usage": dict(usage_metadata(answer.usage))}


def _prompt(text: str, options: dict[str, Any]) -> Prompt:
    documents = as_passages(options.get("documents") or ())
    if options.get("tools"):
        raise GrammarError("A text LLM calls no tools: use ChatDraftSieve(...).bind_tools.")
    messages = [{"role": "user", "content": text}]
    return Prompt.from_messages(messages, documents, schema=schema_of(options))

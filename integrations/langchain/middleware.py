"""LangChain agents: long tool results and old turns are shortened before each model call."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, ToolMessage
from langchain_core.tools import BaseTool, tool
from langchain_core.utils.function_calling import convert_to_openai_tool
from pydantic import TypeAdapter

from ...core.compressor import Compressor
from ...core.config import NEWEST_PRESET, AnyEmbedder, OnError, SpecPC
from ...core.conversation.compressor import TurnCompressor
from ...core.conversation.turns import Keep, Turn
from ...core.models.loading import AnyQuantization
from ...core.prompt.messages import DEFAULT_SYSTEM
from ...core.specpc.stored.passage_store import PassageStore
from ...retrievers.extras import require
from ...retrievers.options import SieveOptions
from .turns import RECALL, Piece, key_of, message_pieces, shortened, texts

require("langchain.agents", "agents", "DraftCompressionMiddleware")

from langchain.agents.middleware.types import (  # noqa: E402
    AgentMiddleware,
    AgentState,
    ModelRequest,
    ModelResponse,
)
from langchain.agents.structured_output import (  # noqa: E402
    AutoStrategy,
    ProviderStrategy,
    ToolStrategy,
)
from langchain.tools import ToolRuntime  # noqa: E402


class RequestOptions(SieveOptions):
    __doc__ = SieveOptions.__doc__

    default: ClassVar[SpecPC] = SpecPC.preset(NEWEST_PRESET, capacity=4096)


class DraftCompressionMiddleware(AgentMiddleware[AgentState[Any], Any, Any]):
    """Keeps an agent's requests within a budget by what a draft finds relevant.

    Before each model call everything that is sent is counted: system prompt, tool and answer
    schemas, messages. Beyond `method.capacity` draft tokens, old turns and tool results are
    shortened against the latest user request, in one compression. Untouched stay the system
    prompt, the latest request, the newest turns, tool calls, ids, and the number and order of
    messages, so that every tool result still follows its call. The agent's state keeps the
    originals; copies with `response_metadata["draftsieve"]` (a list of dicts with "block",
    "tokens", "compressed_tokens" and "spans", characters of the original text) go to the model.

    What became of a text is remembered by its content: it is compressed once, until a new
    request comes or the budget is used up.

    Args:
        model: "builtin:draft", a folder or a hub id of the draft.
        compressor: A loaded compressor, instead of `model`.
        store: Texts that the draft has read before, see `DraftOptions`.
        store_new: Whether texts that are not in the store are put there. It then holds what users
            and tools said: one store for each tenant.
        method: How texts are read and cut. `capacity` is the most draft tokens of a request; a
            model whose profile states less has less. A ratio is refused. None keeps whole
            sentences within 4096 tokens.
        embedder: What the method's `semantic_weight` asks, such as a LangChain `Embeddings`; see
            `SieveOptions`.
        timeout: Seconds after which shortening a request fails; None for no limit.
        on_error: "original" logs a warning and goes on: where what must stay exceeds the capacity,
            with the other texts at a tenth; where shortening fails, with the originals if they
            are within the model's limit. "raise" raises.
        keep: Newest human and AI messages that are never shortened. Tool results among them are
            shortened only where the older ones cannot make the room.
        fill: Share of the capacity that a compression aims at, the rest being for what comes.
        min_tokens: Shorter texts stay whole.
        exclude_tools: Names of tools whose results are never shortened.
        stable_prefix: What was sent stays as it was sent as long as there is room, also for new
            requests, so that prompt caches go on matching.
        recall: Give the agent a tool `recall` that returns a shortened text whole, by the key
            that then stands behind it.
        max_input_tokens: Most tokens that the model reads, as the draft counts them; None for
            what its profile says.
        system: The system text that the draft reads; None for none.
        gguf_file: Name of the GGUF file in the model's folder or hub repository.
        revision: Branch, tag or commit of the hub repository.
        quantization: A `Quantization` (4 or 8 bits), or one of transformers' configs.
        device: "auto", "cpu", "cuda", ...
        dtype: "auto", "float32", "bfloat16", ...
        attn_implementation: "eager", "sdpa", ...; None for the model's default.
        template_options: Passed to the draft's chat template.
        trust_remote_code: Run code that a hub repository carries.
        progress: Show progress bars.

    Raises:
        ModelNotFoundError: There is no such model.
        ConfigError: `method` has a ratio instead of a capacity, `fill` is not in (0, 1], or
            another option is invalid.
    """

    def __init__(
        self,
        model: str = "builtin:draft",
        *,
        compressor: Compressor | None = None,
        store: PassageStore | str | Path | None = None,
        store_new: bool = False,
        method: SpecPC | None = None,
        embedder: AnyEmbedder = None,
        timeout: float | None = None,
        on_error: OnError = "original",
        keep: int = 2,
        fill: float = 0.7,
        min_tokens: int = 64,
        exclude_tools: Collection[str] = (),
        stable_prefix: bool = False,
        recall: bool = False,
        max_input_tokens: int | None = None,
        system: str | None = DEFAULT_SYSTEM,
        gguf_file: str | None = None,
        revision: str | None = None,
        quantization: AnyQuantization | None = None,
        device: str = "auto",
        dtype: str = "auto",
        attn_implementation: str | None = None,
        template_options: Mapping[str, Any] | None = None,
        trust_remote_code: bool = False,
        progress: bool = False,
    ) -> None:
        super().__init__()
        draft = RequestOptions(
            model=model,
            compressor=compressor,
            method=method,
            embedder=embedder,
            store=store,
            store_new=store_new,
            timeout=timeout,
            on_error=on_error,
            system=system,
            gguf_file=gguf_file,
            revision=revision,
            quantization=quantization,
            device=device,
            dtype=dtype,
            attn_implementation=attn_implementation,
            template_options=template_options,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
        self.compressor, self.timeout, self.on_error = draft.loaded, timeout, draft.on_error
        self.turns = TurnCompressor(
            self.compressor,
            draft.method or draft.default,
            fill=fill,
            min_tokens=min_tokens,
            stable_prefix=stable_prefix,
            system=system,
        )
        self.keep, self.exclude_tools = keep, frozenset(exclude_tools)
        self.max_input_tokens = max_input_tokens
        self.tools: list[BaseTool] = [_recall] if recall else []

    def wrap_model_call(
        self,
        request: ModelRequest[Any],
        handler: Callable[[ModelRequest[Any]], ModelResponse[Any]],
    ) -> ModelResponse[Any]:
        """Send a request with its messages shortened to the budget.

        Args:
            request: What the agent would send; it is not changed.
            handler: Calls the model.

        Returns:
            The model's response.

        Raises:
            BudgetError: Shortening failed and the originals exceed the model's limit, or what must
                stay exceeds it.
            DraftSieveError: Shortening failed and `on_error` is "raise".
        """
        pieces, options = self._pieces(request), self._options(request)
        found = self.turns.compress(
            _request_text(request.messages), [p.turn for p in pieces], **options
        )
        return handler(request.override(messages=shortened(request.messages, pieces, found)))

    async def awrap_model_call(
        self,
        request: ModelRequest[Any],
        handler: Callable[[ModelRequest[Any]], Awaitable[ModelResponse[Any]]],
    ) -> ModelResponse[Any]:
        """Do what `wrap_model_call` does without blocking the event loop."""
        pieces, options = self._pieces(request), self._options(request)
        found = await self.turns.acompress(
            _request_text(request.messages), [p.turn for p in pieces], **options
        )
        return await handler(request.override(messages=shortened(request.messages, pieces, found)))

    def _options(self, request: ModelRequest[Any]) -> dict[str, Any]:
        profile = request.model.profile or {}
        limit = self.max_input_tokens or profile.get("max_input_tokens")
        return {"limit": limit, "on_error": self.on_error, "timeout": self.timeout}

    def _pieces(self, request: ModelRequest[Any]) -> list[Piece]:
        """Every text of a request: system prompt and schemas, then the messages'."""
        fixed = [json.dumps(schema, default=str) for schema in _schemas(request)]
        pieces = [Piece(Turn(text)) for text in fixed]
        if request.system_message is not None:
            pieces += message_pieces(request.system_message, None, "always", noted=False)
        asked = _latest_request(request.messages)
        talk = [i for i, m in enumerate(request.messages) if not isinstance(m, ToolMessage)]
        newest = [len(request.messages), *reversed(talk)][min(self.keep, len(talk))]
        for index, message in enumerate(request.messages):
            keep = self._keep(message, index, asked, newest)
            # a recalled text is no repetition of the shortened one, so it carries no note
            noted = bool(self.tools) and message.name != RECALL
            pieces += message_pieces(message, index, keep, noted=noted)
        return pieces

    def _keep(self, message: BaseMessage, index: int, asked: int, newest: int) -> Keep:
        """Whether a message may be shortened."""
        if isinstance(message, ToolMessage):
            if message.name in self.exclude_tools:
                return "always"
            recalled = message.name == RECALL and index > asked
            return "newest" if recalled or index >= newest else "never"
        # the blocks of an answer may be signed or numbered by its provider: they stay
        loose = isinstance(message, HumanMessage) or (
            isinstance(message, AIMessage) and isinstance(message.content, str)
        )
        return "never" if loose and index != asked and index < newest else "always"


@tool(RECALL)
def _recall(key: str, runtime: ToolRuntime) -> str:
    """Return the whole text of a message of which only parts are shown.

    Args:
        key: The key in the note behind the shortened text.
    """
    for message in runtime.state["messages"]:
        for text in texts(message):
            if key_of(text) == key:
                return text
    return f"No text of this conversation has the key {key!r}: copy it from the note."


def _schemas(request: ModelRequest[Any]) -> Iterator[Any]:
    """JSON schemas that travel with a request: tools, and the form of a structured answer."""
    for offered in request.tools:
        yield offered if isinstance(offered, dict) else convert_to_openai_tool(offered)
    form: Any = request.response_format
    if isinstance(form, AutoStrategy | ProviderStrategy | ToolStrategy):
        form = form.schema
    if form is not None:
        yield form if isinstance(form, dict) else TypeAdapter(form).json_schema()


def _latest_request(messages: Sequence[BaseMessage]) -> int:
    """Place of the last human message, -1 if there is none."""
    return max((i for i, m in enumerate(messages) if isinstance(m, HumanMessage)), default=-1)


def _request_text(messages: Sequence[BaseMessage]) -> str:
    """Text of the last human message; "" if there is none, which the core refuses."""
    place = _latest_request(messages)
    return "" if place < 0 else "\n".join(texts(messages[place]))

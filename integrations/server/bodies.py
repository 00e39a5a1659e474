"""The bodies of requests, as OpenAI's clients send them; what is not supported is refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from ...core.errors import PromptError
from ...core.types import Passage
from .extension import Extension

_IGNORED = frozenset(
    {
        "user",
        "metadata",
        "store",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_retention",
    }
)
"""Fields that say who asks and what OpenAI keeps; they change no answer."""

_ONLY: Mapping[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "function_call": ("none",),
    "functions": ([],),
    "reasoning_effort": (),
    "verbosity": (),
    "web_search_options": (),
}
"""Fields of OpenAI's that have to be left out, or to have one of these values."""

Tokens = Annotated[int, Field(ge=1, le=2**31)]


class StreamOptions(BaseModel):
    """What a stream tells beside the text."""

    model_config = ConfigDict(extra="ignore")

    include_usage: bool = False


class Body(BaseModel):
    """What chat and text completions share."""

    model_config = ConfigDict(extra="forbid")

    model: str | None = None
    max_tokens: Tokens | None = None
    temperature: Annotated[float, Field(ge=0.0, le=100.0)] | None = None
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0.0, le=1.0)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0.0, le=100.0)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: dict[str, Any] | None = None
    documents: list[str | dict[str, Any]] | None = None
    draftsieve: Extension = Extension()

    @model_validator(mode="before")
    @classmethod
    def _supported(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        for name in values.keys() & _ONLY.keys():
            value = values[name]
            if value is not None and not any(_same(value, only) for only in _ONLY[name]):
                raise PydanticCustomError(
                    "unsupported",
                    "This server does not support {param}: leave it out.",
                    {"param": name},
                )
        unread = _ONLY.keys() | _IGNORED
        return {name: value for name, value in values.items() if name not in unread}

    @model_validator(mode="after")
    def _streams(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise PydanticCustomError(
                "unsupported",
                "stream_options belong to a stream: set stream to true.",
                {"param": "stream_options"},
            )
        return self

    @property
    def decoding(self) -> dict[str, Any]:
        """Options of the decoding, where the request says something."""
        stop = [self.stop] if isinstance(self.stop, str) else self.stop
        given = {
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": None if self.top_k is None else max(0, self.top_k),
            "min_p": self.min_p,
            "repetition_penalty": self.repetition_penalty,
            "seed": None if self.seed is None else self.seed % 2**63,
            "stop": stop,
        }
        return {name: value for name, value in given.items() if value is not None}


class Message(BaseModel):
    """One turn. What clients send beside these fields (annotations, refusal, ...) is not read."""

    model_config = ConfigDict(extra="ignore")

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[dict[str, Any]] | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None


class Function(BaseModel):
    """A function that the model may call."""

    model_config = ConfigDict(extra="ignore")

    name: Annotated[str, Field(min_length=1)]
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Tool(BaseModel):
    """A tool; there are no others than functions."""

    type: Literal["function"] = "function"
    function: Function


class ChatBody(Body):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Tokens | None = None
    tools: list[Tool] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None

    @property
    def decoding(self) -> dict[str, Any]:
        """With the newer name of `max_tokens`."""
        most = self.max_completion_tokens
        return {**super().decoding, **({} if most is None else {"max_tokens": most})}


class CompletionBody(Body):
    """`POST /v1/completions`."""

    prompt: str | list[str]


def passages_of(documents: Sequence[str | Mapping[str, Any]]) -> list[str | Passage]:
    """Documents in the forms of Cohere and of chat templates as passages.

    Args:
        documents: Texts, or mappings with the text under "text", "content", "snippet" or "data"
            (which may be such a mapping itself), and perhaps "id". All else becomes metadata.

    Raises:
        PromptError: One has no text.
    """
    return [_passage(document, index) for index, document in enumerate(documents)]


def _passage(document: str | Mapping[str, Any], index: int) -> str | Passage:
    if isinstance(document, str):
        return document
    data = document.get("data")
    inner = {**document, **data} if isinstance(data, Mapping) else document
    name = next((n for n in _TEXTS if isinstance(inner.get(n), str)), None)
    if name is None:
        raise PromptError(
            f'documents[{index}] has no text: give a string, or an object with "text".'
        )
    rest = {key: value for key, value in inner.items() if key not in (name, "id", "data")}
    key = document.get("id")
    return Passage(inner[name], None if key is None else str(key), rest)


_TEXTS = ("text", "content", "snippet", "data")


def _same(value: Any, other: Any) -> bool:
    """Equality in which false is not 0."""
    return value == other and isinstance(value, bool) == isinstance(other, bool)

"""The base of all options, and how wrong ones are told: a `ConfigError` of full sentences."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from .errors import ConfigError


class Options(BaseModel):
    """Base of all options: immutable, unknown names refused.

    Raises:
        ConfigError: An option is unknown or invalid. Where options are a part of another pydantic
            model, or given to `model_validate`, pydantic's own error holds it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    def __init__(self, **options: Any) -> None:
        with told_as_config_errors(type(self)):
            super().__init__(**options)


@contextmanager
def told_as_config_errors(owner: type[BaseModel]) -> Iterator[None]:
    """Turn pydantic's errors inside the block into one `ConfigError`.

    Args:
        owner: Whose options are checked, for the message.
    """
    try:
        yield
    except ValidationError as error:
        found = error.errors()
        wanted = [each["ctx"]["class_name"] for each in found if each["type"] == "model_type"]
        told = dict.fromkeys(_sentence(owner, each, wanted) for each in found)
        raise ConfigError(" ".join(told)) from error


def _sentence(owner: type[BaseModel], error: Mapping[str, Any], wanted: Sequence[str]) -> str:
    """One of pydantic's findings as a sentence with the option's name and value."""
    name, kind = str(error["loc"][0]) if error["loc"] else "", error["type"]
    if kind == "value_error":  # raised by a validator of ours, a sentence already
        return str(error["ctx"]["error"])
    if kind == "extra_forbidden":
        known = sorted(owner.model_fields)
        close = get_close_matches(name, known, 1) or known
        return f"{owner.__name__} has no option {name!r}: it has {', '.join(close)}."
    if kind == "missing":
        return f"{owner.__name__} needs the option {name!r}."
    message = str(error["msg"])
    if kind == "model_type":  # one finding for each class of a union
        message = f"input should be {' or '.join(wanted)}"
    return f"{owner.__name__}({name}={error['input']!r}): {message[:1].lower()}{message[1:]}."


def named(value: object) -> str | None:
    """How an object of the caller's is written out, with as much as tells it from others.

    Args:
        value: Such as a function or a model.

    Returns:
        None and paths as they are; else a name in angle brackets, with a model's own name, or a
        place in memory where no name tells it.
    """
    if value is None or isinstance(value, str | Path):
        return None if value is None else str(value)
    owner = getattr(value, "__self__", value)
    kind: Any = value if hasattr(value, "__qualname__") else type(value)
    name = f"{kind.__module__}.{kind.__qualname__}"
    models = (getattr(owner, field, None) for field in ("model_name", "model"))
    model = next((it for it in models if isinstance(it, str) and it != "unknown"), None)
    if model is not None:
        return f"<{name} {model}>"
    told = kind is value is owner and "<" not in name  # a function or class of a module
    return f"<{name}>" if told else f"<{name} at {id(owner):#x}>"

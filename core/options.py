"""The base of all options, and how wrong ones are told: a `ConfigError` of full sentences."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
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

"""What a request may say beyond OpenAI's interface: the `draftsieve` object."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from ...core.config import Method, OnError
from ...core.errors import ConfigError
from .._shared.methods import METHODS, STAGES, build_method, find_option

_FILES = ("embedder", "head_weights")  # options that name files and models
_NO_FILES = (None, "auto", "calibrated")


class Extension(BaseModel):
    """How the documents of one request are compressed.

    Other names are options of the method, as `draftsieve ask --help-options` lists them; with
    "speckv-pc" those that both stages have are named "specpc.NAME" or "speckv.NAME".

    Args:
        method: "specpc" shortens the prompt, "speckv" evicts from the target's cache, "speckv-pc"
            does both, "none" nothing.
        preset: Which options others are changed from.
        ratio: A share of the documents' tokens.
        capacity: A size in tokens or entries, in place of a share.
        timeout: Seconds after which the request fails; the server has an upper bound.
        on_error: "original" or "raise".
    """

    model_config = ConfigDict(extra="allow", frozen=True)

    method: Literal["specpc", "speckv", "speckv-pc", "none"] | None = None
    preset: str | None = None
    ratio: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    capacity: Annotated[int, Field(ge=1)] | None = None
    timeout: Annotated[float, Field(gt=0.0)] | None = None
    on_error: OnError | None = None

    @property
    def asks(self) -> bool:
        """Whether it says anything about the method."""
        return bool(self.model_fields_set - {"timeout", "on_error"})


def method_of(asked: Extension, *, has_draft: bool) -> Method | None:
    """The method that a request asks for.

    Args:
        asked: Where it names no method, that is "specpc", or "none" without a draft.
        has_draft: Whether there is one.

    Raises:
        ConfigError: An option does not exist, has no such value, or names a file.
    """
    stages = METHODS[asked.method or ("specpc" if has_draft else "none")]
    if asked.ratio is not None and asked.capacity is not None:
        raise ConfigError("ratio and capacity exclude each other: give one of them.")
    return build_method(
        stages,
        _options(asked.model_extra or {}, stages),
        preset=asked.preset,
        ratio=asked.ratio,
        capacity=asked.capacity,
    )


def _options(given: Mapping[str, Any], stages: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """Options by stage; files and models of the server are not for requests to name."""
    found: dict[str, dict[str, Any]] = {stage: {} for stage in STAGES}
    for path, value in given.items():
        stage, name = find_option(path, stages, f"draftsieve.{path}")
        if name in _FILES and value not in _NO_FILES:
            raise ConfigError(
                f"draftsieve.{path}: a request may name no file or model of the server: leave it "
                "out, or set it where the server is started."
            )
        found[stage][name] = value
    return found

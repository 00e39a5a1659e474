"""What a server is started with: from flags, the environment or a TOML file."""

from __future__ import annotations

import ipaddress
import json
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, SecretStr, model_validator
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
    TomlConfigSettingsSource,
)

from ...core.config import OnError
from ...core.errors import ConfigError
from ...core.options import told_as_config_errors
from .extension import Extension

Count = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(gt=0.0)]


class Settings(BaseSettings):
    """Options of a server. The environment gives each as DRAFTSIEVE_NAME, mappings as JSON.

    Args:
        target: The model that answers, as for `Engine.load`.
        draft: The model that reads first; "none" for none.
        gguf_file: Name of the target's GGUF file in its folder or hub repository.
        draft_gguf_file: The same for the draft.
        revision: Branch, tag or commit of the target's hub repository.
        draft_revision: Of the draft's.
        attn_implementation: Attention of the target: eager, sdpa, ...
        draft_attn_implementation: Of the draft.
        bits: Quantise the target to 4 or 8 bits.
        device: auto, cpu, cuda, ...
        draft_device: The same for the draft; by default the target's.
        dtype: auto, float32, bfloat16, ...
        template_options: Passed to the chat templates.
        store: Folder of documents that the draft has read before (`draftsieve index`); no request
            adds to it.
        upstream: Address of a server that speaks OpenAI's interface: requests go on to it with
            shorter documents and tool results, and no target is loaded. Clients' own keys go to it;
            ours, if there are some, come as `x-draftsieve-key`.
        upstream_tokens: Most tokens that the upstream reads; None if that is not known.
        min_tokens: Shorter texts go on to the upstream whole.
        model_names: Names that requests may call the target, beside its own; "*" for any.
        method: How documents are compressed where a request says nothing, in the form of its
            `draftsieve` object, such as {"method": "specpc", "ratio": 0.35}.
        max_tokens: Most tokens of an answer where a request says nothing.
        on_error: "original" answers from whole documents where their compression fails; "raise"
            refuses the request.
        timeout: Seconds after which a request fails, time in the queue included; a request may
            ask for fewer.
        max_requests: Requests that are answered or wait; more are sent away with 429.
        max_body_bytes: Largest body of a request.
        max_documents: Most documents of a request.
        originals: SQLite file of the whole texts behind shortened ones (`/v1/retrieve`); by default
            they are kept in memory.
        originals_bytes: Most bytes of them; those unused for longest leave first.
        originals_seconds: How long one stays after it was last used.
        host: Address to listen at.
        port: Port to listen at; 0 for a free one.
        api_key: A key that requests must carry, as OpenAI's do.
        api_keys: Several keys by the names of their tenants, whose texts never meet.
        public_without_key: Listen at an address that others reach, without a key.
        shutdown_seconds: How long running answers may take once the server is told to end.
        log_format: "json" or "text", a line a request on stderr, without any text of it.

    Raises:
        ConfigError: An option is unknown or invalid, or the server would be open to everybody.
    """

    model_config = SettingsConfigDict(env_prefix="DRAFTSIEVE_", extra="forbid", frozen=True)

    target: str | None = None
    draft: str | None = None
    gguf_file: str | None = None
    draft_gguf_file: str | None = None
    revision: str | None = None
    draft_revision: str | None = None
    attn_implementation: str | None = None
    draft_attn_implementation: str | None = None
    bits: Literal[4, 8] | None = None
    device: str = "auto"
    draft_device: str | None = None
    dtype: str = "auto"
    template_options: dict[str, Any] | None = None
    store: Path | None = None
    upstream: str | None = None
    upstream_tokens: Count | None = None
    min_tokens: Annotated[int, Field(ge=0)] = 64
    model_names: tuple[str, ...] = ()
    method: Extension = Extension()
    max_tokens: Count = 512
    on_error: OnError = "original"
    timeout: Seconds = 300.0
    max_requests: Count = 64
    max_body_bytes: Count = 8 * 1024 * 1024
    max_documents: Count = 1000
    originals: Path | None = None
    originals_bytes: Count = 256 * 1024 * 1024
    originals_seconds: Seconds = 86_400.0
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    api_key: SecretStr | None = None
    api_keys: dict[str, SecretStr] = Field(default_factory=dict)
    public_without_key: bool = False
    shutdown_seconds: Count = 30
    log_format: Literal["json", "text"] = "json"

    def __init__(self, **options: Any) -> None:
        try:
            with told_as_config_errors(type(self)):
                super().__init__(**options)
        except (SettingsError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"The server's settings cannot be read: {error}") from error

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Flags win over the environment, and that over the file."""
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls)

    @model_validator(mode="after")
    def _keys(self) -> Settings:
        if not all(key.get_secret_value().strip() for key in self.keys.values()):
            raise ValueError("An API key is empty: give it some characters, or leave it out.")
        if len({key.get_secret_value() for key in self.keys.values()}) < len(self.keys):
            raise ValueError("Two tenants have the same API key: give each its own.")
        return self

    @model_validator(mode="after")
    def _not_open(self) -> Settings:
        if not (self.keys or self.public_without_key or _is_local(self.host)):
            raise ValueError(
                f"host={self.host!r} lets other machines in, and there is no API key: set "
                "DRAFTSIEVE_API_KEY, listen at 127.0.0.1, or allow it with --public-without-key."
            )
        return self

    @model_validator(mode="after")
    def _upstream(self) -> Settings:
        if self.upstream is not None and not self.upstream.startswith(("http://", "https://")):
            raise ValueError(
                f"upstream={self.upstream!r} is no address: give one such as http://localhost:8080."
            )
        if self.upstream is not None and self.target is not None:
            raise ValueError("The upstream answers, so there can be no target: leave it out.")
        return self

    @property
    def keys(self) -> dict[str, SecretStr]:
        """All keys by their tenants; the single one's is called "default"."""
        return {**({} if self.api_key is None else {"default": self.api_key}), **self.api_keys}


def read_settings(config: Path | None = None, **options: Any) -> Settings:
    """Settings from flags, the environment and a file; each wins over the next.

    Args:
        config: A TOML file with the names of `Settings`.
        options: What is given outright.

    Raises:
        ConfigError: The file is not there, or an option is unknown or invalid.
    """
    if config is None:
        return Settings(**options)
    if not config.is_file():
        raise ConfigError(f"There is no file {str(config)!r}: give a TOML file with settings.")

    class _WithFile(Settings):
        model_config = SettingsConfigDict(toml_file=config)

    _WithFile.__name__ = Settings.__name__
    return _WithFile(**options)


def as_toml(settings: Settings) -> str:
    """Settings as a file; keys are hidden, what is unset is a comment."""
    values = settings.model_dump(mode="json", exclude_defaults=False)
    values["method"] = {k: v for k, v in values["method"].items() if v is not None}
    return "\n".join(_lines(values)) + "\n"


def _lines(values: Mapping[str, Any]) -> Iterator[str]:
    for name, value in values.items():
        if value is None:
            yield f"# {name} ="
        elif not isinstance(value, Mapping):
            yield f"{name} = {json.dumps(value, ensure_ascii=False)}"
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield f"\n[{name}]"
            yield from _lines(value)


def _is_local(host: str) -> bool:
    """Whether only this machine reaches an address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False

"""The draft of a retriever: which model, loaded how."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from ..core.compressor import Compressor
from ..core.config import OnError, Quantization
from ..core.options import told_as_config_errors
from ..core.prompt.messages import DEFAULT_SYSTEM


class DraftOptions(BaseModel):
    """Options of everything that retrieves with a draft; the draft is loaded at construction.

    Args:
        model: "builtin:draft", a folder or a hub id of the draft.
        compressor: A loaded compressor, instead of `model`.
        system: The system text that the draft reads in front of the passages; None for none.
        on_error: "original" goes on with what the base retriever found when the draft fails, and
            logs a warning; "raise" raises.
        quantization: Weights in 4 or 8 bits.
        device: "auto", "cpu", "cuda", ...
        dtype: "auto", "float32", "bfloat16", ...
        template_options: Passed to the draft's chat template.
        trust_remote_code: Run code that a hub repository carries.
        progress: Show progress bars while loading.

    Raises:
        ModelNotFoundError: There is no such model.
        ConfigError: An option is unknown or invalid.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid")

    model: str = "builtin:draft"
    compressor: Compressor | None = Field(default=None, exclude=True, repr=False)
    system: str | None = DEFAULT_SYSTEM
    on_error: OnError = "original"
    quantization: Quantization | None = None
    device: str = "auto"
    dtype: str = "auto"
    template_options: Mapping[str, Any] | None = None
    trust_remote_code: bool = False
    progress: bool = True

    def __init__(self, **options: Any) -> None:
        with told_as_config_errors(type(self)):
            super().__init__(**options)
        if self.compressor is not None:
            self.model = self.compressor.model.name_or_path or self.model
            return
        self.compressor = Compressor.load(
            self.model,
            quantization=self.quantization,
            device=self.device,
            dtype=self.dtype,
            template_options=self.template_options,
            trust_remote_code=self.trust_remote_code,
            progress=self.progress,
        )

    @property
    def loaded(self) -> Compressor:
        """The draft; it is there from construction on."""
        assert self.compressor is not None
        return self.compressor

"""The options of the components that need a draft alone."""

from __future__ import annotations

from typing import Any

from pydantic import PositiveFloat

from ...core.config import SpecPC
from ...retrievers.options import DraftOptions


class SieveOptions(DraftOptions):
    """Options of everything that compresses with a draft; see `DraftOptions` for the others.

    Args:
        method: How much is kept, and of what.
        timeout: Seconds after which a request fails; None for no limit.
    """

    method: SpecPC = SpecPC.preset("2026-11", ratio=0.3)
    timeout: PositiveFloat | None = None

    def call_options(self) -> dict[str, Any]:
        """What every core call is given, beside the question, the texts and the method."""
        return {"system": self.system, "on_error": self.on_error, "timeout": self.timeout}

"""What can go wrong with a folder of documents."""

from __future__ import annotations

from ..core.errors import DraftSieveError


class FolderError(DraftSieveError, ValueError):
    """A folder has no documents that can be read."""


class DocumentError(DraftSieveError, ValueError):
    """One document cannot be read."""

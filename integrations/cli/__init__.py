"""The command `draftsieve`."""

from .entry import main

__all__ = ["main"]

"""Drafters: each proposes a tree of likely next tokens, which the target verifies in one pass."""

from .tree import EMPTY, Drafter, TokenTree

__all__ = ["EMPTY", "Drafter", "TokenTree"]

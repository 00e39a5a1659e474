"""Retrievers that find passages before the draft sieves them."""

from .bm25 import Bm25Index
from .folder import FolderError, paragraphs, read_folder

__all__ = ["Bm25Index", "FolderError", "paragraphs", "read_folder"]

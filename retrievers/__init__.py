"""Retrievers that find passages before the draft sieves them."""

from .bm25 import Bm25Index
from .chunks import paragraphs
from .errors import FolderError
from .folder import Skipped, read_folder

__all__ = ["Bm25Index", "FolderError", "Skipped", "paragraphs", "read_folder"]

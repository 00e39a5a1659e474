"""Passages that the draft has read once, and questions over them."""

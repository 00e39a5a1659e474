"""Retrievers that find passages before the draft sieves them."""

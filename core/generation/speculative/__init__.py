"""Lossless faster decoding: drafts are verified as a tree in one pass."""

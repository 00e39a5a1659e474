"""Threads, time limits and batches of requests."""

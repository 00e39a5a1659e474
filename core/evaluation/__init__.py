"""Measuring what compression keeps: data, baselines of equal size, survival, intervals."""

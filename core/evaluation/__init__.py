"""Measuring what compression costs: tasks, data, methods of equal size, runs, intervals."""

"""What was read once, kept for the next time: arrays by key, on disk or in memory."""

"""The framework-free engine: prompts, draft reading, selection, decoding."""

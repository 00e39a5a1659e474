"""A conversation kept within a budget, text by text."""

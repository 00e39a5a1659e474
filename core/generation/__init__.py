"""A request on its way through the target: prepare, evict while reading, decode."""

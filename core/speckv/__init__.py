"""SpecKV: the draft's lookahead chooses which KV entries of the target stay."""

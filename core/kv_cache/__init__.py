"""KV caches that hold fewer entries than tokens went by, alone, in batches and at rest."""

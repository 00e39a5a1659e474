"""The bundled pair of small models (see MODEL_CARD.md)."""

"""What tells apart engines that may answer differently, whatever their models are called."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from transformers import PreTrainedModel

from ...core.engine import Engine
from ...core.models.loading import fingerprint


def identity(engine: Engine) -> dict[str, Any]:
    """Describe an engine's models in plain values.

    Args:
        engine: Two engines of the same models loaded alike are described alike.

    Returns:
        "target" and "draft" (None, or fingerprint of the weights, their type, quantisation, and
        a digest of the chat template), "store" (None, or how it keeps what it holds) and
        "template_options".
    """
    reader = engine.compressor
    store = reader and reader.draft.store
    return {
        "target": _model(engine.target, engine.tokenizer),
        "draft": engine.draft and _model(engine.draft, reader and reader.tokenizer),
        "store": store and store.described,
        "template_options": engine.template_options,
    }


def _model(model: PreTrainedModel, tokenizer: Any) -> dict[str, Any]:
    quantization = getattr(model.config, "quantization_config", None)
    template = json.dumps(getattr(tokenizer, "chat_template", None), sort_keys=True)
    return {
        "weights": fingerprint(model),
        "dtype": str(model.dtype),
        "quantization": str(quantization and getattr(quantization, "to_dict", dict)()),
        "template": hashlib.sha256(template.encode()).hexdigest()[:16],
    }

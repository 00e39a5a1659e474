"""The Hugging Face hub: what can be a name there, and whether it can be asked right now."""

from __future__ import annotations

from huggingface_hub import constants
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import get_session, validate_repo_id  # type: ignore[attr-defined]

PATIENCE = 3.0  # seconds until a hub that does not answer counts as out of reach
_FILES = (".gguf", ".safetensors", ".bin", ".pt", ".pth", ".json", ".onnx")


def no_hub_id(name: str) -> str | None:
    """Why a name cannot be one of a hub repository; None if it can."""
    if name.endswith(_FILES):
        return "it names a file; give the folder that holds it"
    try:
        validate_repo_id(name)
    except HFValidationError:
        return 'hub ids look like "owner/name"'
    return None


def hub_obstacle() -> str | None:
    """Why the hub cannot be asked, found out before anything waits for it; None if it can.

    Its own client would try for half a minute, for each file of a model, and even where all files
    are in its cache.
    """
    if constants.is_offline_mode():
        return "HF_HUB_OFFLINE is set"
    try:
        get_session().head(constants.ENDPOINT, timeout=PATIENCE)
    except Exception as error:  # noqa: BLE001, whichever HTTP library the hub's client uses
        return f"{constants.ENDPOINT} cannot be reached: {str(error) or type(error).__name__}"
    return None

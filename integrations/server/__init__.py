"""A server that speaks OpenAI's interface; documents in requests are compressed by a draft."""

from ...retrievers.extras import require

for _module in ("fastapi", "uvicorn", "prometheus_client", "pydantic_settings"):
    require(_module, "server", "draftsieve.integrations.server")

from .app import create_app  # noqa: E402
from .settings import Settings, read_settings  # noqa: E402

__all__ = ["Settings", "create_app", "read_settings"]

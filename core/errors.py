"""Every error draftsieve raises on purpose; each message says what happened and what to do."""

from __future__ import annotations


class DraftSieveError(Exception):
    """Base class of all draftsieve errors."""


class ConfigError(DraftSieveError, ValueError):
    """An option does not exist."""


class PromptError(DraftSieveError, ValueError):
    """The request itself cannot be read: an empty question, a template that drops the text, ..."""


class BudgetError(DraftSieveError, ValueError):
    """The budget cannot hold what must be kept (system text, question, template)."""


class ModelError(DraftSieveError, ValueError):
    """A model cannot do what is asked of it (unsupported attention, missing draft, ...)."""


class ModelNotFoundError(ModelError, FileNotFoundError):
    """A model id or folder does not exist or cannot be reached."""


class MissingExtraError(DraftSieveError, ImportError):
    """An optional dependency is not installed; the message names the pip command."""


class GrammarError(DraftSieveError, ValueError):
    """A grammar, JSON schema or choice of tools cannot be used."""


class StoreError(DraftSieveError):
    """A store cannot be used: made with something else, damaged, read-only, disk full, ..."""


class RequestTimeoutError(DraftSieveError, TimeoutError):
    """A request has used up its `timeout`."""


class OutOfMemoryError(DraftSieveError, MemoryError):
    """The machine ran out of memory; the message names the models' footprints.

    Args:
        message: What to tell.
        work: What was being done, such as "reading a prompt of 8,000 tokens".
    """

    def __init__(self, message: str, work: str = "") -> None:
        super().__init__(message)
        self.work = work


NO_DRAFT = (
    "This engine has no draft model, which the method needs. Load one, as in "
    'Engine.load(target="builtin:target", draft="builtin:draft"), or use method=None.'
)

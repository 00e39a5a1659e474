"""Optional dependencies: found, or an error that names the pip command."""

from __future__ import annotations

from importlib.util import find_spec

from ..core.errors import MissingExtraError


def require(module: str, extra: str, user: str) -> None:
    """Check that an optional dependency is installed, without importing it.

    Args:
        module: Dotted name of the module that is needed.
        extra: Extra of this package that brings it.
        user: What needs it, for the message.

    Raises:
        MissingExtraError: The module is not installed.
    """
    parts = module.split(".")
    names = [".".join(parts[: end + 1]) for end in range(len(parts))]
    if not all(find_spec(name) is not None for name in names):
        raise MissingExtraError(
            f'{user} needs {module}, which is not installed: pip install "draftsieve[{extra}]"'
        )

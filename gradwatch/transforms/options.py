"""What the options of several transforms have in common."""

from __future__ import annotations

from typing import Literal, TypeAlias

from gradwatch.errors import ConfigurationError

OnFailure: TypeAlias = Literal["raise", "disable"]
"""What happens to training when the transform itself fails: it stops with the error, or goes on without."""


def check_positive(**values: object) -> None:
    """Raise unless every value is a positive number.

    Raises:
        ConfigurationError: one is not.
    """
    for name, value in values.items():
        if not isinstance(value, int | float) or not value > 0:
            raise ConfigurationError(f"{name} must be a positive number, got {value!r}")


def check_share(**values: object) -> None:
    """Raise unless every value lies in [0, 1).

    Raises:
        ConfigurationError: one does not.
    """
    for name, value in values.items():
        if not isinstance(value, int | float) or not 0 <= value < 1:
            raise ConfigurationError(f"{name} must lie in [0, 1), got {value!r}")


def check_on_failure(value: object) -> None:
    """Raise unless it is one of the two words.

    Raises:
        ConfigurationError: it is not.
    """
    if value not in ("raise", "disable"):
        raise ConfigurationError(f"on_failure must be 'raise' or 'disable', got {value!r}")

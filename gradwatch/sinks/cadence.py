"""Which steps are written where not all are."""

from __future__ import annotations

from dataclasses import dataclass

from gradwatch.errors import ConfigurationError
from gradwatch.records import Snapshot


@dataclass(frozen=True, slots=True)
class Cadence:
    """Every `log_every`-th step, beginning with step `first`."""

    log_every: int
    first: int = 0

    def __post_init__(self) -> None:
        given: object = self.log_every
        if not isinstance(given, int) or given < 1:
            raise ConfigurationError(f"log_every must be a whole number of at least 1, got {self.log_every!r}")

    def is_due(self, snapshot: Snapshot) -> bool:
        """Whether a step is written."""
        return (snapshot.step - self.first) % self.log_every == 0

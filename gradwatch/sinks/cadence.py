"""Which steps are written where not all are."""

from __future__ import annotations

from dataclasses import dataclass

from gradwatch.errors import ConfigurationError
from gradwatch.records import Snapshot


@dataclass(frozen=True, slots=True)
class Cadence:
    """Every `log_every`-th step."""

    log_every: int

    def __post_init__(self) -> None:
        given: object = self.log_every
        if not isinstance(given, int) or given < 1:
            raise ConfigurationError(f"log_every must be a whole number of at least 1, got {self.log_every!r}")

    def is_due(self, snapshot: Snapshot, *, times: int = 1) -> bool:
        """Whether a step is written; `times` thins once more."""
        return snapshot.step % (self.log_every * times) == 0

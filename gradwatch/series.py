"""Bounded memory of one number a step, or of one a tensor."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gradwatch.records import Floats


@dataclass(slots=True)
class Thinned:
    """At most `limit` values, evenly spread over a run of any length."""

    limit: int = 256
    values: list[float] = field(default_factory=list)
    _stride: int = 1
    _seen: int = 0

    def append(self, value: float) -> None:
        """Take every n-th value, n being one at first; drop every second one and double n when it is full."""
        if self._seen % self._stride == 0:
            self.values.append(value)
            if len(self.values) > self.limit:
                self.values = self.values[::2]
                self._stride *= 2
        self._seen += 1

    def halfway(self) -> float | None:
        """Return the value of the step that is now half of the run ago."""
        return self.values[len(self.values) // 2] if len(self.values) > 2 else None

    def state(self) -> list[object]:
        """Return what `restore` takes."""
        return [list(self.values), self._stride, self._seen]

    def restore(self, state: list[Any]) -> None:
        """Go on from what `state` returned."""
        self.values, self._stride, self._seen = list(state[0]), int(state[1]), int(state[2])


@dataclass(slots=True, eq=False)
class Runs:
    """How long a condition has held for each tensor, now and at most so far: critics and experts have their rhythm."""

    current: Floats
    longest: Floats

    def update(self, holds: np.ndarray[Any, np.dtype[np.bool_]], ended: np.ndarray[Any, np.dtype[np.bool_]]) -> None:
        """Count one step; a run that ended enters the record, one that merely pauses does not."""
        self.longest = np.where(ended, np.maximum(self.longest, self.current), self.longest)
        self.current = np.where(holds, self.current + 1, 0)

    def unusual(self) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """True where the run is more than twice the longest one before it."""
        beyond: np.ndarray[Any, np.dtype[np.bool_]] = self.current > 2 * self.longest
        return beyond

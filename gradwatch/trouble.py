"""When a run is in trouble, from its losses and gradient norms: what backoff and rollback wait for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import numpy as np

from gradwatch.records import Alert, Snapshot

RING = 100
DELAY = 10
"""Steps that the reference stays behind: trouble must not become its own reference."""
FAST, SLOW = 1.0, 0.25
"""Share by which a loss must exceed the reference at once, and its running mean for `SLOW_STEPS`; a sum and no factor,
for losses may be negative."""
SLOW_STEPS = 5
FAST_FLOOR, SLOW_FLOOR = 0.3, 0.1
"""Share of the first loss that a rise must reach: a loss that is nearly zero moves by factors and means nothing."""
NORM_FACTOR, NORM_STEPS = 8.0, 3
ABOVE_LEVEL = 2.0
"""Times the largest usual norm that the run had: gradients of a converged run move by decades below it."""
NONFINITE, NONFINITE_WINDOW = 2, 10
KEPT = 20


@dataclass(slots=True)
class Trouble:
    """Remembers accepted losses and norms; `update` says what is wrong, or None."""

    grace: int = 50
    """Steps without a judgement: the first fall of the loss, and warm-up."""
    _first: list[float] = field(default_factory=list, init=False)
    _level: float = field(default=0.0, init=False)
    _losses: list[float] = field(default_factory=list, init=False)
    _norms: list[float] = field(default_factory=list, init=False)
    _mean: float | None = field(default=None, init=False)
    _steps: int = field(default=0, init=False)
    _slow_for: int = field(default=0, init=False)
    _large_for: int = field(default=0, init=False)
    _bad: list[int] = field(default_factory=list, init=False)

    def update(self, snapshot: Snapshot, alerts: tuple[Alert, ...]) -> str | None:
        """Take in one step."""
        self._steps += 1
        found = next((a for a in alerts if a.kind in ("exploding", "spike") and a.severity != "info"), None)
        reason = self._nonfinite(snapshot)
        if reason is None and self._steps > self.grace:
            reason = self._loss(snapshot.loss) or self._norm(snapshot)
        if reason is None:
            self._accept(snapshot)
        return reason if found is None else found.message

    def begin_afresh(self) -> None:
        """After a change, compare with what was accepted last and never with the best there was."""
        self._losses, self._norms = self._losses[-KEPT:], self._norms[-KEPT:]
        self._slow_for = self._large_for = 0
        self._mean, self._bad = None, []

    def state(self) -> Mapping[str, Any]:
        """Return what `restore` takes."""
        return {name: getattr(self, name) for name in _REMEMBERED}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` returned."""
        for name in _REMEMBERED:
            setattr(self, name, state[name])

    def _nonfinite(self, snapshot: Snapshot) -> str | None:
        handled = snapshot.skipped and snapshot.loss_scale is not None and not snapshot.loss_scale < 1
        loss_is_bad = snapshot.loss is not None and not np.isfinite(snapshot.loss)
        if (snapshot.bad.any() or loss_is_bad) and not handled:
            self._bad = [*self._bad, self._steps]
        self._bad = [step for step in self._bad if self._steps - step < NONFINITE_WINDOW]
        if len(self._bad) < NONFINITE or self._bad[-1] != self._steps:
            return None
        return f"{len(self._bad)} of the last {NONFINITE_WINDOW} steps were not finite"

    def _loss(self, loss: float | None) -> str | None:
        past = self._losses[:-DELAY]
        if loss is None or not np.isfinite(loss) or len(past) < DELAY:
            return None
        reference = median(past)
        noise = 1.4826 * median(abs(value - reference) for value in past)
        first = abs(median(self._first))
        self._mean = loss if self._mean is None else self._mean + (loss - self._mean) * 2 / (SLOW_STEPS + 1)
        slow = self._mean > reference + max(SLOW * abs(reference), 4 * noise, SLOW_FLOOR * first)
        self._slow_for = self._slow_for + 1 if slow else 0
        if loss > reference + max(FAST * abs(reference), 6 * noise, FAST_FLOOR * first):
            return f"the loss is {loss:.4g}, usually {reference:.4g}"
        if self._slow_for >= SLOW_STEPS:
            return f"the loss has risen from {reference:.4g} to {self._mean:.4g}"
        return None

    def _norm(self, snapshot: Snapshot) -> str | None:
        past = [norm for norm in self._norms[:-NORM_STEPS] if norm > 0]
        if not snapshot.global_norm or len(past) < DELAY:
            return None
        usual = median(past)
        self._level = max(self._level, usual)
        large = snapshot.global_norm > max(NORM_FACTOR * usual, ABOVE_LEVEL * self._level)
        large &= snapshot.loss is None or not self._is_falling(snapshot.loss)
        self._large_for = self._large_for + 1 if large else 0
        if self._large_for < NORM_STEPS:
            return None
        return (
            f"the gradient norm has been {snapshot.global_norm / usual:.3g} times its usual size for {NORM_STEPS} steps"
        )

    def _is_falling(self, loss: float) -> bool:
        """Gradients grow too when a network begins to learn."""
        return len(self._losses) > DELAY and loss < median(self._losses[-2 * DELAY :])

    def _accept(self, snapshot: Snapshot) -> None:
        if snapshot.loss is not None and np.isfinite(snapshot.loss):
            self._losses = [*self._losses[-RING + 1 :], snapshot.loss]
            self._first = [*self._first, snapshot.loss] if len(self._first) < DELAY else self._first
        if snapshot.global_norm is not None and np.isfinite(snapshot.global_norm) and not snapshot.bad.any():
            self._norms = [*self._norms[-RING + 1 :], snapshot.global_norm]


_REMEMBERED = ("_first", "_level", "_losses", "_norms", "_mean", "_steps", "_slow_for", "_large_for", "_bad")

"""Puts on record what the transforms did: skipped steps, clipping that sets in, and clipping that does not end."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from gradwatch.detectors.stalled import is_adaptive
from gradwatch.errors import logger
from gradwatch.records import Intervention, Snapshot

WINDOW = 100
"""Steps over which the clip rate is taken."""
MOSTLY = 0.5
"""Clip rate above which a clipper is no protection against outliers any more."""
QUIET = 50
"""Unclipped steps after which the next clipped one is news again."""


@dataclass(slots=True, eq=False)
class ChangeLog:
    """Follows the transforms of one optimizer."""

    _factors: list[float] = field(default_factory=list, init=False)
    _unclipped: int = field(default=QUIET, init=False)
    _said: bool = field(default=False, init=False)
    _both: bool = field(default=False, init=False)
    _rearmed: dict[str, int] = field(default_factory=dict, init=False)

    @property
    def clip_rate(self) -> float | None:
        """Share of the newest steps at which a transform clipped; None without any."""
        return sum(factor < 1 for factor in self._factors) / len(self._factors) if self._factors else None

    def update(self, snapshot: Snapshot) -> Iterator[Intervention]:
        """Take in one step; yield what is to be put on record."""
        if snapshot.vetoed:
            before, after = snapshot.global_norm or 0.0, 0.0
            why = "the gradients are not finite" if snapshot.bad.any() else "loss or gradient norm are outliers"
            yield _made(snapshot, "skip", why, before, after)
        yield from self._new_levels(snapshot)
        factors = [value for name, value in snapshot.factors.items() if not name.startswith("DryRun(")]
        if factors and not snapshot.skipped:
            yield from self._clipping(snapshot, min(factors))
            self._announce_both(snapshot)

    def _clipping(self, snapshot: Snapshot, factor: float) -> Iterator[Intervention]:
        self._factors = [*self._factors[-WINDOW + 1 :], factor]
        sets_in = factor < 1 and self._unclipped >= QUIET
        self._unclipped = 0 if factor < 1 else self._unclipped + 1
        if sets_in and snapshot.global_norm is not None:
            names = ", ".join(name for name, value in snapshot.factors.items() if value < 1)
            after = snapshot.clipped_norm if snapshot.clipped_norm is not None else snapshot.global_norm * factor
            yield _made(snapshot, "clip", f"{names} sets in", snapshot.global_norm, after)
        rate = self.clip_rate or 0.0
        if len(self._factors) == WINDOW and rate > MOSTLY and not self._said:
            self._said = True
            yield _made(snapshot, "clip_rate", self._pressure(snapshot, rate), 1.0, sum(self._factors) / WINDOW)
        elif rate < MOSTLY / 2:
            self._said = False

    def _pressure(self, snapshot: Snapshot, rate: float) -> str:
        mean = sum(self._factors) / len(self._factors)
        clipped = f"{100 * rate:.0f} % of the last {WINDOW} steps were clipped"
        if is_adaptive(snapshot.optimizer_facts.name):
            name = snapshot.optimizer_facts.name
            return f"{clipped}; {name} divides by the gradient's size, so that its steps are no smaller for it"
        return f"{clipped}: your learning rate is effectively {100 * (1 - mean):.0f} % lower"

    def _new_levels(self, snapshot: Snapshot) -> Iterator[Intervention]:
        for name, count in snapshot.rearmed.items():
            if count > self._rearmed.get(name, 0):
                self._rearmed[name] = count
                reason = f"{name} had clipped 25 steps in a row and takes this norm for the new level"
                yield _made(snapshot, "rearm", reason, 0.0, snapshot.global_norm or 0.0)

    def _announce_both(self, snapshot: Snapshot) -> None:
        if snapshot.clipped_elsewhere and not self._both:
            self._both = True
            logger.warning(
                "The gradients are clipped by %s and by the loop or the Trainer as well: the smaller norm wins.",
                ", ".join(snapshot.factors),
            )


def _made(snapshot: Snapshot, kind: str, reason: str, before: float, after: float) -> Intervention:
    return Intervention(
        step=snapshot.step, optimizer=snapshot.optimizer, kind=kind, reason=reason, before=before, after=after
    )

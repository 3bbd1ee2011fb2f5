"""Judges recorded runs again: the real detectors, episodes and diagnosis, at the cadence they would have had."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np

from evaluation.training import Run
from gradwatch.cadence import detail_is_due, probe_is_due
from gradwatch.detectors import DEFAULT_DETECTORS, build
from gradwatch.episodes import Episodes
from gradwatch.judge import Judge
from gradwatch.records import Alert, Snapshot

DETAIL_COLUMNS = (
    "mean",
    "std",
    "zero_fraction",
    "row_spread",
    "weight_norm",
    "weight_row_spread",
    "update_norm",
    "update_ratio",
    "lost",
    "moved",
)


@dataclass(frozen=True, kw_only=True)
class Ablation:
    """What is left out of a replay."""

    loss: bool = True
    probe: bool = True


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What was said about one run with one seed."""

    run: Run
    seed: int
    alerts: tuple[Alert, ...]
    """Those of ``warning`` or above, each as it was when it first was that loud."""

    @property
    def early(self) -> tuple[Alert, ...]:
        """Alerts before there was a fault: false ones."""
        return tuple(alert for alert in self.alerts if not self.run.is_sick or alert.step < self.run.onset)

    @property
    def first(self) -> Alert | None:
        """The first alert from the fault on."""
        due = [alert for alert in self.alerts if self.run.is_sick and alert.step >= self.run.onset]
        return due[0] if due else None

    @property
    def latency(self) -> int | None:
        return None if self.first is None else self.first.step - self.run.onset

    @property
    def kind_is_right(self) -> bool:
        return self.first is not None and self.first.kind in self.run.kinds

    @property
    def cause_is_strict(self) -> bool:
        return self.first is not None and self.first.cause == self.run.causes[0]

    @property
    def cause_is_acceptable(self) -> bool:
        return self.first is not None and self.first.cause in self.run.causes


def replay(run: Run, seed: int, snapshots: Iterable[Snapshot], ablation: Ablation) -> Outcome:
    """Feed one recording to a fresh judge for each of its optimizers."""
    judges: dict[str, Judge] = {}
    loud: dict[object, Alert] = {}
    for snapshot in snapshots:
        name = snapshot.optimizer
        if name not in judges:
            judges[name] = Judge(name=name, detectors=build(DEFAULT_DETECTORS), episodes=Episodes())
        judge = judges[name]
        for alert in judge.judge(thinned(snapshot, judge, ablation)):
            if alert.severity != "info" and alert.change != "resolved":
                loud.setdefault(alert.key, alert)
        failed = [part.name for part in (*judge._parts, judge._part, judge._naming) if part.failed]
        if failed:
            raise RuntimeError(f"{run.name}: {failed} failed")
    return Outcome(run=run, seed=seed, alerts=tuple(loud.values()))


def thinned(snapshot: Snapshot, judge: Judge, ablation: Ablation) -> Snapshot:
    """Leave out what would not have been measured at this step."""
    changes: dict[str, object] = {}
    if not detail_is_due(snapshot.step, wanted=judge.wants_detail()):
        nothing = np.full(len(snapshot.names), np.nan)
        changes |= {"detail": False, **dict.fromkeys(DETAIL_COLUMNS, nothing)}
    if not ablation.probe or not probe_is_due(snapshot.step, wanted=judge.wants_probe()):
        changes["modules"] = None
    if not ablation.loss:
        changes["loss"] = None
    return replace(snapshot, **changes) if changes else snapshot

"""Evidence into alerts: adds it up, puts first things first, and raises one alert for one problem."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

import numpy as np

from gradwatch.records import SEVERITIES, Alert, Cause, Change, Evidence, Floats, Severity, Snapshot

LIMIT = 2.0
"""What one step may add at most, and take."""
OPENS, CEILING = 6.0, 12.0
"""An alert opens at 6; the sum is held in [0, 12], so that what is over is over soon.

One quiet step takes back what one loud step gave: a lone spike or dip never opens anything. With independent readings
one unit below the threshold on average and one unit of deviation, an excursion reaches 6 with a chance of about
exp(-12).
"""
HOLD = 4
"""Steps that a finding waits at most for one of higher order that is gathering evidence."""
ARMED = 5
"""Steps for which the detail tier stays dense after evidence was seen, while it gathers"""
FRESH = 50
"""and for so many steps after it sufficed: an alert that stays open costs no more than a healthy run."""
QUIET = 10
"""Observations at zero after which an alert is resolved."""
REMEMBERED = 8
"""Resolved alerts that can still explain what they left behind."""

ORDER: tuple[str, ...] = (
    "nonfinite",
    "accumulation",
    "cleared_early",
    "nothing_arrives",
    "unoptimized",
    "detached",
    "saturated",
    "symmetry",
    "zero",
    "rounding",
    "profile_down",
    "recurrence_down",
    "recurrence_up",
    "profile_up",
    "decay",
    "update_large",
    "growth",
    "gradient_level",
    "loss_up",
    "rate_gone",
    "update_small",
    "dead_units",
    "collapse",
    "spike",
)
"""Symptoms that explain others come first; those of the user's own detectors follow."""

DEBRIS = frozenset({"zero", "profile_down", "dead_units", "saturated"})
"""What an explosion leaves behind: once one is gathering, the explosion is the alert."""
EXPLOSIONS = ("update_large", "growth")
AFTERMATH = 50
"""Steps after an explosion or a spike in which what starves is what it left behind,"""
SHOWS_LATE = frozenset({"collapse", "recurrence_down", "dead_units", "saturated"})
"""and symptoms that are judged late, so that nobody knows when they began."""
AFTER_SPIKE = 3
"""Steps that a spike waits for the explosion it may be the beginning of,"""
ESCALATES = 20
"""and for which an explosion after it is the same problem."""
GATHERING_EXPLOSIONS = ("update_large", "growth", "gradient_level", "loss_up", "profile_up", "nonfinite")
STARVED = frozenset({"vanishing", "dead", "stalled", "saturated"})
"""Kinds that explain one another."""


@dataclass(slots=True, eq=False)
class EvidenceSum:
    """The sum of one symptom, for the whole model or tensor by tensor."""

    total: float | dict[str, float] = 0.0
    first_step: int = -1
    """Step at which the sum left zero."""
    reached: int = -1
    """Step at which it reached `OPENS`; -1 while it is below."""
    zero_for: int = 0
    """Observations in a row at zero."""
    latest: Evidence | None = None
    """The newest positive evidence, and"""
    latest_step: int = -1
    """its step."""

    @property
    def highest(self) -> float:
        """The largest total there is."""
        return self.total if isinstance(self.total, float) else max(self.total.values(), default=0.0)

    def add(self, evidence: Evidence, snapshot: Snapshot) -> None:
        """Add one step's evidence."""
        before = self.highest
        if isinstance(evidence.value, np.ndarray):
            self.total = _added_by_name(self.total, evidence.value, snapshot.names)
            positive = bool((evidence.value > 0).any())
        else:
            total = self.total if isinstance(self.total, float) else 0.0
            self.total = _added(total, float(evidence.value))
            positive = evidence.value > 0
        if evidence.immediate and positive and isinstance(self.total, float):
            self.total = max(self.total, OPENS)
        if positive:
            self.latest, self.latest_step = evidence, snapshot.step
        if before == 0 and self.highest > 0:
            self.first_step = snapshot.step
        if self.highest >= OPENS and self.reached < 0:
            self.reached = snapshot.step
        if self.highest == 0:
            self.reached = -1
        self.zero_for = self.zero_for + 1 if self.highest == 0 else 0

    def tensors(self) -> tuple[str, ...]:
        """Names of the tensors concerned, worst first."""
        if isinstance(self.total, float):
            return () if self.latest is None else self.latest.tensors
        over = [name for name, total in self.total.items() if total >= OPENS]
        return tuple(over)

    def reading(self, names: tuple[str, ...]) -> float:
        """The newest reading; tensor by tensor, that of the first tensor concerned."""
        if self.latest is None:
            return float("nan")
        if isinstance(self.latest.reading, np.ndarray):
            concerned = self.tensors()
            row = names.index(concerned[0]) if concerned and concerned[0] in names else 0
            return float(self.latest.reading[row])
        return float(self.latest.reading)


@dataclass(eq=False)
class Episodes:
    """The open alerts of one optimizer and the evidence that gathers."""

    mute: tuple[tuple[str, str], ...] = ()
    diagnose: Callable[[Alert, Snapshot], tuple[Cause, ...]] = lambda _alert, _snapshot: ()
    """Names the causes of an alert that opens or gets worse."""
    _sums: dict[str, EvidenceSum] = field(default_factory=dict, init=False)
    _open: dict[str, Alert] = field(default_factory=dict, init=False)
    _over: list[Alert] = field(default_factory=list, init=False)
    """The alerts resolved last: what began while they were open is their consequence."""
    _armed_until: int = field(default=-1, init=False)
    _step: int = field(default=-1, init=False)

    @property
    def open(self) -> tuple[Alert, ...]:
        """The open alerts, in order of opening."""
        return tuple(self._open.values())

    @property
    def wants_detail(self) -> bool:
        """Evidence is open: the next steps should be measured in detail."""
        return self._step < self._armed_until

    @property
    def wants_probe(self) -> bool:
        """Evidence gathers, or an alert has just opened: the next forward passes should be read."""
        return self.wants_detail and any(
            found.highest > 0 and (found.reached < 0 or self._step < found.reached + ARMED)
            for found in self._sums.values()
        )

    def judge(self, snapshot: Snapshot, evidence: Iterable[Evidence]) -> tuple[Alert, ...]:
        """Take one step's evidence; return the alerts that opened, escalated or ended at it."""
        self._step = snapshot.step
        for item in evidence:
            self._sums.setdefault(item.symptom, EvidenceSum()).add(item, snapshot)
            found = self._sums[item.symptom]
            fresh = found.reached < 0 or snapshot.step < found.reached + FRESH
            if (found.highest < OPENS or (fresh and item.severity != "info")) and _is_positive(item):
                self._armed_until = snapshot.step + ARMED
        changed = [*self._resolved(snapshot), *self._escalated(snapshot)]
        for symptom in sorted(self._sums, key=_rank):
            if symptom not in self._open and self._is_due(symptom, snapshot.step):
                changed += self._opened(symptom, snapshot)
        return tuple(changed)

    def state(self) -> dict[str, object]:
        """Return sums and open alerts as plain values."""
        return {
            "sums": {name: [s.total, s.first_step, s.reached, s.zero_for] for name, s in self._sums.items()},
            "open": {name: asdict(alert) for name, alert in self._open.items()},
            "over": [asdict(alert) for alert in self._over],
            "armed_until": self._armed_until,
            "step": self._step,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` returned."""
        self._sums = {
            name: EvidenceSum(total if isinstance(total, dict) else float(total), int(first), int(reached), int(zero))
            for name, (total, first, reached, zero) in state["sums"].items()
        }
        self._open = {name: _alert(record) for name, record in state["open"].items()}
        self._over = [_alert(record) for record in state["over"]]
        self._armed_until, self._step = int(state["armed_until"]), int(state["step"])

    def _is_due(self, symptom: str, step: int) -> bool:
        """Whether a symptom may open an alert now: it has reached its sum, and waits for none of higher order."""
        found = self._sums[symptom]
        if found.reached < 0 or found.latest is None:
            return False
        if symptom == "spike":
            waits = any(self._total(name) > 0 for name in GATHERING_EXPLOSIONS)
            return step - found.reached >= AFTER_SPIKE or not waits
        if found.latest_step != step:
            return False
        if found.latest.immediate:
            return True
        waited = step - found.reached
        if symptom in DEBRIS and self._explosion_gathers() and waited < HOLD:
            return False
        higher = [name for name in self._sums if _rank(name) < _rank(symptom) and name not in self._open]
        gathering = any(
            self._sums[name].highest >= 1 and self._sums[name].reached < 0 and not self._is_info(name)
            for name in higher
        )
        return not gathering or waited >= HOLD

    def _total(self, symptom: str) -> float:
        return self._sums[symptom].highest if symptom in self._sums else 0.0

    def _explosion_gathers(self) -> bool:
        return any(self._total(name) >= 2 for name in EXPLOSIONS)

    def _is_info(self, symptom: str) -> bool:
        latest = self._sums[symptom].latest
        return latest is not None and latest.severity == "info"

    def _opened(self, symptom: str, snapshot: Snapshot) -> list[Alert]:
        alert = self._make(symptom, snapshot, "opened")
        spike = self._open.get("spike")
        if spike is not None and alert.kind == "exploding":
            if spike.severity == "critical":
                return []
            if snapshot.step - spike.opened < ESCALATES:
                return [self._escalated_spike(spike, alert, snapshot)]
        if any(_explains(earlier, alert) for earlier in (*self._open.values(), *self._over)):
            return []
        alert = replace(alert, causes=self.diagnose(alert, snapshot))
        self._open[symptom] = alert
        return [alert]

    def _escalated_spike(self, spike: Alert, explosion: Alert, snapshot: Snapshot) -> Alert:
        """Say that the spike was the beginning of an explosion, whose cause may be another."""
        began = replace(explosion, first_step=spike.first_step)
        self._open["spike"] = replace(
            spike,
            step=snapshot.step,
            severity="critical",
            change="escalated",
            message=f"{spike.message} It became an explosion: {explosion.message}",
            layers=explosion.layers,
            tensors=explosion.tensors,
            causes=self.diagnose(began, snapshot),
        )
        return self._open["spike"]

    def _escalated(self, snapshot: Snapshot) -> list[Alert]:
        changed = []
        for symptom, before in list(self._open.items()):
            if self._sums[symptom].latest_step != snapshot.step:
                continue
            now = self._make(symptom, snapshot, "updated", opened=before.opened, first_step=before.first_step)
            worse = SEVERITIES.index(now.severity) > SEVERITIES.index(before.severity)
            severity = now.severity if worse else before.severity
            causes = self.diagnose(now, snapshot) if worse else before.causes
            change: Change = "escalated" if worse else "updated"
            self._open[symptom] = replace(now, severity=severity, change=change, causes=causes)
            if worse:
                changed.append(self._open[symptom])
        return changed

    def _resolved(self, snapshot: Snapshot) -> list[Alert]:
        quiet = [symptom for symptom in self._open if self._sums[symptom].zero_for >= QUIET]
        over = [replace(self._open.pop(symptom), resolved=snapshot.step, change="resolved") for symptom in quiet]
        self._over = [*self._over, *over][-REMEMBERED:]
        return over

    def _make(
        self, symptom: str, snapshot: Snapshot, change: Change, *, opened: int = -1, first_step: int = -1
    ) -> Alert:
        found = self._sums[symptom]
        evidence = found.latest
        if evidence is None:  # after a restart, before the first evidence
            raise RuntimeError(f"no evidence for {symptom}")
        tensors = found.tensors()
        return Alert(
            kind=evidence.kind,
            symptom=symptom,
            severity=self._muted(evidence.kind, tensors, evidence.severity),
            optimizer=snapshot.optimizer,
            step=snapshot.step,
            first_step=found.first_step if first_step < 0 else first_step,
            opened=snapshot.step if opened < 0 else opened,
            change=change,
            layers=evidence.layers or _layers(tensors, snapshot),
            tensors=tensors,
            value=found.reading(snapshot.names),
            threshold=float(evidence.threshold),
            message=evidence.message,
        )

    def _muted(self, kind: str, tensors: tuple[str, ...], severity: Severity) -> Severity:
        """A known alert stays on record: `mute` must match all of its tensors."""
        for muted, glob in self.mute:
            if muted == kind and all(fnmatchcase(name, glob) for name in tensors or ("",)):
                return "info"
        return severity


def _is_positive(evidence: Evidence) -> bool:
    """Whether it argues for an alert anywhere; NaN does not."""
    value = evidence.value
    return bool((value > 0).any()) if isinstance(value, np.ndarray) else value > 0


def _rank(symptom: str) -> int:
    return ORDER.index(symptom) if symptom in ORDER else len(ORDER)


def _added(total: float, value: float) -> float:
    return min(CEILING, max(0.0, total + min(LIMIT, max(-LIMIT, value))))


def _added_by_name(total: float | dict[str, float], values: Floats, names: tuple[str, ...]) -> dict[str, float]:
    """Add tensor by tensor; only what is above zero is kept, worst first."""
    before = total if isinstance(total, dict) else {}
    looked = np.flatnonzero((values > 0) | np.array([name in before for name in names]) if before else values > 0)
    after = {
        names[row]: before.get(names[row], 0.0)
        if np.isnan(values[row])
        else _added(before.get(names[row], 0.0), values[row])
        for row in looked.tolist()
    }
    kept = {name: value for name, value in after.items() if value > 0}
    return dict(sorted(kept.items(), key=lambda item: -item[1]))


def _explains(earlier: Alert, later: Alert) -> bool:  # noqa: PLR0911 - a table in words
    """Whether a new finding is a consequence of an open alert; what is only `info` explains nothing worse."""
    if earlier.severity == "info" and later.severity != "info":
        return False
    became_an_explosion = earlier.kind == "spike" and earlier.severity == "critical" and later.kind == "exploding"
    debris = became_an_explosion or (earlier.kind in ("exploding", "spike") and later.kind in STARVED)
    if debris and (later.symptom in SHOWS_LATE or later.first_step <= (earlier.resolved or earlier.step) + AFTERMATH):
        return True
    if earlier.resolved is not None and (later.first_step > earlier.resolved or earlier.kind != "exploding"):
        return False  # over, and not its debris
    if earlier.kind in (later.kind, "exploding"):
        return True
    if earlier.kind in STARVED:
        return later.kind in STARVED
    if earlier.kind == "nonfinite" and later.kind == "spike":
        return True
    return earlier.kind in ("unoptimized", "nonfinite") and later.kind in ("stalled", "dead", "vanishing")


def _layers(tensors: tuple[str, ...], snapshot: Snapshot) -> tuple[str, ...]:
    index = snapshot.tensors.index
    return tuple(dict.fromkeys(snapshot.tensors.layers[index[name]] for name in tensors if name in index))


def _alert(record: Mapping[str, Any]) -> Alert:
    lists = {name: tuple(record[name]) for name in ("layers", "tensors")}
    return Alert(**{**record, **lists, "causes": tuple(Cause(**cause) for cause in record["causes"])})

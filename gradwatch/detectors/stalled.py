"""Updates too small to change the weights, although there is a gradient."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from gradwatch.history import History
from gradwatch.readings import gap_to_top, live_weights, log10, median, relative_update, worst_first
from gradwatch.records import Evidence, Severity, Snapshot

UPDATE_FLOOR = 1e-6
"""Update-to-weight ratio below which nothing is learned; fine-tuning at 1e-5 stays at 2e-5."""
USUAL_UPDATE = 1e-3
"""An update as training makes them. Where the first layers get such, branches that rest are none of our business."""
TOP_ABOVE = 4.0
"""Decades between the largest gradient of any tensor and the median weight: the gradient is small, not the rate."""
PLAIN_RATE = 1e-3
"""Without adaptive scaling, a rate this large with such small updates means that it is the gradient that is small."""
WAKING_STEPS, WAKING = 10, 10.0
"""Steps after which branches that rest at first have grown their updates by this factor."""
LOST_CEILING = 0.5
"""Share of updates that the weights' dtype rounds away; 0.20 in health, from 0.80 on when sick."""
ROUNDED = ("float16", "bfloat16")
PATIENCE, SCHEDULED_PATIENCE = 24, 60
"""Steps before a stall is more than a note: waiting costs nothing; the second where a scheduler may raise the rate."""
RATE_GONE = 50
"""Steps at less than a millionth of the peak rate after which the run no longer trains."""
ADAPTIVE = ("adam", "rms", "adagrad", "adadelta", "lamb", "lion", "nadam", "radam", "adafactor")


def stalled(snapshot: Snapshot, history: History, /) -> Iterator[Evidence]:
    """Compare updates with weights, as they would be at the largest gradient that the run has had."""
    if snapshot.skipped or snapshot.bad.any():
        return
    yield from _rate_gone(history)
    update = relative_update(snapshot)
    rows = np.flatnonzero(live_weights(snapshot) & np.isfinite(update))
    if not snapshot.detail or not snapshot.global_norm or not rows.size:
        return
    yield from _rounding(snapshot, history, rows)
    shallow = float(update[rows[: max(1, len(rows) // 3)]].max())
    if not (shallow > USUAL_UPDATE or (shallow > UPDATE_FLOOR and _wakes(history))):
        yield from _small(snapshot, history, rows, median(update[rows]))


def _small(
    snapshot: Snapshot, history: History, rows: np.ndarray[tuple[int], np.dtype[np.int64]], ratio: float
) -> Iterator[Evidence]:
    potential = ratio * max(1.0, history.norm_reference / (snapshot.global_norm or 1.0))
    gap = gap_to_top(snapshot)
    faint = gap > TOP_ABOVE or is_faint(snapshot)
    message = f"One update changes the weights by {ratio:.1e} of their size, in the median layer."
    if gap > TOP_ABOVE:
        message = (
            f"The gradient of the weights is {gap:.1f} decades below the largest of any tensor, "
            f"and one update changes them by {ratio:.1e} of their size."
        )
    yield Evidence(
        "update_small",
        kind="vanishing" if faint else "stalled",
        value=-2.0 if history.schedule_is_quiet else (log10(UPDATE_FLOOR) - log10(potential)) / 0.5,
        reading=potential,
        threshold=UPDATE_FLOOR,
        tensors=worst_first(snapshot.tensors, -snapshot.rms, rows) if potential < UPDATE_FLOOR else (),
        message=message,
        severity="warning" if gap > TOP_ABOVE else _severity(snapshot, history),
    )


def _wakes(history: History) -> bool:
    """Whether branches may still be waking: a gain of 1e-6 keeps most weights at rest while the first layers learn."""
    grows = bool(history.updates) and history.updates[-1][1] > WAKING * history.first_update
    return not history.is_stuck and (history.steps <= WAKING_STEPS or grows)


def is_adaptive(name: str) -> bool:
    """Whether this optimizer divides the gradient by its own size, by its class name."""
    return any(part in name.lower() for part in ADAPTIVE)


def is_faint(snapshot: Snapshot) -> bool:
    """Whether it is the gradient that is small and not the rate, which no optimizer makes up for here."""
    facts = snapshot.optimizer_facts
    return not is_adaptive(facts.name) and max(facts.learning_rates, default=0.0) >= PLAIN_RATE


def _severity(snapshot: Snapshot, history: History) -> Severity:
    """Nothing is lost by watching an idle run longer."""
    facts = snapshot.optimizer_facts
    patience = SCHEDULED_PATIENCE if facts.scheduled and not history.rate_dropped else PATIENCE
    return "warning" if history.steps > patience else "info"


def _rounding(
    snapshot: Snapshot, history: History, rows: np.ndarray[tuple[int], np.dtype[np.int64]]
) -> Iterator[Evidence]:
    low = [row for row in rows.tolist() if snapshot.tensors.dtypes[row] in ROUNDED and np.isfinite(snapshot.lost[row])]
    if not low or 2 * len(low) < len(rows):
        return
    share = median(snapshot.lost[low])
    yield Evidence(
        "rounding",
        kind="stalled",
        value=-2.0 if history.schedule_is_quiet else (share - LOST_CEILING) / 0.15,
        reading=share,
        threshold=LOST_CEILING,
        tensors=worst_first(snapshot.tensors, np.nan_to_num(snapshot.lost), np.array(low, dtype=np.int64)),
        message=(
            f"{100 * share:.0f} % of the updates leave {snapshot.tensors.dtypes[low[0]]} weights as they were: "
            "they are smaller than the distance to the next number."
        ),
    )


def _rate_gone(history: History) -> Iterator[Evidence]:
    if not history.peak_rate:
        return
    yield Evidence(
        "rate_gone",
        kind="stalled",
        value=2.0 if history.rate_gone >= RATE_GONE else -2.0,
        reading=history.rates[-1] if history.rates else float("nan"),
        threshold=1e-6 * history.peak_rate,
        message=(
            f"The learning rate has been below a millionth of its peak ({history.peak_rate:.2g}) for "
            f"{history.rate_gone} steps: the run no longer trains."
        ),
    )

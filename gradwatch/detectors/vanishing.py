"""The gradient is lost on its way to the first layers, or outweighed before it moves anything."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from gradwatch.history import History
from gradwatch.readings import live_weights, log10, relative_update, worst_first
from gradwatch.records import Evidence, GradientState, Snapshot

PROFILE_CEILING = 2.25
"""Decades of attenuation over depth. Healthy runs keep below 1.8, sick ones begin at 2.6."""
UPDATE_FLOOR = 1e-6
"""Update-to-weight ratio below which nothing is learned; fine-tuning at 1e-5 stays at 2e-5."""
TOP_ABOVE = 4.0
"""Decades between the largest gradient of any tensor and the median weight: the gradient is small, not the rate."""
SHRINK_CEILING = 0.02
"""Share of their norm that the weights lose in a step."""
DECAY_OVER_GRADIENT = 3.0
"""Weight decay must pull so many times harder than the gradient: regularised graph networks shrink, and learn."""


def vanishing(snapshot: Snapshot, history: History, /) -> Iterator[Evidence]:
    """Compare layers with each other and updates with weights."""
    if snapshot.skipped or snapshot.bad.any():
        return
    yield from _profile(snapshot, history)
    yield from _update(snapshot, history)
    yield from _decay(snapshot, history)


def _profile(snapshot: Snapshot, history: History) -> Iterator[Evidence]:
    if history.profile is None:
        return
    reading = history.profile.down
    rows = np.flatnonzero(live_weights(snapshot))
    fading = history.is_transient and reading < 20
    yield Evidence(
        "profile_down",
        kind="vanishing",
        value=-0.5 if fading else (reading - PROFILE_CEILING) / 0.5,
        reading=reading,
        threshold=PROFILE_CEILING,
        tensors=worst_first(snapshot.tensors, -snapshot.rms, rows[: max(1, len(rows) // 3)]),
        message=(
            f"The gradient falls by {reading:.1f} decades from the last layers to the first: "
            f"{snapshot.rms[rows[-1]]:.1e} per element in {snapshot.names[rows[-1]]}, "
            f"{snapshot.rms[rows[0]]:.1e} in {snapshot.names[rows[0]]}."
        ),
    )


def _update(snapshot: Snapshot, history: History) -> Iterator[Evidence]:
    """Judge the median update, as it would be at the largest gradient that the run has had."""
    rows = np.flatnonzero(live_weights(snapshot) & np.isfinite(relative_update(snapshot)))
    if not snapshot.detail or not snapshot.global_norm or not rows.size:
        return
    ratio = float(np.median(relative_update(snapshot)[rows]))
    potential = ratio * max(1.0, history.norm_reference / snapshot.global_norm)
    quiet = history.schedule_is_quiet or _gap_to_top(snapshot) <= TOP_ABOVE
    yield Evidence(
        "update_small",
        kind="vanishing",
        value=-2.0 if quiet else (log10(UPDATE_FLOOR) - log10(potential)) / 0.5,
        reading=potential,
        threshold=UPDATE_FLOOR,
        tensors=worst_first(snapshot.tensors, -snapshot.rms, rows),
        message=(
            f"The gradient of the weights is {_gap_to_top(snapshot):.1f} decades below the largest of any tensor, "
            f"and one update changes them by {ratio:.1e} of their size."
        ),
    )


def _gap_to_top(snapshot: Snapshot) -> float:
    live = (snapshot.state == GradientState.VALUE) & (snapshot.norm > 0) & snapshot.tensors.optimized
    return log10(float(snapshot.rms[live].max())) - log10(float(np.median(snapshot.rms[live_weights(snapshot)])))


def _decay(snapshot: Snapshot, history: History) -> Iterator[Evidence]:
    before = history.weights_before(snapshot.step, 5)
    if not snapshot.detail or before is None or snapshot.step - before[0] < 5:
        return
    step, norms = before
    with np.errstate(divide="ignore", invalid="ignore"):
        shrink = np.log(norms / snapshot.weight_norm) / (snapshot.step - step)
        decay = np.array([*snapshot.optimizer_facts.weight_decay, 0.0])[snapshot.tensors.groups]
        outweighs = decay * snapshot.weight_norm / np.maximum(snapshot.norm, 1e-30)
    rows = np.flatnonzero(snapshot.tensors.is_weight & np.isfinite(shrink) & np.isfinite(outweighs))
    if not rows.size:
        return
    reading, ratio = float(np.median(shrink[rows])), float(np.median(outweighs[rows]))
    yield Evidence(
        "decay",
        kind="vanishing",
        value=(reading - SHRINK_CEILING) / 0.01 if ratio > DECAY_OVER_GRADIENT else -2.0,
        reading=reading,
        threshold=SHRINK_CEILING,
        tensors=worst_first(snapshot.tensors, shrink, rows),
        message=(
            f"Weight decay pulls {ratio:.3g} times harder than the gradient: "
            f"the weights shrink by {100 * reading:.1f} % a step."
        ),
    )

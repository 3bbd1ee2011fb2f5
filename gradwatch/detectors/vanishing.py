"""The gradient is lost on its way to the first layers or time steps, or outweighed before it moves anything."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from gradwatch.history import History
from gradwatch.readings import live_weights, log10, median, worst_first
from gradwatch.records import Evidence, ModuleReadings, Snapshot

PROFILE_CEILING = 2.25
"""Decades of attenuation over depth. Healthy runs keep below 1.8, sick ones begin at 2.6."""
WAKING_STEPS = 20
"""Steps that a network has to wake after weights that began at zero, as a last layer may."""
OVER_TIME_CEILING = 7.2
"""Decades lost over a sequence, and no learning; healthy ones that learn lose up to 22."""
SEQUENCE_STEPS = 20
"""Shorter sequences are not judged."""
ANSWER_AT_THE_END = 0.8
"""Share of the loss's gradient that enters in the last tenth: a loss at every step reaches the early ones directly."""
COLLAPSE_CEILING = 3.0
"""Decades by which the differences between samples shrink from the first layer to the last."""
SHRINK_CEILING = 0.02
"""Share of their norm that the weights lose in a step."""
DECAY_OVER_GRADIENT = 3.0
"""Weight decay must pull so many times harder than the gradient: regularised graph networks shrink, and learn."""


def vanishing(snapshot: Snapshot, history: History, /) -> Iterator[Evidence]:
    """Compare layers with each other and updates with weights."""
    if snapshot.skipped or snapshot.bad.any():
        return
    yield from _profile(snapshot, history)
    yield from _decay(snapshot, history)
    if snapshot.modules is not None:
        yield from _over_time(snapshot.modules, history)
        yield from _collapse(snapshot.modules, history)


def _profile(snapshot: Snapshot, history: History) -> Iterator[Evidence]:
    if history.profile is None:
        return
    reading = history.profile.down
    rows = np.flatnonzero(live_weights(snapshot))
    first = rows[: max(1, len(rows) // 3)] if reading > PROFILE_CEILING else rows[:0]
    waking = bool(history.opening.zero_weights) and history.steps <= WAKING_STEPS
    fading = reading < 20 and (history.is_transient or waking)
    fading |= reading > PROFILE_CEILING and history.is_learning
    yield Evidence(
        "profile_down",
        kind="vanishing",
        value=-0.5 if fading else (reading - PROFILE_CEILING) / 0.5,
        reading=reading,
        threshold=PROFILE_CEILING,
        tensors=worst_first(snapshot.tensors, -snapshot.rms, first),
        message=(
            f"The gradient falls by {reading:.1f} decades from the last layers to the first: "
            f"{snapshot.rms[rows[-1]]:.1e} per element in {snapshot.names[rows[-1]]}, "
            f"{snapshot.rms[rows[0]]:.1e} in {snapshot.names[rows[0]]}."
        ),
    )


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
    reading, ratio = median(shrink[rows]), median(outweighs[rows])
    yield Evidence(
        "decay",
        kind="vanishing",
        value=(reading - SHRINK_CEILING) / 0.01 if ratio > DECAY_OVER_GRADIENT else -2.0,
        reading=reading,
        threshold=SHRINK_CEILING,
        tensors=worst_first(snapshot.tensors, shrink, rows) if reading > SHRINK_CEILING else (),
        message=(
            f"Weight decay pulls {ratio:.3g} times harder than the gradient: "
            f"the weights shrink by {100 * reading:.1f} % a step."
        ),
    )


def _over_time(modules: ModuleReadings, history: History) -> Iterator[Evidence]:
    """Judge recurrences, but only of a network that is known not to learn: most lose many decades and learn."""
    long = [entry for entry in modules.recurrences if entry.steps >= SEQUENCE_STEPS and np.isfinite(entry.decades)]
    judged = [entry for entry in long if not entry.last_tenth < ANSWER_AT_THE_END]
    if not judged:
        return
    worst = min(judged, key=lambda entry: entry.decades)
    lost = -worst.decades
    yield Evidence(
        "recurrence_down",
        kind="vanishing",
        value=(lost - OVER_TIME_CEILING) / 2 if history.is_stuck else -2.0,
        reading=lost,
        threshold=OVER_TIME_CEILING,
        layers=(worst.module,),
        message=f"The gradient falls by {lost:.0f} decades over the {worst.steps} time steps of {worst.module}.",
    )


def _collapse(modules: ModuleReadings, history: History) -> Iterator[Evidence]:
    """Judge whether the last layers still tell one sample from another."""
    rows = [row for row in range(len(modules.operations)) if np.isfinite(modules.between[row])][:-1]
    if len(rows) < 3 or not history.knows_loss:
        return
    first, last = max(modules.between[rows[:2]]), max(modules.between[rows[-2:]])
    lost = log10(float(first)) - log10(max(float(last), 1e-30))
    yield Evidence(
        "collapse",
        kind="vanishing",
        value=(lost - COLLAPSE_CEILING) / 0.5 if history.is_stuck else -2.0,
        reading=lost,
        threshold=COLLAPSE_CEILING,
        layers=(modules.modules[rows[-1]],),
        message=f"What differs between samples shrinks by {lost:.1f} decades from the first layers to the last.",
    )

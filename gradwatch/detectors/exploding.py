"""Updates, weights, gradients or losses far beyond what the run had in health."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from gradwatch.history import History
from gradwatch.readings import floor_of, live_weights, log10, lower_median, median, relative_update, worst_first
from gradwatch.records import Evidence, Floats, ModuleReadings, Snapshot

UPDATE_CEILING = 0.35
"""An update of a third of the weights, in the median weight. Healthy runs reach 0.20, sick ones begin at 0.9."""
GROWTH_CEILING = 0.6
"""Decades by which the median weight grows in ten steps; 0.35 in health."""
LEVEL_CEILING = 1.5
"""Decades above the largest level of the run's own past; 0.66 in health."""
OVER_TIME_CEILING = 1.5
"""Decades by which a gradient grows over a sequence; it shrinks in health."""
PROFILE_CEILING = 2.0
"""Decades by which the gradient grows from the loss to the input; 1.3 in health."""


def exploding(snapshot: Snapshot, history: History, /) -> Iterator[Evidence]:
    """Compare with the weights, with the other layers and with the run's own past; nothing here has a scale."""
    if snapshot.bad.any():
        return
    if not snapshot.skipped:
        yield from _update(snapshot)
        yield from _growth(snapshot, history)
        yield from _level(snapshot, history)
        yield from _profile(snapshot, history)
        if snapshot.modules is not None:
            yield from _over_time(snapshot.modules)
    yield from _loss(snapshot, history)


def _update(snapshot: Snapshot) -> Iterator[Evidence]:
    update = relative_update(snapshot)
    rows = np.flatnonzero(snapshot.tensors.is_weight & np.isfinite(update))
    if not snapshot.detail or not rows.size or not any(snapshot.learning_rates or (1.0,)):
        return
    reading = lower_median(update[rows])
    yield Evidence(
        "update_large",
        kind="exploding",
        value=(log10(reading) - log10(UPDATE_CEILING)) / 0.3,
        reading=reading,
        threshold=UPDATE_CEILING,
        tensors=worst_first(snapshot.tensors, update, rows) if reading > UPDATE_CEILING else (),
        message=f"One update changes the weights by {reading:.3g} times their own size, in the median layer.",
        severity="critical" if reading > 1 else "warning",
    )


def _growth(snapshot: Snapshot, history: History) -> Iterator[Evidence]:
    before = history.weights_before(snapshot.step, 10)
    if not snapshot.detail or before is None or before[0] == snapshot.step:
        return
    step, norms = before
    growth = np.log10(np.maximum(snapshot.weight_norm, 1e-300) / np.maximum(norms, floor_of(snapshot.tensors, 0.015)))
    growth *= min(1.0, 10 / (snapshot.step - step))
    rows = _measured(snapshot, growth)
    if not rows.size:
        return
    reading = median(growth[rows])
    value = (reading - GROWTH_CEILING) / 0.2
    # A rate that is too high at the start, and that the net survives.
    falling = history.loss_is_falling
    yield Evidence(
        "growth",
        kind="exploding",
        value=min(-0.5, value) if falling else value,
        reading=reading,
        threshold=GROWTH_CEILING,
        tensors=worst_first(snapshot.tensors, growth, rows) if value > 0 else (),
        message=f"The weights have grown {10**reading:.3g} times in ten steps, in the median layer.",
    )


def _measured(snapshot: Snapshot, values: Floats) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    return np.flatnonzero(snapshot.tensors.is_weight & np.isfinite(values))


def _level(snapshot: Snapshot, history: History) -> Iterator[Evidence]:
    if not snapshot.global_norm or not history.norm_reference:
        return
    reading = log10(snapshot.global_norm / history.norm_reference)
    rows = np.flatnonzero(snapshot.tensors.optimized & np.isfinite(snapshot.norm))
    yield Evidence(
        "gradient_level",
        kind="exploding",
        value=(reading - LEVEL_CEILING) / 0.5,
        reading=reading,
        threshold=LEVEL_CEILING,
        tensors=worst_first(snapshot.tensors, snapshot.norm, rows) if reading > LEVEL_CEILING else (),
        message=(
            f"The gradient norm is {snapshot.global_norm:.3g}, {10**reading:.3g} times the largest level "
            f"that this run had before ({history.norm_reference:.3g})."
        ),
    )


def _profile(snapshot: Snapshot, history: History) -> Iterator[Evidence]:
    if history.profile is None:
        return
    reading = history.profile.up
    value = (reading - PROFILE_CEILING) / 0.5
    rows = np.flatnonzero(live_weights(snapshot)) if reading > PROFILE_CEILING else np.empty(0, dtype=np.int64)
    yield Evidence(
        "profile_up",
        kind="exploding",
        value=value if value < 0 or _is_confirmed(history) else -0.5,
        reading=reading,
        threshold=PROFILE_CEILING,
        tensors=worst_first(snapshot.tensors, snapshot.rms, rows),
        message=f"The gradient grows by {reading:.1f} decades from the last layers to the first.",
    )


def _is_confirmed(history: History) -> bool:
    """What is not so from the start has to be confirmed by a loss: trained layers differ by as much in health."""
    return history.is_stuck or (history.opening.profile_up > PROFILE_CEILING and not history.is_learning)


def _over_time(modules: ModuleReadings) -> Iterator[Evidence]:
    known = [entry for entry in modules.recurrences if np.isfinite(entry.decades) and entry.cell != "loop"]
    if not known:
        return
    worst = max(known, key=lambda entry: entry.decades)
    yield Evidence(
        "recurrence_up",
        kind="exploding",
        value=(worst.decades - OVER_TIME_CEILING) / 0.25,
        reading=worst.decades,
        threshold=OVER_TIME_CEILING,
        layers=(worst.module,),
        message=(
            f"The gradient grows by {worst.decades:.1f} decades over the {worst.steps} time steps of {worst.module}."
        ),
    )


def _loss(snapshot: Snapshot, history: History) -> Iterator[Evidence]:
    """Judge the median of three losses against three times everything before, and against the noise."""
    if snapshot.loss is None or len(history.losses) < 6:
        return
    first = abs(median(history.first_losses[:5]))
    # Where the loss begins at zero, and mostly stays there, its quantiles are no scale; what it has reached is.
    earlier = float(np.quantile(history.all_losses.values[:-3] or [first], 0.9 if first else 1.0))
    if not first and not earlier:  # a reward that is still to come: zero is no scale
        return
    recent = np.array(history.losses[-20:])
    noise = 20 * 1.4826 * median(np.abs(recent - median(recent))) if len(history.losses) > 20 else 0.0
    ceiling = max(3 * first, 3 * earlier, noise)
    rise = (median(history.losses[-3:]) - median(history.first_losses[:5])) / ceiling
    yield Evidence(
        "loss_up",
        kind="exploding",
        value=2 * float(np.log2(max(rise, 1e-3))) + 0.5,
        reading=rise,
        threshold=1.0,
        message=f"The loss has risen to {history.losses[-1]:.4g}; it began at {history.first_losses[0]:.4g}.",
    )

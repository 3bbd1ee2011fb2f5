"""What detectors read off one Snapshot: pure functions, free of scale, vectorised over tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gradwatch.records import Floats, GradientState, Snapshot, Tensors

WEIGHT_FLOOR = 0.005
"""Root mean square below which a weight's size says nothing: zero-initialised tensors are compared with this."""

A_STEP = 1.2
"""Evidence of one step that leaves no doubt, such as an exact zero: five of them make an alert."""

SHORT = 100
"""Numbers that Python sorts faster than NumPy is called."""

MIN_WEIGHTS = 4
"""A profile over depth needs so many weights with a gradient."""


@dataclass(frozen=True, slots=True)
class Profile:
    """Decades by which the gradient rises from the first third of the weights to the last.

    Read twice, relative to the weights ``|g| / |w|`` and per element ``rms(g)``: attenuation over depth shows in both,
    a small or large initialisation of one end (a zero-initialised head, a SIREN) in one only.
    """

    down: float
    """The smaller reading: how much is certainly lost on the way from the loss to the input."""
    up: float
    """The larger reading, negated: how much certainly grows on that way."""


def live_weights(snapshot: Snapshot) -> NDArray[np.bool_]:
    """Optimized tensors of two or more dimensions, embeddings excluded, that have a gradient other than zero."""
    live: NDArray[np.bool_] = snapshot.tensors.is_weight & (snapshot.state == GradientState.VALUE) & (snapshot.norm > 0)
    return live


def profile(snapshot: Snapshot, weight_norm: Floats) -> Profile | None:
    """Read the profile over depth; None with too few weights."""
    rows = np.flatnonzero(live_weights(snapshot) & np.isfinite(weight_norm))
    if len(rows) < MIN_WEIGHTS:
        return None
    root = np.sqrt(snapshot.tensors.numel[rows])
    relative = np.log10(snapshot.norm[rows] / np.maximum(weight_norm[rows], WEIGHT_FLOOR * root))
    element = np.log10(snapshot.norm[rows] / root)
    starts = _new_depths(snapshot.tensors, rows)
    if len(starts) < MIN_WEIGHTS:
        return None
    third = max(1, len(starts) // 3)
    # Of parallel branches, such as experts, the one with the most gradient speaks for their depth.
    strongest = [np.maximum.reduceat(values, starts) for values in (relative, element)]
    rises = [median(values[-third:]) - median(values[:third]) for values in strongest]
    return Profile(down=min(rises), up=-max(rises))


def _new_depths(tensors: Tensors, rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Positions in `rows` at which another depth begins."""
    if not tensors.depths:
        return np.arange(len(rows))
    depths = np.asarray(tensors.depths)[rows]
    return np.flatnonzero(np.append(True, depths[1:] != depths[:-1]))


def relative_update(snapshot: Snapshot) -> Floats:
    """‖Δw‖ / max(‖w‖, floor) of every tensor; NaN where the update was not measured."""
    return snapshot.update_norm / np.maximum(snapshot.weight_norm, floor_of(snapshot.tensors, WEIGHT_FLOOR))


def gap_to_top(snapshot: Snapshot) -> float:
    """Decades between the largest gradient of any tensor, per element, and that of the median weight."""
    live = (snapshot.state == GradientState.VALUE) & (snapshot.norm > 0) & snapshot.tensors.optimized
    return log10(float(snapshot.rms[live].max())) - log10(median(snapshot.rms[live_weights(snapshot)]))


def median_update(snapshot: Snapshot) -> float:
    """Median update-to-weight ratio over the weights, those that did not move included; NaN if none was measured."""
    update = relative_update(snapshot)
    known = update[snapshot.tensors.is_weight & np.isfinite(update)]
    return median(known) if known.size else float("nan")


def floor_of(tensors: Tensors, rms: float) -> Floats:
    """Norm of each tensor if all of its elements had this size."""
    floor: Floats = rms * np.sqrt(np.maximum(tensors.numel, 1))
    return floor


def log10(value: float) -> float:
    """Base-ten logarithm that takes zero for the smallest number there is."""
    return float(np.log10(max(value, 5e-324)))


def median(values: Floats | Sequence[float]) -> float:
    """The median of finite numbers; NumPy's own takes fifty times as long on the few that are read at every step."""
    if isinstance(values, np.ndarray) and values.size > SHORT:
        half = values.size // 2
        parted = np.partition(values, (half - 1, half))
        return float(parted[half] if values.size % 2 else (parted[half - 1] + parted[half]) / 2)
    ordered = sorted(values.tolist() if isinstance(values, np.ndarray) else values)
    half = len(ordered) // 2
    return float(ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2)


def lower_median(values: Floats) -> float:
    """The median, or the smaller of the two middle values."""
    return float(np.sort(values)[(len(values) - 1) // 2])


def worst_first(tensors: Tensors, scores: Floats, rows: NDArray[np.int64], *, limit: int = 50) -> tuple[str, ...]:
    """Names of the tensors in `rows`, the largest score first."""
    if len(rows) > limit:
        rows = rows[np.argpartition(-scores[rows], limit)[:limit]]
    order = rows[np.argsort(-scores[rows], kind="stable")]
    return tuple(tensors.names[row] for row in order.tolist())

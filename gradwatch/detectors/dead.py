"""Trainable tensors whose gradient is exactly zero or never arrives, and rows that can never become different."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from gradwatch.history import History
from gradwatch.readings import A_STEP, median
from gradwatch.records import Evidence, Floats, GradientState, ModuleReadings, Snapshot

BEFORE = 0.9
"""Share of the weights before a zero one that must be zero too; otherwise it is a branch at rest."""
SAME_ROWS = 1e-3
DEAD_UNITS_CEILING = 0.9
"""Share of units of one activation that are active for no sample; 0.80 in health."""
UNDERFLOW = 1e-33
"""Root mean square of a float32 gradient whose next smaller neighbours can only be zero: that is vanishing,"""
SIGNAL_FALLS = 1e-6
"""So is one of a signal that dies out on its way from the first layer to the last,"""
FALLS = 4.0
"""and so is a gradient that has fallen by so many decades where it still can be read."""


def dead(snapshot: Snapshot, history: History, /) -> Iterator[Evidence]:
    """Look for walls that no gradient passes."""
    yield from _missing(snapshot, history)
    if snapshot.skipped or snapshot.bad.any():
        return
    yield from _zero(snapshot, history)
    yield from _symmetry(snapshot)
    if snapshot.modules is not None:
        yield from _dead_units(snapshot.modules, history)


def _zero(snapshot: Snapshot, history: History) -> Iterator[Evidence]:
    tensors = snapshot.tensors
    present = tensors.is_matrix & (snapshot.state != GradientState.MISSING) & (tensors.numel > 0)
    zero = present & (snapshot.state == GradientState.ZERO) & history.zero.unusual()
    wall = _wall(zero & tensors.series, zero, present)
    everything = bool(zero.any()) and not snapshot.global_norm
    if zero.any() and wall is None:
        yield _idle(snapshot, zero)
    underflown = wall is not None and _has_underflown(snapshot, history, wall)
    value = A_STEP if wall is not None and not underflown else -2.0
    if underflown:
        yield from _underflow(snapshot, zero)
    if value > 0 and history.has_no_signal:
        value = -2.0
    if value > 0 and everything and not history.losses:
        # Without a loss nothing tells a finished run from one that never began.
        value = -2.0 if history.ever_had_gradient.any() else 0.15
    rows = np.flatnonzero(zero)
    yield Evidence(
        "zero",
        kind="dead",
        value=value,
        reading=float(rows.size),
        threshold=0.0,
        tensors=tuple(snapshot.names[row] for row in rows[::-1].tolist()),
        message=_zero_message(snapshot, rows, everything=everything),
        severity="critical" if everything else "warning",
    )


def _wall(
    in_series: np.ndarray[tuple[int], np.dtype[np.bool_]],
    zero: np.ndarray[tuple[int], np.dtype[np.bool_]],
    present: np.ndarray[tuple[int], np.dtype[np.bool_]],
) -> int | None:
    """Return the last zero weight in series, if nearly all weights before it are zero too."""
    candidates = np.flatnonzero(in_series)
    if not candidates.size:
        return None
    last = int(candidates[-1])
    share = zero[: last + 1].sum() / max(int(present[: last + 1].sum()), 1)
    return last if share >= BEFORE else None


def _has_underflown(snapshot: Snapshot, history: History, wall: int) -> bool:
    """Whether the living tensors, from the loss to the wall, fall towards zero: then the wall is where numbers end."""
    if history.opening.forward_fall < SIGNAL_FALLS:
        return True  # forwards it is the same: what the weights multiply is nothing
    living = snapshot.tensors.optimized & (snapshot.norm > 0)
    after = snapshot.rms[wall + 1 :][snapshot.tensors.is_weight[wall + 1 :] & living[wall + 1 :]]
    if after.size and float(after[0]) < UNDERFLOW:
        return True
    sizes = snapshot.rms[living]
    third = max(1, sizes.size // 3)
    return sizes.size >= 4 and median(sizes[:third]) < 10**-FALLS * median(sizes[-third:])


def _underflow(snapshot: Snapshot, zero: np.ndarray[tuple[int], np.dtype[np.bool_]]) -> Iterator[Evidence]:
    """A gradient that falls towards zero until float32 ends is vanishing, whatever the last tensors read."""
    names = tuple(snapshot.names[row] for row in np.flatnonzero(zero).tolist())
    yield Evidence(
        "profile_down",
        kind="vanishing",
        value=2.0,
        reading=38.0,
        threshold=2.25,
        tensors=names,
        message=f"The gradient falls below what {snapshot.tensors.dtypes[0]} can hold: {len(names)} weights read zero.",
    )


def _zero_message(snapshot: Snapshot, rows: np.ndarray[tuple[int], np.dtype[np.int64]], *, everything: bool) -> str:
    if everything:
        return "All gradients are exactly zero."
    if not rows.size:
        return ""
    return (
        f"The gradient of {rows.size} weights is exactly zero, the last of them {snapshot.names[rows[-1]]}: "
        "nothing before it learns."
    )


def _idle(snapshot: Snapshot, zero: np.ndarray[tuple[int], np.dtype[np.bool_]]) -> Evidence:
    value: Floats = np.where(zero, A_STEP, np.where(snapshot.state == GradientState.MISSING, np.nan, -2.0))
    return Evidence(
        "idle",
        kind="dead",
        value=value,
        reading=np.zeros(len(zero)),
        threshold=0.0,
        message="The gradient is exactly zero in a branch beside others that learn.",
        severity="info",
    )


def _detached(
    snapshot: Snapshot, history: History, missing: np.ndarray[tuple[int], np.dtype[np.bool_]]
) -> Iterator[Evidence]:
    """A gradient that does not arrive although the module ran is cut off; one that did not run is unused."""
    if history.probe is None:
        return
    ran = np.array([layer in history.probe.ran for layer in snapshot.tensors.layers], dtype=bool)
    fresh = history.probe_step > snapshot.step - history.missing.current
    rows = np.flatnonzero(missing & ran & fresh)
    yield Evidence(
        "detached",
        kind="dead",
        value=A_STEP if rows.size else -2.0,
        reading=float(rows.size),
        threshold=0.0,
        tensors=tuple(snapshot.names[row] for row in rows[::-1].tolist()),
        message=f"{rows.size} tensors get no gradient, although their modules run in the forward pass.",
    )


def _dead_units(modules: ModuleReadings, history: History) -> Iterator[Evidence]:
    """Units that no sample activates; three probed steps must agree on the share."""
    share = np.nan_to_num(modules.inactive, nan=0.0)
    if not np.isfinite(modules.inactive).any():
        return
    worst = int(np.argmax(share))
    place = modules.modules[worst] or "the model"
    yield Evidence(
        "dead_units",
        kind="dead",
        value=(float(share[worst]) - DEAD_UNITS_CEILING) / 0.05,
        reading=float(share[worst]),
        threshold=DEAD_UNITS_CEILING,
        layers=(modules.modules[worst],),
        message=f"{100 * share[worst]:.0f} % of the units in {place} are active for no sample.",
        severity="warning" if history.is_stuck else "info",  # a bottleneck of four units dies without harm
    )


def _symmetry(snapshot: Snapshot) -> Iterator[Evidence]:
    """Equal rows with equal gradients stay equal for ever."""
    if not snapshot.detail:
        return
    looked = snapshot.tensors.is_weight & np.isfinite(snapshot.row_spread) & np.isfinite(snapshot.weight_row_spread)
    same = looked & (snapshot.row_spread < SAME_ROWS) & (snapshot.weight_row_spread < SAME_ROWS)
    yield Evidence(
        "symmetry",
        kind="dead",
        value=2.0 if same.any() else -2.0,
        reading=float(same.sum()),
        threshold=0.0,
        tensors=tuple(snapshot.names[row] for row in np.flatnonzero(same).tolist()),
        message="All rows of a weight are equal and get equal gradients: its units can never become different.",
    )


def _missing(snapshot: Snapshot, history: History) -> Iterator[Evidence]:
    """Nothing at all arriving is a fault; one tensor without a gradient may be a head that is not used."""
    missing = snapshot.tensors.optimized & (snapshot.state == GradientState.MISSING) & history.missing.unusual()
    missing &= history.missing.current >= 3
    everything = snapshot.global_norm is None and bool(missing.any())
    yield Evidence(
        "nothing_arrives",
        kind="dead",
        value=A_STEP if everything else -2.0,
        reading=float(missing.sum()),
        threshold=0.0,
        tensors=tuple(snapshot.names[row] for row in np.flatnonzero(missing).tolist()),
        message="The optimizer steps, and no tensor has a gradient: backward() does not reach the parameters.",
        severity="critical",
    )
    yield from _detached(snapshot, history, missing)
    if missing.any() and not everything:
        yield Evidence(
            "missing",
            kind="dead",
            value=np.where(missing, A_STEP, np.where(snapshot.tensors.optimized, -2.0, np.nan)),
            reading=np.zeros(len(missing)),
            threshold=0.0,
            message="No gradient arrives: the tensor is not used, or is cut off from the loss.",
            severity="info",
        )

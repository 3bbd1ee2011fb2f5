"""Trainable tensors whose gradient is exactly zero or never arrives, and rows that can never become different."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from gradwatch.history import History
from gradwatch.records import Evidence, Floats, GradientState, Snapshot

A_STEP = 1.2
"""Evidence of one step: five of them make an alert."""
BEFORE = 0.9
"""Share of the weights before a zero one that must be zero too; otherwise it is a branch at rest."""
SAME_ROWS = 1e-3
UNDERFLOW = 1e-33
"""Root mean square of a float32 gradient whose next smaller neighbours can only be zero: that is vanishing."""


def dead(snapshot: Snapshot, history: History, /) -> Iterator[Evidence]:
    """Look for walls that no gradient passes."""
    yield from _missing(snapshot, history)
    if snapshot.skipped or snapshot.bad.any():
        return
    yield from _zero(snapshot, history)
    yield from _symmetry(snapshot)


def _zero(snapshot: Snapshot, history: History) -> Iterator[Evidence]:
    tensors = snapshot.tensors
    present = tensors.is_matrix & (snapshot.state != GradientState.MISSING) & (tensors.numel > 0)
    zero = present & (snapshot.state == GradientState.ZERO) & history.zero.unusual()
    wall = _wall(zero & tensors.series, zero, present)
    everything = bool(zero.any()) and not snapshot.global_norm
    if zero.any() and wall is None:
        yield _idle(snapshot, zero)
    value = A_STEP if wall is not None and not _has_underflown(snapshot, wall) else -2.0
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


def _has_underflown(snapshot: Snapshot, wall: int) -> bool:
    """Whether the next living weight towards the loss is so small that its neighbours can only be zero."""
    after = snapshot.rms[wall + 1 :][snapshot.tensors.is_weight[wall + 1 :] & (snapshot.norm[wall + 1 :] > 0)]
    return bool(after.size) and float(after[0]) < UNDERFLOW


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

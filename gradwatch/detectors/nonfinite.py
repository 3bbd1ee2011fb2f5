"""NaN and infinity, in the gradients or in the loss."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from gradwatch.history import History
from gradwatch.records import Evidence, Snapshot

PATIENCE = 20
"""Overflows in a row that a scaler needs at most to find its scale: 2**16 / 2**20 is far below one."""


def nonfinite(snapshot: Snapshot, history: History, /) -> Iterator[Evidence]:
    """Alert at once; an overflow that a gradient scaler handles is for the record only, until it persists."""
    bad = np.flatnonzero(snapshot.bad)
    loss_is_bad = snapshot.loss is not None and not np.isfinite(snapshot.loss)
    if not bad.size and not loss_is_bad:
        yield Evidence("nonfinite", kind="nonfinite", value=-2.0)
        yield Evidence("overflow", kind="nonfinite", value=-2.0, severity="info")
        return
    names = tuple(snapshot.names[row] for row in bad[::-1].tolist())  # the fault lies nearest the loss
    handled = snapshot.skipped and snapshot.loss_scale is not None
    persists = history.overflows >= PATIENCE or (snapshot.loss_scale is not None and snapshot.loss_scale < 1)
    if handled and not persists:
        scale = snapshot.loss_scale
        message = f"The gradient overflowed at a loss scale of {scale:g}; the scaler skipped the step."
        yield Evidence(
            "overflow", kind="nonfinite", value=2.0, tensors=names, message=message, severity="info", immediate=True
        )
        return
    yield Evidence(
        "nonfinite",
        kind="nonfinite",
        value=2.0,
        reading=float(len(bad)),
        threshold=0.0,
        tensors=names,
        message=_message(snapshot, names, overflows=history.overflows if handled else 0),
        severity="critical",
        immediate=True,
    )


def _message(snapshot: Snapshot, names: tuple[str, ...], *, overflows: int) -> str:
    loss = "" if snapshot.loss is None or np.isfinite(snapshot.loss) else f" The loss is {snapshot.loss}."
    if overflows:
        return (
            f"The gradient has not been finite for {overflows} steps, at a loss scale of {snapshot.loss_scale:g}.{loss}"
        )
    if not names:
        return f"The loss is {snapshot.loss}, the gradients are finite."
    return f"{len(names)} of {len(snapshot.names)} gradients hold NaN or infinity{_bracket(snapshot)}.{loss}"


def _bracket(snapshot: Snapshot) -> str:
    """Gradients flow from the loss down: the fault lies between the last bad tensor and the clean one above it."""
    bad = np.flatnonzero(snapshot.bad)
    last = int(bad[-1])
    if len(bad) == len(snapshot.names):
        return ", from the loss down"
    if last + 1 == len(snapshot.names):
        return f", up to the last tensor, {snapshot.names[last]}"
    return (
        f"; the fault lies between {snapshot.names[last]}, which is bad, and {snapshot.names[last + 1]}, which is not"
    )

"""Gradients that are cleared never, so that each update repeats all of those before it, or before the update."""

from __future__ import annotations

from collections.abc import Iterator

from gradwatch.history import History
from gradwatch.readings import A_STEP
from gradwatch.records import Evidence, Snapshot


def accumulation(snapshot: Snapshot, history: History, /) -> Iterator[Evidence]:
    """Judge what the backward pass found when it arrived, and what the update found of what it had left."""
    if snapshot.skipped or snapshot.global_norm is None:
        return
    applied = snapshot.global_norm if snapshot.clipped_norm is None else snapshot.clipped_norm
    emptied = snapshot.global_norm > 0 and applied == 0
    yield Evidence(
        "cleared_early",
        kind="dead",
        value=A_STEP if emptied else -A_STEP,
        reading=applied,
        threshold=0.0,
        message=(
            f"backward() leaves a gradient of norm {snapshot.global_norm:.3g}, and all of it is zero when the update "
            "begins: zero_grad() runs between backward() and step()."
        ),
        severity="critical",
    )
    if snapshot.cleared is None:
        return
    yield Evidence(
        "accumulation",
        kind="exploding",
        value=2.0 if history.uncleared and applied else -2.0,  # zeros repeat nothing
        reading=float(history.uncleared),
        threshold=0.0,
        message=(
            f"The gradients were not cleared before the last {history.uncleared} steps: "
            "each update repeats all of those before it."
        ),
        severity="critical",
    )

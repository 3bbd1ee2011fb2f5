"""Gradients that nobody clears between two steps: each update repeats all of those before it."""

from __future__ import annotations

from collections.abc import Iterator

from gradwatch.history import History
from gradwatch.records import Evidence, Snapshot


def accumulation(snapshot: Snapshot, history: History, /) -> Iterator[Evidence]:
    """Judge what the backward pass found when it arrived."""
    if snapshot.cleared is None or snapshot.skipped:
        return
    yield Evidence(
        "accumulation",
        kind="exploding",
        value=2.0 if history.uncleared else -2.0,
        reading=float(history.uncleared),
        threshold=0.0,
        message=(
            f"The gradients were not cleared before the last {history.uncleared} steps: "
            "each update repeats all of those before it."
        ),
        severity="critical",
    )

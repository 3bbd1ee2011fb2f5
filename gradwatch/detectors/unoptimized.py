"""Trainable tensors that get a gradient and that nobody updates."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from gradwatch.history import History
from gradwatch.readings import A_STEP
from gradwatch.records import Evidence, Floats, GradientState, Snapshot


def unoptimized(snapshot: Snapshot, _history: History, /) -> Iterator[Evidence]:
    """Judge the tensors in no optimizer by their sampled weights, between our steps and within them."""
    orphans = ~snapshot.tensors.optimized
    known = orphans & np.isfinite(snapshot.moved)
    if not known.any():
        return
    still = known & (snapshot.moved == 0) & (snapshot.state == GradientState.VALUE)
    value: Floats = np.where(still, A_STEP, np.where(known, -2.0, np.nan))
    yield Evidence(
        "unoptimized",
        kind="unoptimized",
        value=value,
        reading=np.where(orphans, 0.0, np.nan),
        threshold=0.0,
        message="The tensor gets a gradient but is in no optimizer, and it never changes.",
    )

"""One step far out of everything before it, and large enough to do harm."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from gradwatch.history import History
from gradwatch.readings import median
from gradwatch.records import Evidence, Floats, Snapshot

LOSS_CEILING, NORM_CEILING = 8.0, 4.0
"""Robust deviations above the newest forty steps; both are needed where the loss is known,"""
NORM_CEILING_ALONE = 12.0
"""and so many, and ten times the largest norm there was, where it is not."""
KNOWN_STEPS = 20
HARMFUL_NORM = 10**1.5
"""Times the largest level that the run had in health; a change of task stays below,"""
HARMFUL_UPDATE = 10.0
"""and so for the update-to-weight ratio."""


def spike(snapshot: Snapshot, history: History, /) -> Iterator[Evidence]:
    """Judge loss and gradient together, on the scale of their own noise, then ask whether it does harm."""
    if snapshot.skipped or snapshot.bad.any() or len(history.norms) <= KNOWN_STEPS or not snapshot.global_norm:
        return
    norms = np.log([norm for norm in history.norms[:-1] if norm > 0] or [snapshot.global_norm])
    surprise = _deviations(float(np.log(snapshot.global_norm)), norms, floor=0.25)
    hit = surprise > NORM_CEILING
    if snapshot.loss is not None and len(history.losses) > KNOWN_STEPS:
        first = abs(median(history.first_losses[:5]))
        hit &= _deviations(snapshot.loss, np.array(history.losses[:-1]), floor=0.05 * first + 1e-12) > LOSS_CEILING
    else:
        hit &= surprise > NORM_CEILING_ALONE and snapshot.global_norm > 10 * max(history.norms[:-1])
    yield Evidence(
        "spike",
        kind="spike",
        value=2.0 if hit and _is_harmful(snapshot, history) else -0.5,
        reading=surprise,
        threshold=NORM_CEILING,
        message=_message(snapshot, history, surprise),
        immediate=True,
    )


def _deviations(value: float, before: Floats, *, floor: float) -> float:
    middle = median(before)
    spread = 1.4826 * median(np.abs(before - middle))
    return (value - middle) / max(spread, floor)


def _is_harmful(snapshot: Snapshot, history: History) -> bool:
    if history.bad_batch == snapshot.step:
        return True
    if 0 < history.norm_reference < (snapshot.global_norm or 0.0) / HARMFUL_NORM:
        return True
    update = history.largest_update(snapshot.step - 1)
    return 0 < history.update_reference < update / HARMFUL_UPDATE


def _message(snapshot: Snapshot, history: History, surprise: float) -> str:
    usual = median(history.norms[:-1])
    loss = "" if snapshot.loss is None else f", the loss is {snapshot.loss:.4g}"
    return (
        f"The gradient norm jumps to {snapshot.global_norm:.3g}, {surprise:.0f} deviations above the newest "
        f"steps (usually {usual:.3g}){loss}."
    )

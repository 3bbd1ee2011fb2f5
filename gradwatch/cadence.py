"""Which steps are measured in detail and which forward passes are read."""

from __future__ import annotations

DENSE_STEPS = 20
"""The detail tier is measured at each of the first steps,"""
DETAIL_EVERY = 10
"""later at every tenth, and whenever evidence is open."""
PROBED_STEPS, PROBED, PROBE_EVERY = 3, 2, 50
"""The probe reads the forward pass of the first three steps, of two in every fifty, and while evidence is open."""


def detail_is_due(step: int, *, wanted: bool, log_every: int = DETAIL_EVERY, log_first: int = 0) -> bool:
    """Whether a step is measured in detail: the first ones, about every tenth, and on demand.

    The steps that are logged are among them, or the curves of the detail statistics would end with the dense steps:
    all of them, or about every tenth step where more are logged.
    """
    if step < DENSE_STEPS or wanted:
        return True
    aligned = log_every * -(-DETAIL_EVERY // log_every)
    if (step - log_first) % aligned == 0:
        return True
    return log_every > DETAIL_EVERY and step % DETAIL_EVERY == 0


def probe_is_due(step: int, *, wanted: bool) -> bool:
    """Whether the forward pass of a step is read."""
    return step < PROBED_STEPS or step % PROBE_EVERY < PROBED or wanted

"""Which detectors run, and how those of the user are made ready."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import cast

from gradwatch.detectors.accumulation import accumulation
from gradwatch.detectors.dead import dead
from gradwatch.detectors.exploding import exploding
from gradwatch.detectors.nonfinite import nonfinite
from gradwatch.detectors.saturated import saturated
from gradwatch.detectors.spike import spike
from gradwatch.detectors.stalled import stalled
from gradwatch.detectors.unoptimized import unoptimized
from gradwatch.detectors.vanishing import vanishing
from gradwatch.errors import ConfigurationError
from gradwatch.history import Detector

DEFAULT_DETECTORS: tuple[Detector, ...] = (
    nonfinite,
    accumulation,
    unoptimized,
    saturated,
    dead,
    vanishing,
    exploding,
    stalled,
    spike,
)
"""What `watch` uses unless it is given others."""


def build(detectors: Iterable[object]) -> tuple[Detector, ...]:
    """Make the detectors of one optimizer: functions as they are, classes and partials of classes called once.

    Raises:
        ConfigurationError: something is not callable, or is an instance, whose memory two optimizers would share.
    """
    return tuple(_build(detector) for detector in detectors)


def _build(detector: object) -> Detector:
    if not callable(detector):
        raise ConfigurationError(f"a detector is a function of a Snapshot and a History, got {detector!r}")
    made = detector.func if isinstance(detector, partial) else detector
    if isinstance(made, type):
        return cast("Detector", detector())
    if not hasattr(made, "__name__"):
        raise ConfigurationError(
            f"got an instance of {type(made).__name__} as a detector, whose memory several optimizers would share; "
            f"pass the class, or functools.partial({type(made).__name__}, ...)"
        )
    return cast("Detector", detector)

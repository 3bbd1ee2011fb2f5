"""One file an alert kind; each turns a Snapshot and the past into Evidence."""

from gradwatch.detectors.build import DEFAULT_DETECTORS, build

__all__ = ["DEFAULT_DETECTORS", "build"]

"""From an alert to its causes: what else was read says why, and the cause says what to write."""

from gradwatch.diagnosis.rules import diagnose

__all__ = ["diagnose"]

"""Watches the gradients of a PyTorch training run: `gradwatch.watch(model, optimizer)`."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gradwatch.api import watch
    from gradwatch.detectors import DEFAULT_DETECTORS
    from gradwatch.errors import ConfigurationError
    from gradwatch.history import History
    from gradwatch.integrations.lightning import GradWatchCallback
    from gradwatch.pipeline import GradWatch
    from gradwatch.records import Alert, Evidence, Intervention, Sink, Snapshot
    from gradwatch.sinks import ConsoleSink, JSONLSink, MemorySink, TensorBoardSink

__all__ = [
    "DEFAULT_DETECTORS",
    "Alert",
    "ConfigurationError",
    "ConsoleSink",
    "Evidence",
    "GradWatch",
    "GradWatchCallback",
    "History",
    "Intervention",
    "JSONLSink",
    "MemorySink",
    "Sink",
    "Snapshot",
    "TensorBoardSink",
    "watch",
]

_HOME = {
    "DEFAULT_DETECTORS": "gradwatch.detectors",
    "Alert": "gradwatch.records",
    "ConfigurationError": "gradwatch.errors",
    "ConsoleSink": "gradwatch.sinks",
    "Evidence": "gradwatch.records",
    "GradWatch": "gradwatch.pipeline",
    "GradWatchCallback": "gradwatch.integrations.lightning",
    "History": "gradwatch.history",
    "Intervention": "gradwatch.records",
    "JSONLSink": "gradwatch.sinks",
    "MemorySink": "gradwatch.sinks",
    "Sink": "gradwatch.records",
    "Snapshot": "gradwatch.records",
    "TensorBoardSink": "gradwatch.sinks",
    "watch": "gradwatch.api",
}


def __getattr__(name: str) -> object:
    """Import public names when they are first used: whoever reads the records need not load torch."""
    if name not in _HOME:
        raise AttributeError(f"module 'gradwatch' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)

"""Watches the gradients of a PyTorch training run: `gradwatch.watch(model, optimizer)`."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gradwatch.api import watch
    from gradwatch.detectors import DEFAULT_DETECTORS
    from gradwatch.errors import ConfigurationError, TrainingStopped
    from gradwatch.history import History
    from gradwatch.initialization import init_, lsuv_
    from gradwatch.integrations.lightning import GradWatchCallback
    from gradwatch.pipeline import GradWatch
    from gradwatch.reactions import BackOffLR, Rollback, SaveCheckpoint, StopTraining, on
    from gradwatch.records import Alert, Cause, Evidence, Intervention, Sink, Snapshot
    from gradwatch.sinks import ConsoleSink, JSONLSink, MemorySink, TensorBoardSink
    from gradwatch.transforms import (
        AdaGC,
        AdaptiveGradientClip,
        AutoClip,
        ClipByGlobalNorm,
        ClipByTensorNorm,
        ClipByValue,
        DryRun,
        Gradients,
        SkipNonfinite,
        SkipSpike,
        ZClip,
    )

__all__ = [
    "DEFAULT_DETECTORS",
    "AdaGC",
    "AdaptiveGradientClip",
    "Alert",
    "AutoClip",
    "BackOffLR",
    "Cause",
    "ClipByGlobalNorm",
    "ClipByTensorNorm",
    "ClipByValue",
    "ConfigurationError",
    "ConsoleSink",
    "DryRun",
    "Evidence",
    "GradWatch",
    "GradWatchCallback",
    "Gradients",
    "History",
    "Intervention",
    "JSONLSink",
    "MemorySink",
    "Rollback",
    "SaveCheckpoint",
    "Sink",
    "SkipNonfinite",
    "SkipSpike",
    "Snapshot",
    "StopTraining",
    "TensorBoardSink",
    "TrainingStopped",
    "ZClip",
    "init_",
    "lsuv_",
    "on",
    "watch",
]

_HOME = {
    "AdaGC": "gradwatch.transforms",
    "AdaptiveGradientClip": "gradwatch.transforms",
    "Alert": "gradwatch.records",
    "AutoClip": "gradwatch.transforms",
    "BackOffLR": "gradwatch.reactions",
    "Cause": "gradwatch.records",
    "ClipByGlobalNorm": "gradwatch.transforms",
    "ClipByTensorNorm": "gradwatch.transforms",
    "ClipByValue": "gradwatch.transforms",
    "ConfigurationError": "gradwatch.errors",
    "ConsoleSink": "gradwatch.sinks",
    "DEFAULT_DETECTORS": "gradwatch.detectors",
    "DryRun": "gradwatch.transforms",
    "Evidence": "gradwatch.records",
    "GradWatch": "gradwatch.pipeline",
    "GradWatchCallback": "gradwatch.integrations.lightning",
    "Gradients": "gradwatch.transforms",
    "History": "gradwatch.history",
    "Intervention": "gradwatch.records",
    "JSONLSink": "gradwatch.sinks",
    "MemorySink": "gradwatch.sinks",
    "Rollback": "gradwatch.reactions",
    "SaveCheckpoint": "gradwatch.reactions",
    "Sink": "gradwatch.records",
    "SkipNonfinite": "gradwatch.transforms",
    "SkipSpike": "gradwatch.transforms",
    "Snapshot": "gradwatch.records",
    "StopTraining": "gradwatch.reactions",
    "TensorBoardSink": "gradwatch.sinks",
    "TrainingStopped": "gradwatch.errors",
    "ZClip": "gradwatch.transforms",
    "init_": "gradwatch.initialization",
    "lsuv_": "gradwatch.initialization",
    "on": "gradwatch.reactions",
    "watch": "gradwatch.api",
}


def __getattr__(name: str) -> object:
    """Import public names when they are first used: whoever reads the records need not load torch."""
    if name not in _HOME:
        raise AttributeError(f"module 'gradwatch' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)

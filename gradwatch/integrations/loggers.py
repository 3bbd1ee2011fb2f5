"""Sinks that a framework or the user owns: Lightning's loggers, and sinks that outlive one fit."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from gradwatch.records import Alert, Intervention, Sink, Snapshot
from gradwatch.schema import scalar_tag
from gradwatch.sinks import TensorBoardSink
from gradwatch.sinks.cadence import Cadence


class LoggerSink:
    """Writes to a Trainer's loggers, at the steps at which Lightning logs.

    A TensorBoard logger gets everything in the event file that it has; others get the scalars by `log_metrics`, with
    the same names at every step (a CSV file is written anew for each name that is added).
    """

    def __init__(self, loggers: Iterable[Any], log_every: int) -> None:
        every = max(int(log_every), 1)
        self._cadence = Cadence(every, first=every - 1)
        self._tables: list[Sink] = []
        self._loggers = []
        for logger in loggers:
            experiment: Any = getattr(logger, "experiment", None)
            if hasattr(experiment, "_get_file_writer"):
                self._tables.append(TensorBoardSink(experiment, log_every=every, first=every - 1))
            else:
                self._loggers.append(logger)

    def write(self, snapshot: Snapshot, alerts: tuple[Alert, ...], interventions: tuple[Intervention, ...]) -> None:
        """Write one step, if it is due or brings news."""
        for table in self._tables:
            table.write(snapshot, alerts, interventions)
        if self._loggers and (alerts or self._cadence.is_due(snapshot)):
            metrics = {scalar_tag(snapshot, name): value for name, value in _metrics(snapshot).items()}
            for logger in self._loggers:
                logger.log_metrics(metrics, step=snapshot.log_step)

    def flush(self) -> None:
        """Bring everything to the disk."""
        for table in self._tables:
            table.flush()

    def close(self) -> None:
        """Leave the loggers to their Trainer."""
        for table in self._tables:
            table.close()


class Borrowed:
    """A sink of the user's that is flushed, not closed: the next fit may use it again."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self.write, self.flush, self.close = sink.write, sink.flush, sink.flush


def _metrics(snapshot: Snapshot) -> dict[str, float]:
    total = math.nan if snapshot.global_norm is None else snapshot.global_norm
    ratios = snapshot.update_ratio[np.isfinite(snapshot.update_ratio)]
    return {
        "global_norm": total,
        "clipped_norm": math.nan if snapshot.clipped_norm is None else snapshot.clipped_norm,
        "update_ratio_median": float(np.median(ratios)) if ratios.size else math.nan,
        "nonfinite": float(np.nansum(snapshot.nonfinite)),
        "skipped": float(snapshot.skipped),
    }

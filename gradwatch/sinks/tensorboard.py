"""Writes to TensorBoard: one event a logged step, however many layers there are."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.histogram_pb2 import HistogramProto
from tensorboard.compat.proto.summary_pb2 import DATA_CLASS_TENSOR, Summary, SummaryMetadata
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
from tensorboard.compat.proto.types_pb2 import DT_FLOAT, DT_STRING
from tensorboard.plugins.text.plugin_data_pb2 import TextPluginData

from gradwatch import schema
from gradwatch.errors import ConfigurationError
from gradwatch.records import LOWEST_OCTAVE, Alert, Floats, Intervention, Snapshot
from gradwatch.sinks.blocks import block_norms
from gradwatch.sinks.cadence import Cadence
from gradwatch.sinks.event_file import BorrowedFile, EventFile, OwnFile

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

HISTOGRAM_EVERY = 5
"""Logged steps from one histogram to the next."""


class TensorBoardSink:
    """Writes scalars, the table of statistics, a histogram and alerts for TensorBoard.

    Args:
        log_dir: a folder, or a ``SummaryWriter`` of torch or tensorboardX (also a Lightning logger's ``experiment``).
        log_every: one step in so many is written, and each step with news of an alert.
        first: the first of them.

    Raises:
        ConfigurationError: the folder cannot be written, or what was passed is neither a folder nor a writer.
    """

    def __init__(self, log_dir: str | os.PathLike[str] | SummaryWriter, *, log_every: int = 10, first: int = 0) -> None:
        self._cadence = Cadence(log_every, first)
        self._file = _event_file(log_dir)
        self._process = os.getpid()
        self._closed = False
        self._known: set[str] = set()
        self._largest: dict[str, float] = {}
        self._last_histogram: dict[str, int] = {}
        self._open: set[tuple[str, str, int]] = set()

    def write(self, snapshot: Snapshot, alerts: tuple[Alert, ...], interventions: tuple[Intervention, ...]) -> None:
        """Write one step, if it is due or brings news."""
        if self._closed or os.getpid() != self._process:  # a forked child would wait for a thread it does not have
            return
        self._remember(snapshot, alerts)
        if not (alerts or interventions or self._cadence.is_due(snapshot)):
            return
        values = [*self._statistics(snapshot), *self._scalars(snapshot), *self._alerts(alerts)]
        if interventions:
            values.append(_text(schema.INTERVENTION_TEXT_TAG, schema.intervention_table(interventions)))
        if snapshot.histogram is not None and self._histogram_is_due(snapshot):
            values.append(_histogram(snapshot, snapshot.histogram))
        event = Event(wall_time=time.time(), step=snapshot.log_step, summary=Summary(value=values))
        self._file.add(event)
        self._largest.pop(snapshot.optimizer, None)
        if any(alert.severity == "critical" for alert in alerts):
            self.flush()

    def flush(self) -> None:
        """Bring everything to the disk."""
        if os.getpid() == self._process:
            self._file.flush()

    def close(self) -> None:
        """Close our own file; a borrowed writer is flushed and left open."""
        if not self._closed and os.getpid() == self._process:
            self._closed = True
            self._file.close()

    def _remember(self, snapshot: Snapshot, alerts: Iterable[Alert]) -> None:
        """Keep the largest norm since the last event, so that no spike is lost between two, and what is open."""
        if snapshot.global_norm is not None:
            before = self._largest.get(snapshot.optimizer, 0.0)
            self._largest[snapshot.optimizer] = max(before, snapshot.global_norm)
        for alert in alerts:
            (self._open.add if alert.resolved is None else self._open.discard)(alert.key)

    def _histogram_is_due(self, snapshot: Snapshot) -> bool:
        last = self._last_histogram.get(snapshot.optimizer)
        due = last is None or snapshot.step - last >= HISTOGRAM_EVERY * self._cadence.log_every
        if due:
            self._last_histogram[snapshot.optimizer] = snapshot.step
        return due

    def _scalars(self, snapshot: Snapshot) -> Iterator[Summary.Value]:
        for name, value in self._numbers(snapshot):
            if value is not None and math.isfinite(value):
                yield Summary.Value(tag=schema.scalar_tag(snapshot, name), simple_value=value)
        for block, norm in block_norms(snapshot).items():
            if norm > 0:
                yield Summary.Value(tag=schema.block_tag(snapshot, block), simple_value=math.log10(norm))

    def _numbers(self, snapshot: Snapshot) -> Iterator[tuple[str, float | None]]:
        total = snapshot.global_norm
        yield "global_norm", total
        yield "global_norm_max", self._largest.get(snapshot.optimizer)
        yield "log10_global_norm", math.log10(total) if total else None
        yield "clipped_norm", snapshot.clipped_norm
        yield "clip_coefficient", snapshot.clip_coefficient
        yield "clip_rate", snapshot.clip_rate
        for name, factor in snapshot.factors.items():
            yield f"clip_factor/{name}", factor
        yield "learning_rate_factor", snapshot.rate_factor if snapshot.rate_factor != 1 else None
        yield "loss", snapshot.loss
        yield "loss_scale", snapshot.loss_scale
        yield "nonfinite", float(np.nansum(snapshot.nonfinite))
        yield "skipped", float(snapshot.skipped)
        yield "open_alerts", float(len(self._open))
        several = len(snapshot.learning_rates) > 1
        for group, rate in enumerate(snapshot.learning_rates[:MAX_GROUPS]):
            yield f"learning_rate/{group}" if several else "learning_rate", rate
        ratios = snapshot.update_ratio[np.isfinite(snapshot.update_ratio)]
        if ratios.size:
            yield "update_ratio_median", float(np.median(ratios))
            yield "update_ratio_min", float(ratios.min())
            yield "update_ratio_max", float(ratios.max())

    def _statistics(self, snapshot: Snapshot) -> Iterator[Summary.Value]:
        text = schema.schema_json(snapshot.tensors)
        identity = schema.schema_id(text)
        if identity not in self._known:
            self._known.add(identity)
            yield _strings(schema.schema_tag(identity), [text], schema.PLUGIN)
        for name in schema.STATISTICS:
            values = getattr(snapshot, name)
            if not np.isnan(values).all():
                content = json.dumps({"v": schema.VERSION, "schema": identity, "statistic": name}).encode()
                yield _vector(schema.statistic_tag(identity, name), values, content)

    def _alerts(self, alerts: tuple[Alert, ...]) -> Iterator[Summary.Value]:
        if alerts:
            records = [json.dumps(schema.alert_object(alert)) for alert in alerts]
            yield _strings(schema.ALERT_TAG, records, schema.ALERT_PLUGIN)
            yield _text(schema.ALERT_TEXT_TAG, schema.alert_table(alerts))


MAX_GROUPS = 10
"""Parameter groups whose learning rate is shown."""


def _event_file(log_dir: str | os.PathLike[str] | SummaryWriter) -> EventFile:
    if isinstance(log_dir, str | os.PathLike):
        return OwnFile(log_dir)
    if hasattr(log_dir, "_get_file_writer"):
        return BorrowedFile(log_dir)
    raise ConfigurationError(
        f"log_dir must be a folder or a SummaryWriter, got {type(log_dir).__module__}.{type(log_dir).__qualname__}"
    )


def _metadata(plugin: str, content: bytes = b"") -> SummaryMetadata:
    # Without a data class the tag is invisible to every reader.
    data = SummaryMetadata.PluginData(plugin_name=plugin, content=content)
    return SummaryMetadata(plugin_data=data, data_class=DATA_CLASS_TENSOR)


def _shape(length: int) -> TensorShapeProto:
    return TensorShapeProto(dim=[TensorShapeProto.Dim(size=length)])


def _vector(tag: str, values: Floats, content: bytes) -> Summary.Value:
    packed = values.astype("<f4").tobytes()
    tensor = TensorProto(dtype=DT_FLOAT, tensor_shape=_shape(len(values)), tensor_content=packed)
    return Summary.Value(tag=tag, metadata=_metadata(schema.PLUGIN, content), tensor=tensor)


def _strings(tag: str, strings: list[str], plugin: str) -> Summary.Value:
    encoded = [string.encode() for string in strings]
    tensor = TensorProto(dtype=DT_STRING, tensor_shape=_shape(len(strings)), string_val=encoded)
    return Summary.Value(tag=tag, metadata=_metadata(plugin), tensor=tensor)


def _text(tag: str, text: str) -> Summary.Value:
    tensor = TensorProto(dtype=DT_STRING, tensor_shape=_shape(1), string_val=[text.encode()])
    metadata = _metadata("text", TextPluginData(version=0).SerializeToString())
    return Summary.Value(tag=tag, metadata=metadata, tensor=tensor)


def _histogram(snapshot: Snapshot, octaves: Floats) -> Summary.Value:
    """Count the elements of all gradients by log2 of their magnitude, each tensor's sample grown to its size."""
    sampled = np.maximum(octaves.sum(axis=1), 1)
    elements = snapshot.tensors.numel * (1 - np.nan_to_num(snapshot.zero_fraction))
    counts = (octaves * (elements / sampled)[:, None]).sum(axis=0)
    filled = np.flatnonzero(counts)
    first, last = (int(filled[0]), int(filled[-1]) + 1) if filled.size else (0, 1)
    counts, edges = counts[first:last], LOWEST_OCTAVE + np.arange(first, last + 1)
    middle = edges[:-1] + 0.5
    histogram = HistogramProto(
        min=edges[0],
        max=edges[-1],
        num=counts.sum(),
        sum=(counts * middle).sum(),
        sum_squares=(counts * middle**2).sum(),
        bucket_limit=edges[1:].tolist(),
        bucket=counts.tolist(),
    )
    return Summary.Value(tag=schema.scalar_tag(snapshot, "log2_gradient"), histo=histogram)

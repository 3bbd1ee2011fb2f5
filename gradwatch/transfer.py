"""The only way of numbers from the device to the host: one copy a step, and nobody waits for it."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from gradwatch.records import Floats
from gradwatch.table import StatTable, columns

Note = TypeVar("Note")

SPARES = 8
"""Buffers kept for later: their size changes with the tier and with the scalars that are sent."""


@dataclass(frozen=True, slots=True, eq=False)
class Delivery(Generic[Note]):
    """One step's numbers on the host, with the note that was sent along."""

    columns: dict[str, Floats]
    histogram: Floats | None
    scalars: dict[str, float]
    note: Note
    readings: tuple[Floats, ...] = ()
    """The probe's tables, one a model."""


@dataclass(frozen=True, slots=True, eq=False)
class _Parcel(Generic[Note]):
    """Numbers under way; `arrival` is None once they are on the host."""

    buffer: Tensor
    shape: tuple[int, int]
    missing: tuple[int, ...]
    names: tuple[str, ...]
    host_scalars: dict[str, float]
    note: Note
    readings: tuple[tuple[int, int], ...]
    arrival: torch.cuda.Event | None = None


class Transfer(Generic[Note]):
    """Sends tables and hands them out in order, each when it has arrived.

    On CUDA a side stream copies into pinned memory, so that neither the host nor the next kernel waits; buffers are
    used again when their numbers have been read. If the host runs ahead of the device the pool grows by a buffer
    a step: nothing is dropped, and nothing waits.
    """

    def __init__(self) -> None:
        self._under_way: deque[_Parcel[Note]] = deque()
        self._ready: deque[Delivery[Note]] = deque()
        self._spare: list[Tensor] = []
        self._stream: torch.cuda.Stream | None = None

    def send(
        self, table: StatTable, scalars: Mapping[str, Tensor | float], note: Note, readings: Sequence[Tensor] = ()
    ) -> None:
        """Send one step's table, scalars and probe readings, wherever they are."""
        values = table.values
        if isinstance(values, np.ndarray):
            host = {name: _to_float(scalar) for name, scalar in scalars.items()}
            arrived = tuple(_to_host(reading) for reading in readings)
            self._ready.append(Delivery(*columns(values, table.missing), host, note, arrived))
            return
        on_device = {
            name: scalar
            for name, scalar in scalars.items()
            if isinstance(scalar, Tensor) and scalar.device == values.device
        }
        host = {name: _to_float(scalar) for name, scalar in scalars.items() if name not in on_device}
        parts = [values, *on_device.values(), *readings]
        flat = torch.cat([part.reshape(-1).to(values.device, values.dtype, non_blocking=True) for part in parts])
        shape = (int(values.shape[0]), int(values.shape[1]))
        shapes = tuple((int(reading.shape[0]), int(reading.shape[1])) for reading in readings)
        buffer, arrival = self._copy(flat)
        self._under_way.append(_Parcel(buffer, shape, table.missing, tuple(on_device), host, note, shapes, arrival))

    def arrived(self) -> list[Delivery[Note]]:
        """Return what has arrived since the last call, in order of sending; never waits."""
        while self._under_way and _has_arrived(self._under_way[0]):
            self._unpack(self._under_way.popleft())
        ready = list(self._ready)
        self._ready.clear()
        return ready

    def drain(self) -> list[Delivery[Note]]:
        """Wait for what is under way and return all of it."""
        if self._under_way:
            _wait(self._under_way[-1])
        return self.arrived()

    def _unpack(self, parcel: _Parcel[Note]) -> None:
        numbers = parcel.buffer.numpy().astype(np.float64)  # a copy: the buffer is used again
        size = parcel.shape[0] * parcel.shape[1]
        values = numbers[:size].reshape(parcel.shape)
        end = size + len(parcel.names)
        scalars = dict(zip(parcel.names, map(float, numbers[size:end]), strict=True))
        readings = []
        for rows, width in parcel.readings:
            readings.append(numbers[end : end + rows * width].reshape(rows, width))
            end += rows * width
        self._spare.append(parcel.buffer)
        self._ready.append(
            Delivery(
                *columns(values, parcel.missing), scalars | parcel.host_scalars, parcel.note, readings=tuple(readings)
            )
        )

    def _copy(self, flat: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
        if flat.is_cuda:  # needs another device
            return self._copy_aside(flat)
        buffer = self._buffer(flat, pinned=False)
        # Other accelerators have no events that work everywhere: their copy waits.
        return buffer.copy_(flat), None

    def _copy_aside(self, flat: Tensor) -> tuple[Tensor, torch.cuda.Event]:  # needs another device
        """Copy on a side stream: on the main one the copy would delay the next kernel."""
        if self._stream is None:
            self._stream = torch.cuda.Stream(flat.device)
        buffer = self._buffer(flat, pinned=True)
        self._stream.wait_stream(torch.cuda.current_stream(flat.device))
        with torch.cuda.stream(self._stream):
            buffer.copy_(flat, non_blocking=True)
            flat.record_stream(self._stream)
            arrival = torch.cuda.Event()
            arrival.record(self._stream)
        return buffer, arrival

    def _buffer(self, like: Tensor, *, pinned: bool) -> Tensor:
        for index, spare in enumerate(self._spare):
            if spare.shape == like.shape and spare.dtype == like.dtype:
                return self._spare.pop(index)
        del self._spare[:-SPARES]
        return torch.empty(like.shape, dtype=like.dtype, pin_memory=pinned)


def _to_float(scalar: Tensor | float) -> float:
    """Read a scalar that is not on the table's device; one on the CPU, normally, where nobody has to wait."""
    return float(scalar)


def read_flag(flag: Tensor) -> bool:
    """Wait for one flag: the price of a skip before an optimizer that is not fused."""
    return bool(flag)


def _to_host(reading: Tensor) -> Floats:
    """Read a probe's table beside gradients that NumPy measured: it lies on the CPU too."""
    return reading.to(torch.float64).numpy()


def _has_arrived(parcel: _Parcel[Note]) -> bool:
    return parcel.arrival is None or bool(parcel.arrival.query())


def _wait(parcel: _Parcel[Note]) -> None:
    if parcel.arrival is not None:  # needs another device
        parcel.arrival.synchronize()

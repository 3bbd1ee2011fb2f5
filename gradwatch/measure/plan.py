"""Chooses how to measure: one meter for one list of parameters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor

from gradwatch.errors import ConfigurationError
from gradwatch.measure.cpu import CpuMeter
from gradwatch.measure.foreach import ForeachMeter
from gradwatch.records import Floats
from gradwatch.table import StatTable, rows

Backend: TypeAlias = Literal["cpu", "foreach"]


class Meter(Protocol):
    """Measures the gradients of a fixed list of parameters; this is where another backend fits in."""

    def measure(
        self, grads: Sequence[Tensor | None], *, divisor: Tensor | float | None = None, detail: bool
    ) -> StatTable:
        """Return the table of one step; what `divisor` still multiplies in the gradients is divided out."""

    def norms(self, grads: Sequence[Tensor | None], positions: Sequence[int] | None = None) -> Floats | Tensor:
        """Return the norm of the gradients at `positions`, or of all; NaN for a missing one."""

    def sample_before(self) -> None:
        """Remember the sampled weights, right before the update."""

    def sample_after(self, table: StatTable) -> None:
        """Write what the update did to them into the table."""


def check(params: Iterable[Tensor], backend: object) -> None:
    """Refuse a backend that there is not, or that cannot measure where the parameters are.

    Raises:
        ConfigurationError: says what to write instead.
    """
    if backend not in (None, "cpu", "foreach"):
        raise ConfigurationError(f"backend must be 'cpu', 'foreach' or None, got {backend!r}")
    if backend == "cpu" and any(param.device.type != "cpu" for param in params):
        raise ConfigurationError("backend='cpu' measures parameters on the CPU only; leave backend out")


def plan(params: Sequence[Tensor], *, backend: Backend | None = None) -> Meter:
    """Return the meter for these parameters: NumPy on the CPU, pure torch elsewhere, or what `backend` says."""
    by_device: dict[torch.device, list[int]] = {}
    for index, param in enumerate(params):
        by_device.setdefault(param.device, []).append(index)
    if len(by_device) <= 1:
        return _meter(params, backend)
    return SplitMeter({tuple(at): _meter([params[i] for i in at], backend) for at in by_device.values()})


def _meter(params: Sequence[Tensor], backend: Backend | None) -> Meter:
    on_cpu = all(param.device.type == "cpu" for param in params)
    return CpuMeter(params) if on_cpu and backend != "foreach" else ForeachMeter(params)


class SplitMeter:
    """Measures parameters on several devices, each where it is, into one table on the first accelerator."""

    def __init__(self, meters: Mapping[tuple[int, ...], Meter]) -> None:
        self._meters = meters
        self._tables: dict[tuple[int, ...], StatTable] = {}

    def measure(
        self, grads: Sequence[Tensor | None], *, divisor: Tensor | float | None = None, detail: bool
    ) -> StatTable:
        """Measure each part on its own device."""
        self._tables = {
            at: meter.measure([grads[index] for index in at], divisor=divisor, detail=detail)
            for at, meter in self._meters.items()
        }
        missing = tuple(index for index, grad in enumerate(grads) if grad is None)
        parts = {at: torch.as_tensor(table.values) for at, table in self._tables.items()}
        return StatTable(self._joined(parts, rows(detail=detail)), missing)

    def norms(self, grads: Sequence[Tensor | None], positions: Sequence[int] | None = None) -> Tensor:
        """Return the norms in the order of the parameters."""
        parts = {
            at: torch.as_tensor(meter.norms([grads[index] for index in at]))[None] for at, meter in self._meters.items()
        }
        norms = self._joined(parts, 1)[0]
        return norms if positions is None else norms[list(positions)]

    def sample_before(self) -> None:
        """Remember the sampled weights of each part."""
        for meter in self._meters.values():
            meter.sample_before()

    def sample_after(self, table: StatTable) -> None:
        """Compare each part, and join the tables again."""
        for at, meter in self._meters.items():
            meter.sample_after(self._tables[at])
        parts = {at: torch.as_tensor(part.values) for at, part in self._tables.items()}
        if isinstance(table.values, Tensor):
            table.values.copy_(self._joined(parts, table.values.shape[0]))

    def _joined(self, parts: Mapping[tuple[int, ...], Tensor], height: int) -> Tensor:
        device = next((part.device for part in parts.values() if part.device.type != "cpu"), torch.device("cpu"))
        joined = torch.full((height, sum(map(len, parts))), torch.nan, dtype=torch.float64, device=device)
        for at, part in parts.items():
            joined[:, list(at)] = part.to(device, torch.float64, non_blocking=True)
        return joined


def as_array(norms: Floats | Tensor) -> Floats:
    """Norms of CPU tensors as an array."""
    return np.asarray(norms, dtype=np.float64)

"""Measures parameters on the CPU, in NumPy: the numbers are on the host at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gradwatch.measure.blocks import Blocks
from gradwatch.measure.sample import GRID_COLUMNS, GRID_ROWS, flat, is_dense, places, real
from gradwatch.records import LOWEST_OCTAVE, OCTAVES, Floats, GradientState
from gradwatch.table import HISTOGRAM, ROW, StatTable, rows

CHUNK = 32_768
"""The sample is worked on in chunks of about so many elements: temporary memory does not grow with the tensors."""


class CpuMeter:
    """Measures one list of parameters; everything that can be is decided here, once."""

    def __init__(self, params: Sequence[Tensor]) -> None:
        self._params = list(params)
        self._numel = np.array([param.numel() for param in params], dtype=np.int64)
        self._blocks = Blocks(params)
        self._sample = CpuSample(self._params)

    def measure(
        self, grads: Sequence[Tensor | None], *, divisor: Tensor | float | None = None, detail: bool
    ) -> StatTable:
        """Fill the table of one step."""
        missing = tuple(index for index, grad in enumerate(grads) if grad is None)
        found = self._blocks.reduce(grads, sums=detail)
        values = np.full((rows(detail=detail), len(grads)), np.nan)
        scale = 1.0 if divisor is None else float(divisor)
        values[ROW["norm"]] = found.norm / scale
        values[ROW["max_abs"]] = self._magnitudes(found.peak, found.norm, grads) / scale
        values[ROW["nonfinite"]] = found.nonfinite
        anything = (found.peak > 0) | (found.nonfinite > 0)
        values[ROW["state"]] = np.where(anything, GradientState.VALUE, GradientState.ZERO)
        if detail:
            finite = np.maximum(self._numel - found.nonfinite, 1)
            values[ROW["mean"]] = found.total / scale / finite
            values[ROW["zero_fraction"]] = self._zero_fraction(found.zeros, grads)
            values[ROW["weight_norm"]] = self._blocks.reduce(self._params, sums=False).norm
            self._sample.look_at(grads, values, scale)
        return StatTable(values, missing)

    def norms(self, grads: Sequence[Tensor | None], positions: Sequence[int] | None = None) -> Floats:
        """Return the norm of some gradients, or of all; NaN for a missing one."""
        chosen = range(len(grads)) if positions is None else positions
        wanted: list[Tensor | None] = [None] * len(grads)
        for index in chosen:
            wanted[index] = grads[index]
        norm = self._blocks.reduce(wanted, sums=False).norm
        return np.array([np.nan if grads[index] is None else norm[index] for index in chosen])

    def sample_before(self) -> None:
        """Remember the sampled weights, right before the update."""
        self._sample.remember()

    def sample_after(self, table: StatTable) -> None:
        """Compare them with the weights right after it."""
        if isinstance(table.values, np.ndarray):
            self._sample.compare(table.values)

    def _magnitudes(self, peak: Floats, norm: Floats, grads: Sequence[Tensor | None]) -> Floats:
        """|g| of a complex element, which is not the larger of its parts."""
        complex_ones = [i for i, param in enumerate(self._params) if param.is_complex() and grads[i] is not None]
        for index in complex_ones:
            grad = grads[index]
            magnitudes = flat(grad).abs() if grad is not None and grad.numel() else torch.zeros(1)
            finite = torch.where(magnitudes.isfinite(), magnitudes, 0.0)
            peak[index] = min(float(finite.amax()), norm[index])
        return peak

    def _zero_fraction(self, zeros: Floats, grads: Sequence[Tensor | None]) -> Floats:
        """Share of exact zeros; a sparse gradient is zero where it stores nothing."""
        share = zeros / np.maximum(self._numel, 1)
        for index, grad in enumerate(grads):
            if grad is None or not (grad.layout != torch.strided or grad.is_complex()):
                continue
            stored = real(grad)
            parts = 2 if grad.is_complex() else 1
            nonzero = torch.count_nonzero(stored.reshape(-1, parts).abs().sum(1))
            share[index] = 1.0 - int(nonzero) / max(int(self._numel[index]), 1)
        return share


class CpuSample:
    """The sampled elements: magnitudes and rows of the gradient, weights before and after the update."""

    def __init__(self, params: Sequence[Tensor]) -> None:
        self._params = params
        self._places = places([real(param) for param in params])
        wide = any(param.dtype in (torch.float64, torch.complex128) for param in params)
        self._dtype = np.float64 if wide else np.float32
        sizes = np.array([len(place.elements) for place in self._places], dtype=np.int64)
        self._numel = np.array([real(param).numel() for param in params], dtype=np.int64)
        self._sizes, self._ends = sizes, np.cumsum(sizes)
        self._weights = np.zeros(int(sizes.sum()), dtype=self._dtype)
        self._has_gradient = np.zeros(int(sizes.sum()), dtype=bool)
        self._moved_between = np.full(len(params), np.nan)
        self._looked = False
        self._chunks = list(_chunks(sizes))

    def look_at(self, grads: Sequence[Tensor | None], values: Floats, scale: float) -> None:
        """Fill in the histogram and the spreads of rows, and note which sampled elements have a gradient."""
        self._has_gradient[:] = False
        values[HISTOGRAM] = 0.0
        for index, (grad, param, place) in enumerate(zip(grads, self._params, self._places, strict=True)):
            values[ROW["weight_row_spread"], index] = _spread(self._take(param, place.grid))
            if grad is None or grad.layout != torch.strided or grad.stride() != param.stride():
                continue  # the places are those of the parameter's memory
            elements = self._take(grad, place.elements)
            self._has_gradient[self._span(index)] = elements != 0
            values[HISTOGRAM, index] = _octaves(elements, scale)
            values[ROW["row_spread"], index] = _spread(self._take(grad, place.grid))

    def remember(self) -> None:
        """Take the weights; see whether any has moved since the sampled step before."""
        for first, last in self._chunks:
            span = slice(self._start(first), self._ends[last - 1])
            before = self._weights[span].copy()
            self._gather(first, last)
            moved = np.add.reduceat(self._weights[span] != before, self._offsets(first, last), dtype=np.int64) > 0
            filled = self._sizes[first:last] > 0
            self._moved_between[first:last] = np.where(filled, moved, 0) if self._looked else np.nan

    def compare(self, values: Floats) -> None:
        """Fill in what the update did to the sampled weights."""
        for first, last in self._chunks:
            span = slice(self._start(first), self._ends[last - 1])
            before = self._weights[span].astype(np.float64)
            self._gather(first, last)
            change = self._weights[span].astype(np.float64)
            change -= before
            self._fill(values[:, first:last], first, last, before, change)
        self._looked = True

    def _fill(self, values: Floats, first: int, last: int, before: Floats, change: Floats) -> None:
        offsets, filled = self._offsets(first, last), self._sizes[first:last] > 0
        still = change == 0
        has_gradient = self._has_gradient[self._start(first) : self._ends[last - 1]]
        looked_at = np.add.reduceat(has_gradient, offsets, dtype=np.int64)
        lost = np.add.reduceat(has_gradient & still, offsets, dtype=np.int64)
        moved = (np.add.reduceat(~still, offsets, dtype=np.int64) > 0) | (self._moved_between[first:last] > 0)
        update = np.sqrt(np.add.reduceat(np.square(change, out=change), offsets))
        weight = np.sqrt(np.add.reduceat(np.square(before, out=before), offsets))
        share = np.sqrt(self._numel[first:last] / np.maximum(self._sizes[first:last], 1))
        with np.errstate(divide="ignore", invalid="ignore"):
            values[ROW["update_norm"]] = np.where(filled, update * share, 0.0)
            values[ROW["update_ratio"]] = np.where(filled, update / weight, np.nan)
            values[ROW["lost"]] = np.where(filled & (looked_at > 0), lost / looked_at, np.nan)
        known = self._looked | moved
        values[ROW["moved"]] = np.where(known, filled & moved, np.nan)

    def _gather(self, first: int, last: int) -> None:
        for index in range(first, last):
            self._weights[self._span(index)] = self._take(self._params[index], self._places[index].elements)

    def _take(self, tensor: Tensor, positions: NDArray[np.int32]) -> NDArray[np.float32 | np.float64]:
        """Read some elements of a tensor's memory; half precision has no NumPy type and is widened exactly."""
        if not len(positions):
            return np.empty(0, dtype=self._dtype)
        elements = flat(real(tensor)) if is_dense(tensor) else real(tensor).reshape(-1)
        if elements.dtype in (torch.float32, torch.float64):
            return elements.numpy().take(positions, mode="clip")
        return elements[torch.from_numpy(positions).long()].to(torch.float32).numpy()

    def _span(self, index: int) -> slice:
        return slice(int(self._ends[index] - self._sizes[index]), int(self._ends[index]))

    def _start(self, index: int) -> int:
        return int(self._ends[index] - self._sizes[index])

    def _offsets(self, first: int, last: int) -> NDArray[np.int64]:
        """Where each tensor of a chunk begins; `reduceat` wants them below the end, also those of empty tensors."""
        begins = self._ends[first:last] - self._sizes[first:last] - self._start(first)
        within: NDArray[np.int64] = np.minimum(begins, max(int(self._ends[last - 1]) - self._start(first) - 1, 0))
        return within


def _chunks(sizes: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Split the tensors into runs that hold some sampled elements each."""
    first, held = 0, 0
    for index, size in enumerate(sizes):
        held += int(size)
        if held >= CHUNK:
            yield first, index + 1
            first, held = index + 1, 0
    if held:
        yield first, len(sizes)


def _octaves(elements: NDArray[np.float32 | np.float64], scale: float) -> Floats:
    """Count finite non-zero elements by the exponent of their magnitude."""
    magnitudes = np.abs(elements)
    usable = magnitudes[(magnitudes > 0) & np.isfinite(magnitudes)]
    octaves = np.frexp(usable / scale)[1] - 1 - LOWEST_OCTAVE
    return np.bincount(np.clip(octaves, 0, OCTAVES - 1), minlength=OCTAVES).astype(np.float64)


def _spread(grid: NDArray[np.float32 | np.float64]) -> float:
    """‖rows - mean row‖ / ‖rows‖: 0 where all rows are equal, NaN where there is nothing to compare."""
    if not grid.size:
        return float("nan")
    table = grid.reshape(GRID_ROWS, GRID_COLUMNS).astype(np.float64)
    peak = float(np.abs(table).max())
    if not 0 < peak < np.inf:
        return float("nan")
    table /= peak
    return float(np.linalg.norm(table - table.mean(axis=0)) / np.linalg.norm(table))

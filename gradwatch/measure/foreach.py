"""Measures parameters on any device in pure torch: nothing here waits, and nothing branches on a number."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gradwatch.measure.sample import GRID_COLUMNS, GRID_ROWS, flat, places, real
from gradwatch.records import LOWEST_OCTAVE, OCTAVES, GradientState
from gradwatch.table import HISTOGRAM, ROW, StatTable, rows

PIECE = 262_144
"""Non-finite elements are counted in pieces of so many: the temporary is theirs, not the tensor's."""


class ForeachMeter:
    """Measures one list of parameters of one device.

    Every step brings the norm, accumulated in float64 inside the kernel, where no float32 square under- or overflows;
    a norm that is not finite is the flag for a non-finite element.
    """

    def __init__(self, params: Sequence[Tensor]) -> None:
        self._params = [param.detach() for param in params]
        device = params[0].device
        # Apple's GPU has no float64.
        self._dtype = torch.float32 if device.type == "mps" else torch.float64
        self._options = {"device": device, "dtype": self._dtype}
        self._hole = torch.zeros(1, device=device)
        self._zero: Tensor = torch.zeros((), **self._options)  # type: ignore[call-overload]
        self._numel = torch.tensor([max(p.numel(), 1) for p in params], dtype=self._dtype).to(device)
        self._empty = torch.tensor([p.numel() == 0 for p in params], dtype=self._dtype).to(device)
        self._sample = ForeachSample(self._params, self._dtype)

    @torch.no_grad()
    def measure(
        self, grads: Sequence[Tensor | None], *, divisor: Tensor | float | None = None, detail: bool
    ) -> StatTable:
        """Fill the table of one step."""
        missing = tuple(index for index, grad in enumerate(grads) if grad is None)
        present = [self._hole if grad is None else real(grad) for grad in grads]
        values = torch.full((rows(detail=detail), len(grads)), torch.nan, **self._options)  # type: ignore[call-overload]
        norm = self._norms(present)
        values[ROW["state"]] = torch.where(norm == 0, int(GradientState.ZERO), int(GradientState.VALUE))
        values[ROW["norm"]] = norm
        if detail:
            values[ROW["max_abs"]] = self._stack([self._peak(grad) for grad in grads])
            values[ROW["nonfinite"]] = self._stack([_count_nonfinite(grad, self._dtype) for grad in present])
            values[ROW["mean"]] = self._stack([grad.sum(dtype=self._dtype) for grad in present]) / self._numel
            filled = [self._hole if grad is None else grad for grad in grads]
            nonzero = self._stack([_count_nonzero(grad, self._dtype) for grad in filled])
            values[ROW["zero_fraction"]] = 1 - (nonzero + self._empty) / self._numel
            values[ROW["weight_norm"]] = self._norms([real(param) for param in self._params])
            self._sample.look_at(grads, values, divisor)
        if divisor is not None:
            for name in ("norm", "max_abs", "mean") if detail else ("norm",):
                values[ROW[name]] /= divisor
        return StatTable(values, missing)

    @torch.no_grad()
    def norms(self, grads: Sequence[Tensor | None], positions: Sequence[int] | None = None) -> Tensor:
        """Return the norm of some gradients, or of all; NaN for a missing one."""
        chosen = range(len(grads)) if positions is None else positions
        nan = self._hole / 0
        return self._norms([nan if (grad := grads[index]) is None else real(grad) for index in chosen])

    @torch.no_grad()
    def sample_before(self) -> None:
        """Remember the sampled weights, right before the update."""
        self._sample.remember()

    @torch.no_grad()
    def sample_after(self, table: StatTable) -> None:
        """Compare them with the weights right after it."""
        if isinstance(table.values, Tensor):
            self._sample.compare(table.values)

    def _norms(self, tensors: Sequence[Tensor]) -> Tensor:
        filled = [tensor if tensor.numel() else self._hole for tensor in tensors]
        norms = torch._foreach_norm(filled, 2, dtype=self._dtype)  # noqa: SLF001 - as clip_grad_norm_ does
        stacked: Tensor = torch.stack(list(norms))
        return stacked

    def _peak(self, grad: Tensor | None) -> Tensor:
        """Largest |g|; NaN or infinite beside a non-finite element."""
        if grad is None or grad.numel() == 0 or (grad.layout != torch.strided and grad._nnz() == 0):  # noqa: SLF001
            return self._zero
        stored = grad.detach() if grad.layout == torch.strided else real(grad)
        peak: Tensor = torch.linalg.vector_norm(stored, torch.inf)
        return peak.to(self._dtype)

    def _stack(self, scalars: Sequence[Tensor]) -> Tensor:
        return torch.stack([scalar.to(self._dtype) for scalar in scalars])


class ForeachSample:
    """The sampled elements as one matrix [tensors, size]; short tensors are padded, and the padding does not count."""

    def __init__(self, params: Sequence[Tensor], dtype: torch.dtype) -> None:
        self._params = params
        device = params[0].device
        chosen = places([real(param) for param in params])
        self._size = max([len(place.elements) for place in chosen] + [1])
        self._dtype = dtype
        wide = any(param.dtype in (torch.float64, torch.complex128) for param in params)
        self._elements = [torch.from_numpy(place.elements).to(device) for place in chosen]
        self._grids = {i: torch.from_numpy(place.grid).to(device) for i, place in enumerate(chosen) if len(place.grid)}
        counts = torch.tensor([len(place.elements) for place in chosen], device=device)
        numel = torch.tensor([real(param).numel() for param in params], device=device)
        self._real = torch.arange(self._size, device=device) < counts[:, None]
        self._share = (numel / counts.clamp(min=1)).sqrt().to(dtype)
        self._weights = torch.zeros(
            len(params), self._size, device=device, dtype=torch.float64 if wide else torch.float32
        )
        self._has_gradient = torch.zeros_like(self._real)
        self._moved_between = torch.full((len(params),), torch.nan, device=device, dtype=dtype)
        self._looked = False

    def look_at(self, grads: Sequence[Tensor | None], values: Tensor, divisor: Tensor | float | None) -> None:
        """Fill in the histogram and the spreads of rows, and note which sampled elements have a gradient."""
        fitting = [
            grad if grad is not None and grad.layout == torch.strided and grad.stride() == param.stride() else None
            for grad, param in zip(grads, self._params, strict=True)
        ]
        sampled = self._gather(fitting)
        self._has_gradient = sampled != 0
        values[HISTOGRAM] = self._octaves(sampled if divisor is None else sampled / divisor, values)
        for name, tensors in (("row_spread", fitting), ("weight_row_spread", self._params)):
            for index, grid in self._grids.items():
                tensor = tensors[index]
                if tensor is not None:
                    values[ROW[name], index] = _spread(flat(real(tensor))[grid], self._dtype)

    def remember(self) -> None:
        """Take the weights; see whether any has moved since the sampled step before."""
        before, self._weights = self._weights, self._gather(self._params)
        if self._looked:
            self._moved_between = (self._weights != before).any(1).to(self._dtype)

    def compare(self, values: Tensor) -> None:
        """Fill in what the update did to the sampled weights."""
        after = self._gather(self._params)
        still = after == self._weights
        looked_at = self._has_gradient.sum(1)
        change = torch.linalg.vector_norm(after - self._weights, dim=1, dtype=self._dtype)
        values[ROW["update_norm"]] = change * self._share
        values[ROW["update_ratio"]] = change / torch.linalg.vector_norm(self._weights, dim=1, dtype=self._dtype)
        values[ROW["lost"]] = (self._has_gradient & still).sum(1) / looked_at
        moved = (~still).any(1)
        if self._looked:
            values[ROW["moved"]] = (moved | (self._moved_between > 0)).to(self._dtype)
        else:
            values[ROW["moved"]] = torch.where(moved, 1.0, torch.nan)
        self._weights, self._looked = after, True

    def _gather(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """Read the sampled elements; padding and absent tensors read as 0."""
        gathered = torch.zeros_like(self._weights)
        for index, (tensor, elements) in enumerate(zip(tensors, self._elements, strict=True)):
            if tensor is not None and len(elements):
                gathered[index, : len(elements)] = flat(real(tensor)).index_select(0, elements)
        return gathered

    def _octaves(self, sampled: Tensor, values: Tensor) -> Tensor:
        """Count finite non-zero elements by the exponent of their magnitude."""
        exponents = torch.frexp(sampled)[1] - 1 - LOWEST_OCTAVE
        bins = exponents.clamp(0, OCTAVES - 1) + OCTAVES * torch.arange(len(sampled), device=sampled.device)[:, None]
        counts = ((sampled != 0) & sampled.isfinite()).to(values.dtype)
        histogram = torch.zeros(len(sampled) * OCTAVES, device=values.device, dtype=values.dtype)
        return histogram.scatter_add_(0, bins.flatten().long(), counts.flatten()).view(-1, OCTAVES).T


def _count_nonfinite(grad: Tensor, dtype: torch.dtype) -> Tensor:
    """Count NaN and infinite elements: each times 0 is NaN, which the 0-norm counts."""
    return torch.stack([_zero_norm(piece * 0, dtype) for piece in _pieces(flat(grad))]).sum()


def _count_nonzero(grad: Tensor, dtype: torch.dtype) -> Tensor:
    """Count elements that are not exactly zero; what a sparse gradient does not store is."""
    stored = grad.detach() if grad.layout == torch.strided else real(grad)
    return torch.stack([_zero_norm(piece, dtype) for piece in _pieces(stored.reshape(-1))]).sum()


def _pieces(elements: Tensor) -> Sequence[Tensor]:
    return elements.split(PIECE) if elements.numel() else [elements]


def _zero_norm(piece: Tensor, dtype: torch.dtype) -> Tensor:
    magnitudes = piece.abs() if piece.is_complex() else piece
    number: Tensor = torch.linalg.vector_norm(magnitudes, 0, dtype=dtype)
    return number


def _spread(grid: Tensor, dtype: torch.dtype) -> Tensor:
    """‖rows - mean row‖ / ‖rows‖: 0 where all rows are equal, NaN where there is nothing to compare."""
    table = grid.view(GRID_ROWS, GRID_COLUMNS).to(dtype)
    table = table / table.abs().amax()
    spread: Tensor = torch.linalg.vector_norm(table - table.mean(0)) / torch.linalg.vector_norm(table)
    return spread

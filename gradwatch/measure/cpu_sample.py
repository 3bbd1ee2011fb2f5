"""The element sample on the CPU: gathered chunk by chunk, and worked on for all tensors of a chunk at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch._utils import _flatten_dense_tensors

from gradwatch.measure.sample import GRID_COLUMNS, GRID_ROWS, Places, flat, places, real
from gradwatch.records import LOWEST_OCTAVE, OCTAVES, Floats
from gradwatch.table import HISTOGRAM, ROW

ELEMENTS, GRIDS = 16_384, 32
"""A chunk ends with so many elements or grids: temporary memory does not grow with the number of tensors."""

Values = NDArray[np.float32] | NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class _Chunk:
    """Some tensors, and where their sampled elements and grids lie in what is gathered of them."""

    rows: NDArray[np.int64]
    """Columns of the table."""
    whole: tuple[int, ...]
    """Tensors gathered as a whole, in their logical order, and"""
    picked: tuple[int, ...]
    """tensors of which some elements of their memory are."""
    starts: NDArray[np.int64]
    """Where each tensor's elements begin; they follow one another."""
    sizes: NDArray[np.int64]
    grid_rows: NDArray[np.int64]
    """Columns of the table of the tensors that have a grid, and"""
    grids: NDArray[np.int32]
    """where its elements lie: shape [tensors with a grid, rows x columns]."""
    begins: int
    """Where the chunk's elements begin among those of all tensors."""

    @property
    def span(self) -> slice:
        """The chunk's elements among those of all tensors."""
        return slice(self.begins, self.begins + int(self.sizes.sum()))


class CpuSample:
    """The sampled elements: magnitudes and rows of the gradient, weights before and after the update."""

    def __init__(self, params: Sequence[Tensor]) -> None:
        self._params = params
        self._places = places([real(param) for param in params])
        wide = any(param.dtype in (torch.float64, torch.complex128) for param in params)
        self._dtype = torch.float64 if wide else torch.float32
        self._numel = np.array([real(param).numel() for param in params], dtype=np.int64)
        self._chunks = list(_chunks(params, self._places))
        total = sum(int(chunk.sizes.sum()) for chunk in self._chunks)
        self._weights = torch.zeros(total, dtype=self._dtype).numpy()
        self._has_gradient = np.zeros(total, dtype=bool)
        self._weight_spread = np.full(len(params), np.nan)
        self._moved_between = np.zeros(len(params), dtype=bool)
        self._looked = False

    def look_at(self, grads: Sequence[Tensor | None], values: Floats, scale: float) -> None:
        """Fill in the histogram and the spread of rows, and note which sampled elements have a gradient."""
        fitting = [
            grad if grad is not None and grad.layout == torch.strided and grad.stride() == param.stride() else None
            for grad, param in zip(grads, self._params, strict=True)
        ]
        for chunk in self._chunks:
            gathered, size = self._gather(chunk, fitting, grids=True), int(chunk.sizes.sum())
            elements = gathered[:size]
            np.not_equal(elements, 0, out=self._has_gradient[chunk.span])
            values[HISTOGRAM, chunk.rows] = _octaves(elements / scale, chunk).T
            values[ROW["row_spread"], chunk.grid_rows] = _spread(gathered, chunk)

    def remember(self) -> None:
        """Take the weights and their spread of rows; see whether any has moved since the sampled step before."""
        for chunk in self._chunks:
            gathered = self._gather(chunk, self._params, grids=True)
            now, before = gathered[: int(chunk.sizes.sum())], self._weights[chunk.span]
            self._moved_between[chunk.rows] = np.logical_or.reduceat(now != before, chunk.starts)
            self._weight_spread[chunk.grid_rows] = _spread(gathered, chunk)
            before[:] = now

    def compare(self, values: Floats) -> None:
        """Fill in what the update did to the sampled weights."""
        values[ROW["weight_row_spread"]] = self._weight_spread
        values[ROW["update_norm"], self._numel == 0] = 0.0
        for chunk in self._chunks:
            before = self._weights[chunk.span].astype(np.float64)
            now = self._gather(chunk, self._params, grids=False)
            self._weights[chunk.span] = now
            self._fill(values, chunk, before, now.astype(np.float64) - before)
        self._looked = True

    def _fill(self, values: Floats, chunk: _Chunk, before: Floats, change: Floats) -> None:
        rows, starts, still = chunk.rows, chunk.starts, change == 0
        has_gradient = self._has_gradient[chunk.span]
        looked_at = np.add.reduceat(has_gradient, starts, dtype=np.int64)
        lost = np.add.reduceat(has_gradient & still, starts, dtype=np.int64)
        moved = ~np.logical_and.reduceat(still, starts) | (self._moved_between[rows] & self._looked)
        update = np.sqrt(np.add.reduceat(np.square(change, out=change), starts))
        weight = np.sqrt(np.add.reduceat(np.square(before, out=before), starts))
        with np.errstate(divide="ignore", invalid="ignore"):
            values[ROW["update_norm"], rows] = update * np.sqrt(self._numel[rows] / chunk.sizes)
            values[ROW["update_ratio"], rows] = update / weight
            values[ROW["lost"], rows] = np.where(looked_at > 0, lost / looked_at, np.nan)
        values[ROW["moved"], rows] = np.where(moved | self._looked, moved, np.nan)

    def _gather(self, chunk: _Chunk, tensors: Sequence[Tensor | None], *, grids: bool) -> Values:
        """Read the chunk's elements, and the grids' behind them; absent tensors read as 0."""
        parts: list[Tensor] = []
        if chunk.whole:
            present = [
                self._params[i].new_zeros(()).expand(self._params[i].shape) if (t := tensors[i]) is None else t
                for i in chunk.whole
            ]
            parts.append(_flatten_dense_tensors(present))
        parts += [self._pick(tensors[index], self._places[index].elements) for index in chunk.picked]
        if grids:
            parts += [self._pick(tensors[index], self._places[index].grid) for index in chunk.picked]
        return torch.cat([part.to(self._dtype) for part in parts]).numpy()

    def _pick(self, tensor: Tensor | None, positions: NDArray[np.int32]) -> Tensor:
        if tensor is None:
            return torch.zeros(len(positions), dtype=self._dtype)
        elements = flat(real(tensor))
        if elements.dtype in (torch.float32, torch.float64):
            return torch.from_numpy(elements.numpy().take(positions, mode="clip"))
        return elements[torch.from_numpy(positions).long()]


def _chunks(params: Sequence[Tensor], chosen: Sequence[Places]) -> Iterator[_Chunk]:
    """Split the tensors that have elements: those gathered as a whole first, by dtype, then the others."""
    whole = [i for i, param in enumerate(params) if _is_whole(param, chosen[i])]
    whole.sort(key=lambda index: str(params[index].dtype))
    picked = [i for i, param in enumerate(params) if param.numel() and i not in set(whole)]
    begins, run = 0, list[int]()
    for index in [*whole, *picked]:
        run.append(index)
        elements = sum(len(chosen[i].elements) for i in run)
        grids = sum(len(chosen[i].grid) > 0 for i in run)
        following = index == (picked or whole)[-1]
        if elements >= ELEMENTS or grids >= GRIDS or following:
            yield _chunk(run, params, chosen, begins)
            begins, run = begins + elements, []


def _is_whole(param: Tensor, place: Places) -> bool:
    return 0 < param.numel() == len(place.elements) and not param.is_complex()


def _chunk(run: Sequence[int], params: Sequence[Tensor], chosen: Sequence[Places], begins: int) -> _Chunk:
    sizes = np.array([len(chosen[i].elements) for i in run], dtype=np.int64)
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    behind = int(sizes.sum())
    grids, grid_rows = [], []
    for index, start in zip(run, starts.tolist(), strict=True):
        grid = chosen[index].grid
        if not len(grid):
            continue
        grid_rows.append(index)
        if _is_whole(params[index], chosen[index]):
            grids.append(start + _logical(params[index], grid))
        else:
            grids.append(behind + np.arange(len(grid), dtype=np.int32))
            behind += len(grid)
    whole = tuple(i for i in run if _is_whole(params[i], chosen[i]))
    return _Chunk(
        rows=np.array(run, dtype=np.int64),
        whole=whole,
        picked=tuple(run[len(whole) :]),
        starts=starts,
        sizes=sizes,
        grid_rows=np.array(grid_rows, dtype=np.int64),
        grids=np.array(grids, dtype=np.int32).reshape(-1, GRID_ROWS * GRID_COLUMNS),
        begins=begins,
    )


def _logical(param: Tensor, positions: NDArray[np.int32]) -> NDArray[np.int32]:
    """Turn positions in a tensor's memory into positions in its logical order."""
    order = torch.arange(param.numel(), dtype=torch.int32).reshape(param.shape)
    in_memory = torch.empty_strided(param.shape, param.stride(), dtype=torch.int32).copy_(order)
    return flat(in_memory).numpy()[positions]


def _octaves(elements: Values, chunk: _Chunk) -> Floats:
    """Count finite non-zero elements by the exponent of their magnitude: shape [tensors, octaves]."""
    octaves = np.clip(np.frexp(elements)[1] - 1 - LOWEST_OCTAVE, 0, OCTAVES - 1)
    octaves += np.repeat(np.arange(len(chunk.rows), dtype=np.int32) * OCTAVES, chunk.sizes)
    counted = octaves[(elements != 0) & np.isfinite(elements)]
    return np.bincount(counted, minlength=len(chunk.rows) * OCTAVES).reshape(-1, OCTAVES).astype(np.float64)


def _spread(gathered: Values, chunk: _Chunk) -> Floats:
    """‖rows - mean row‖ / ‖rows‖ of each grid: 0 where all rows are equal, NaN where there is nothing to compare."""
    grids = gathered[chunk.grids].reshape(-1, GRID_ROWS, GRID_COLUMNS).astype(np.float64)
    peak = np.abs(grids).max(axis=(1, 2), initial=0.0)
    peak[~np.isfinite(peak) | (peak == 0)] = np.nan
    grids /= peak[:, None, None]
    apart = grids - grids.mean(axis=1, keepdims=True)
    spread: Floats = np.sqrt(np.einsum("ijk,ijk->i", apart, apart) / np.einsum("ijk,ijk->i", grids, grids))
    return spread

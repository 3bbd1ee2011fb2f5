"""Measures parameters on the CPU, in NumPy: the numbers are on the host at once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from gradwatch.measure.blocks import Blocks
from gradwatch.measure.cpu_sample import CpuSample
from gradwatch.measure.sample import flat, real
from gradwatch.records import Floats, GradientState
from gradwatch.table import EVERY_STEP, ROW, StatTable, rows


class CpuMeter:
    """Measures one list of parameters; everything that can be is decided here, once."""

    def __init__(self, params: Sequence[Tensor]) -> None:
        self._params = list(params)
        self._numel = np.array([param.numel() for param in params], dtype=np.int64)
        self._complex = [index for index, param in enumerate(params) if param.is_complex()]
        self._blocks = Blocks(params)
        self._sample = CpuSample(self._params)

    @torch.no_grad()
    def measure(
        self, grads: Sequence[Tensor | None], *, divisor: Tensor | float | None = None, detail: bool
    ) -> StatTable:
        """Fill the table of one step."""
        missing = tuple([index for index, grad in enumerate(grads) if grad is None])
        found = self._blocks.reduce(grads, sums=detail)
        values = np.full((rows(detail=detail), len(grads)), np.nan)
        scale = 1.0 if divisor is None else float(divisor)
        self._correct_complex(found.peak, found.norm, grads)
        values[ROW["norm"] : len(EVERY_STEP)] = found.table[: len(EVERY_STEP) - 1]
        values[ROW["state"]] = GradientState.ZERO + (found.peak + found.nonfinite > 0)  # one more is VALUE
        if divisor is not None:
            values[[ROW["norm"], ROW["max_abs"]]] /= scale
        if detail:
            finite = np.maximum(self._numel - found.nonfinite, 1)
            values[ROW["mean"]] = found.total / scale / finite
            values[ROW["zero_fraction"]] = self._zero_fraction(found.zeros, grads)
            values[ROW["weight_norm"]] = self._blocks.norms(self._params)
            self._sample.look_at(grads, values, scale)
        return StatTable(values, missing)

    @torch.no_grad()
    def norms(self, grads: Sequence[Tensor | None], positions: Sequence[int] | None = None) -> Floats:
        """Return the norm of some gradients, or of all; NaN for a missing one."""
        chosen = range(len(grads)) if positions is None else positions
        wanted: list[Tensor | None] = [None] * len(grads)
        for index in chosen:
            wanted[index] = grads[index]
        norm = self._blocks.norms(wanted)
        return np.array([np.nan if grads[index] is None else norm[index] for index in chosen])

    @torch.no_grad()
    def sample_before(self) -> None:
        """Remember the sampled weights, right before the update."""
        self._sample.remember()

    @torch.no_grad()
    def sample_after(self, table: StatTable) -> None:
        """Compare them with the weights right after it."""
        if isinstance(table.values, np.ndarray):
            self._sample.compare(table.values)

    def _correct_complex(self, peak: Floats, norm: Floats, grads: Sequence[Tensor | None]) -> None:
        """Put in |g| of complex elements, which is not the larger of their parts."""
        for index in self._complex:
            grad = grads[index]
            if grad is not None and grad.numel():
                magnitudes = flat(grad).abs()
                finite = torch.where(magnitudes.isfinite(), magnitudes, 0.0)
                peak[index] = min(float(finite.amax()), norm[index])

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

"""The table of one step: which statistics there are, and where they lie."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from gradwatch.records import OCTAVES, Floats, GradientState

EVERY_STEP: tuple[str, ...] = ("state", "norm", "max_abs", "nonfinite")
DETAIL: tuple[str, ...] = (
    "mean",
    "zero_fraction",
    "row_spread",
    "weight_norm",
    "weight_row_spread",
    "update_norm",
    "update_ratio",
    "lost",
    "moved",
)
ROW: Mapping[str, int] = {name: row for row, name in enumerate(EVERY_STEP + DETAIL)}
"""Row of each statistic; the histogram's octaves follow the last one."""

HISTOGRAM = slice(len(ROW), len(ROW) + OCTAVES)


@dataclass(frozen=True, slots=True, eq=False)
class StatTable:
    """One step's statistics where they were measured: a row a statistic, a column a tensor, float64 if there is any."""

    values: Floats | torch.Tensor
    """Shape [4, tensors], or [4 + 9 + 64, tensors] at detail steps."""
    missing: tuple[int, ...]
    """Columns of tensors that had no gradient: the host knows them, the device need not."""

    @property
    def detail(self) -> bool:
        """Whether the detail tier was measured."""
        return int(self.values.shape[0]) > len(EVERY_STEP)


def rows(*, detail: bool) -> int:
    """Return the number of rows of a table."""
    return HISTOGRAM.stop if detail else len(EVERY_STEP)


def columns(values: Floats, missing: tuple[int, ...] = ()) -> tuple[dict[str, Floats], Floats | None]:
    """Name the rows of a table that has arrived on the host, and return its histogram [tensors, 64] if it has one.

    What was not measured is NaN.
    """
    if missing:
        absent = list(missing)
        values[:, absent] = np.nan
        values[ROW["state"], absent] = GradientState.MISSING
    nothing = np.full(values.shape[1], np.nan)
    named = {name: values[row] if row < values.shape[0] else nothing for name, row in ROW.items()}
    detail = values.shape[0] > len(EVERY_STEP)
    return named, np.ascontiguousarray(values[HISTOGRAM].T) if detail else None

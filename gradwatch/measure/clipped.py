"""The second look: how large the gradients are after somebody clipped them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gradwatch.measure.plan import Meter, as_array
from gradwatch.records import Floats
from gradwatch.table import ROW, StatTable

NORM, PEAK = ROW["norm"], ROW["max_abs"]

# Relative difference up to which the factors of two tensors are one factor: float16 rounds to 2**-11.
SAME_FACTOR = 2e-3


def look_again(
    meter: Meter,
    table: StatTable,
    grads: Sequence[Tensor | None],
    optimized: NDArray[np.bool_],
    *,
    everywhere: bool,
) -> dict[str, Tensor | float]:
    """Return the norm after clipping and the smallest and largest factor applied to a tensor.

    Global-norm clipping multiplies all gradients by one factor, so on the CPU a few tensors tell it: those with the
    largest and the smallest element and norm, which clipping by value or by tensor changes most and least. A full pass
    is made only if their factors differ or some gradients were left alone (`everywhere` is false).
    """
    values = table.values
    if isinstance(values, Tensor):
        return _on_device(meter, values, grads, optimized)
    before = np.where(optimized & (values[NORM] > 0), values[NORM], np.nan)
    if np.isnan(before).all():
        return {}
    if everywhere:
        rows = _telling_rows(before, np.where(np.isnan(before), np.nan, values[PEAK]))
        factors = as_array(meter.norms(grads, rows)) / before[rows]
        low, high = float(factors.min()), float(factors.max())
        if high - low <= SAME_FACTOR * high:
            total = float(np.sqrt(np.nansum(before**2)))
            return {"clipped_norm": float(factors[0]) * total, "clip_low": low, "clip_high": high}
    after = np.where(optimized, as_array(meter.norms(grads)), np.nan)
    factors = after / before
    return {
        "clipped_norm": float(np.sqrt(np.nansum(after**2))),
        "clip_low": float(np.nanmin(factors)),
        "clip_high": float(np.nanmax(factors)),
    }


def _telling_rows(norm: Floats, peak: Floats) -> list[int]:
    return sorted({int(pick(values)) for values in (norm, peak) for pick in (np.nanargmax, np.nanargmin)})


def _on_device(
    meter: Meter, values: Tensor, grads: Sequence[Tensor | None], optimized: NDArray[np.bool_]
) -> dict[str, Tensor | float]:
    """Do the same without a branch: whether one factor fits all is decided on the host, when the numbers are there."""
    mask = torch.from_numpy(optimized).to(values.device, non_blocking=True)
    after = torch.as_tensor(meter.norms(grads))
    factors = after / values[NORM]
    usable = mask & factors.isfinite()
    return {
        "clipped_norm": torch.linalg.vector_norm(torch.where(mask & after.isfinite(), after, 0.0)),
        "clip_low": torch.where(usable, factors, torch.inf).amin(),
        "clip_high": torch.where(usable, factors, -torch.inf).amax(),
    }

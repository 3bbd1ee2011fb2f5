"""Clocks for a shared machine, and what is made of their readings."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

CACHE = 48 * 2**20
"""Bytes touched before each reading, so that every route begins with a cold cache."""

IDLE = 0.02
"""Seconds after which torch's worker threads, which spin when they have nothing to do, sleep and take no time."""

_COLD = np.ones(CACHE // 8)


def timed(route: Callable[[], object], device: torch.device) -> float:
    """Return the process time of one call in seconds; on CUDA the time until the device has done its work."""
    if device.type == "cuda":
        return _timed_on_cuda(route)
    _COLD.sum()
    time.sleep(IDLE)
    before = time.process_time()
    route()
    return time.process_time() - before


def _timed_on_cuda(route: Callable[[], object]) -> float:
    torch.empty(CACHE, dtype=torch.uint8, device="cuda").zero_()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    begin.record()
    route()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1000


def ratios(seconds: Mapping[str, Sequence[float]], base: str) -> dict[str, np.ndarray]:
    """Divide each reading by the base's reading of the same round."""
    return {name: np.array(values) / np.array(seconds[base]) for name, values in seconds.items()}


def quartiles(values: np.ndarray) -> str:
    """Write a median with its quartiles."""
    low, middle, high = np.quantile(values, [0.25, 0.5, 0.75])
    return f"{middle:.3g} ({low:.2g}-{high:.2g})"

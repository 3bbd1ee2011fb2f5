"""All reductions of a block in one read of it, compiled by Numba where that is installed; NumPy reads once for each."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from gradwatch.errors import Part, contain

Numbers: TypeAlias = tuple[float, float, float, int]
"""Sum of the squares, largest magnitude (NaN or infinite if any element is), sum, and number of exact zeros."""

OneRead: TypeAlias = Callable[[NDArray[np.float32], NDArray[np.int32]], Numbers]
"""Takes a block, and the same memory as integers."""

CHUNK = 4_096
"""So many elements are added up in float32, their sums in float64."""


@cache
def one_read() -> OneRead | None:
    """Compile the pass, or load it from Numba's cache; None where Numba is not there or does not work."""
    try:
        import numba  # noqa: PLC0415 - optional, and loading it takes a third of a second
    except ImportError:
        return None
    compiled: OneRead | None = None
    if not numba.config.DISABLE_JIT:  # element by element in Python would take minutes
        with contain(Part("measuring by Numba instead of NumPy")):
            compiled = _compile(numba.njit)
    return compiled


def _compile(njit: Callable[..., Callable[..., OneRead]]) -> OneRead:
    # NaN and infinities keep their meaning; the order of additions is free, or nothing would be vectorised.
    form, options = "(float32[::1], int32[::1])", {"fastmath": {"reassoc", "contract"}, "nogil": True}
    try:
        return njit(form, **options, cache=True)(_one_read)
    except (OSError, RuntimeError):  # there is no folder for the cache, or no room in it
        return njit(form, **options)(_one_read)


def _one_read(values: NDArray[np.float32], bits: NDArray[np.int32]) -> Numbers:  # pragma: no cover - compiled
    # As integers without their sign, magnitudes are in order, with infinity and NaN above all others. Each int32() is
    # needed: Numba computes with integers in 64 bits, which the vectors of 32 would have to be widened for.
    squares, total, zeros, peak = 0.0, 0.0, 0, np.int32(0)
    for start in range(0, values.size, CHUNK):
        chunk, chunk_bits = values[start : start + CHUNK], bits[start : start + CHUNK]
        chunk_squares, chunk_total = np.float32(0), np.float32(0)
        chunk_zeros, chunk_peak = np.int32(0), np.int32(0)
        for index in range(chunk.size):
            value = chunk[index]
            chunk_squares += value * value
            chunk_total += value
            magnitude = np.int32(chunk_bits[index] & np.int32(0x7FFFFFFF))
            chunk_peak = np.int32(max(chunk_peak, magnitude))
            chunk_zeros = np.int32(chunk_zeros + np.int32(magnitude == 0))
        squares += float(chunk_squares)
        total += float(chunk_total)
        zeros += int(chunk_zeros)
        peak = np.int32(max(peak, chunk_peak))
    return squares, float(np.int32(peak).view(np.float32)), total, zeros

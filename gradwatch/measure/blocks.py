"""NumPy on cache blocks: reduces many tensors on the CPU in one and a half reads, right over the whole float range."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gradwatch.measure.sample import flat, real
from gradwatch.records import Floats

SMALL = 8_192
"""Tensors of at most so many elements are joined before they are read,"""
PACK = 65_536
"""into packs of at most so many."""
BLOCK = 131_072
"""Larger ones are read in blocks of so many elements, which stay in the second-level cache for all reductions."""

# Between these the squares of a block neither underflow nor, added up, overflow in float32. NaN fails the test too.
FLOOR, CEILING = 1e-12, 1e15


@dataclass(slots=True, eq=False)
class Reduced:
    """What a pass over the tensors found: one entry a tensor, over its finite elements."""

    norm: Floats
    peak: Floats
    nonfinite: Floats
    total: Floats
    """Sum of the elements, and"""
    zeros: Floats
    """number of exact zeros; both stay 0 unless asked for."""


@dataclass(frozen=True, slots=True, eq=False)
class _Pack:
    """Small tensors that `torch.cat` joins without a reshape: the same shape behind the first dimension."""

    members: list[int]
    positions: NDArray[np.int64]
    first: NDArray[np.int64]
    lengths: NDArray[np.int64]
    scalars: bool


class Blocks:
    """The plan for one list of tensors, and the scratch memory that its passes share."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._count = len(tensors)
        plain = [
            index
            for index, tensor in enumerate(tensors)
            if tensor.dtype in (torch.float32, torch.bfloat16, torch.float16) and tensor.numel()
        ]
        small = [index for index in plain if tensors[index].numel() <= SMALL]
        self._packs = list(_packs(tensors, small))
        self._large = sorted(set(range(self._count)) - set(small))
        self._scratch = torch.empty(BLOCK, dtype=torch.float32)

    def reduce(self, tensors: Sequence[Tensor | None], *, sums: bool) -> Reduced:
        """Reduce each tensor once; `None` counts as empty. Max comes first: it finds what needs the careful way."""
        found = Reduced(*(np.zeros(self._count) for _ in range(5)))
        for pack in self._packs:
            members = [tensors[index] for index in pack.members]
            if any(member is None or member.layout != torch.strided for member in members):
                for index in pack.members:
                    self._one(found, index, tensors[index], sums=sums)
            else:
                _reduce_pack(found, pack, members, sums=sums)  # type: ignore[arg-type]
        for index in self._large:
            self._one(found, index, tensors[index], sums=sums)
        return found

    def _one(self, found: Reduced, index: int, tensor: Tensor | None, *, sums: bool) -> None:
        if tensor is None:
            return
        squares = peak = total = 0.0
        bad = zeros = 0
        for block in self._blocks(flat(real(tensor))):
            high = max(float(np.maximum.reduce(block)), -float(np.minimum.reduce(block)))
            if FLOOR < high < CEILING and block.dtype == np.float32:
                squares += float(np.dot(block, block))
                if sums:
                    total += float(np.add.reduce(block))
                    zeros += block.size - int(np.count_nonzero(block))
            elif high == 0:
                zeros += block.size
            else:
                careful = _carefully(block)
                squares, high = squares + careful.squares, careful.peak
                bad, total, zeros = bad + careful.nonfinite, total + careful.total, zeros + careful.zeros
            peak = max(peak, high)
        found.norm[index], found.peak[index], found.nonfinite[index] = squares**0.5, peak, bad
        found.total[index], found.zeros[index] = total, zeros

    def _blocks(self, elements: Tensor) -> Iterator[NDArray[np.float32 | np.float64]]:
        """Yield the elements block by block, half precision through the scratch memory."""
        wide = elements.dtype in (torch.float32, torch.float64)
        values = elements.numpy() if wide else None
        for start in range(0, elements.numel(), BLOCK):
            if values is not None:
                yield values[start : start + BLOCK]
                continue
            piece = elements[start : start + BLOCK]
            yield self._scratch[: len(piece)].copy_(piece).numpy()


@dataclass(frozen=True, slots=True)
class _Careful:
    squares: float
    peak: float
    nonfinite: int
    total: float
    zeros: int


def _carefully(block: NDArray[np.float32 | np.float64]) -> _Careful:
    """Reduce a block whose squares leave float32's range, or with NaN or infinities: scaled, in float64."""
    finite = np.isfinite(block)
    values = np.where(finite, block, 0).astype(np.float64)
    peak = float(np.abs(values).max(initial=0.0))
    exponent = int(np.frexp(peak)[1])
    scaled = np.ldexp(values, -exponent)
    return _Careful(
        squares=float(np.ldexp(np.dot(scaled, scaled), 2 * exponent)),
        peak=peak,
        nonfinite=int(block.size - np.count_nonzero(finite)),
        total=float(values.sum()),
        zeros=int(block.size - np.count_nonzero(block)),
    )


def _packs(tensors: Sequence[Tensor], small: Sequence[int]) -> Iterator[_Pack]:
    alike: dict[object, list[int]] = {}
    for index in small:
        tensor = tensors[index]
        alike.setdefault((tensor.dtype, tensor.shape[1:], tensor.dim() == 0), []).append(index)
    for group in alike.values():
        run: list[int] = []
        size = 0
        for index in group:
            if run and size + tensors[index].numel() > PACK:
                yield _pack(tensors, run)
                run, size = [], 0
            run.append(index)
            size += tensors[index].numel()
        yield _pack(tensors, run)


def _pack(tensors: Sequence[Tensor], members: list[int]) -> _Pack:
    lengths = np.array([tensors[index].numel() for index in members], dtype=np.int64)
    first = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    return _Pack(members, np.array(members, dtype=np.int64), first, lengths, scalars=tensors[members[0]].dim() == 0)


def _reduce_pack(found: Reduced, pack: _Pack, members: Sequence[Tensor], *, sums: bool) -> None:
    joined = torch.stack(list(members)) if pack.scalars else torch.cat(list(members))
    values = joined.detach().reshape(-1).to(torch.float32).numpy()  # ours: it may be overwritten
    rows, first = pack.positions, pack.first
    if sums:
        found.zeros[rows] = np.add.reduceat(values == 0, first, dtype=np.int64)
        with np.errstate(invalid="ignore"):
            found.total[rows] = np.add.reduceat(values, first, dtype=np.float64)
    np.abs(values, out=values)
    peak = np.maximum.reduceat(values, first)
    if bool((((peak > FLOOR) & (peak < CEILING)) | (peak == 0)).all()):
        np.multiply(values, values, out=values)
        found.norm[rows] = np.sqrt(np.add.reduceat(values, first))
        found.peak[rows] = peak
    else:
        _reduce_pack_carefully(found, pack, members, values)


def _reduce_pack_carefully(
    found: Reduced, pack: _Pack, members: Sequence[Tensor], magnitudes: NDArray[np.float32]
) -> None:
    """Do the same in float64, each tensor scaled by a power of two of its own."""
    rows, first = pack.positions, pack.first
    finite = np.isfinite(magnitudes)
    found.nonfinite[rows] = pack.lengths - np.add.reduceat(finite, first, dtype=np.int64)
    magnitudes[~finite] = 0
    peak = np.maximum.reduceat(magnitudes, first).astype(np.float64)
    exponents = np.frexp(peak)[1]
    scaled = np.ldexp(magnitudes.astype(np.float64), -np.repeat(exponents, pack.lengths))
    np.multiply(scaled, scaled, out=scaled)
    found.norm[rows] = np.ldexp(np.sqrt(np.add.reduceat(scaled, first)), exponents)
    found.peak[rows] = peak
    for position in np.flatnonzero(
        found.nonfinite[rows]
    ).tolist():  # their sums hold the NaN or infinity: take them again
        index = pack.members[position]
        if found.total[index] or np.isnan(found.total[index]):
            found.total[index] = _carefully(flat(members[position]).to(torch.float32).numpy()).total

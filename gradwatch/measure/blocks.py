"""Cache blocks: reduces many tensors on the CPU in one or two reads, right over the whole float range."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self, TypeGuard

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gradwatch.measure.one_read import Numbers, one_read
from gradwatch.measure.sample import flat, real
from gradwatch.records import Floats

SMALL = 8_192
"""Tensors of at most so many elements are joined before they are read,"""
PACK = 65_536
"""into packs of at most so many;"""
FEW = 64
"""but so few of them are read like the others: joining is other code, which comes cold from memory at every step."""
BLOCK = 131_072
"""Larger ones are read in blocks of so many elements, which stay in the second-level cache for all reductions."""

COMPILED = 1_000_000
"""Elements to read in blocks from which a compiled pass is worth the second and the memory that loading Numba takes."""

# Between these the squares of a block neither underflow nor, added up, overflow in float32. NaN fails the test too.
FLOOR, CEILING = 1e-12, 1e15

# Sums of squares between these hold no square that was lost or cut off, whatever the elements.
SAFE, SAFE_CEILING = 1e-18, 1e35

dot, add, maximum, minimum = np.dot, np.add.reduce, np.maximum.reduce, np.minimum.reduce


@dataclass(slots=True, eq=False)
class Reduced:
    """What a pass over the tensors found: one entry a tensor, over its finite elements."""

    table: Floats
    """The others as rows, in this order."""
    norm: Floats
    peak: Floats
    nonfinite: Floats
    total: Floats
    """Sum of the elements, and"""
    zeros: Floats
    """number of exact zeros; both stay 0 unless asked for."""

    @classmethod
    def of(cls, count: int) -> Self:
        """Return what an empty pass finds."""
        table = np.zeros((5, count))
        return cls(table, *table)


@dataclass(frozen=True, slots=True, eq=False)
class _Pack:
    """Small tensors that `torch.cat` joins without a reshape: the same shape behind the first dimension."""

    members: list[int]
    shapes: tuple[torch.Size, ...]
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
        small = small if len(small) > FEW else []
        self._packs = list(_packs(tensors, small))
        self._large = sorted(set(range(self._count)) - set(small))
        self._scratch = torch.empty(BLOCK, dtype=torch.float32)
        self._flags = np.empty(BLOCK, dtype=bool)
        in_blocks = sum(tensors[index].numel() for index in self._large)
        self._one_read = one_read() if in_blocks >= COMPILED else None

    @np.errstate(all="ignore")
    def reduce(self, tensors: Sequence[Tensor | None], *, sums: bool) -> Reduced:
        """Reduce each tensor once; `None` counts as empty."""
        found = Reduced.of(self._count)
        for pack in self._packs:
            _reduce_pack(found, pack, _joined(pack, tensors), sums=sums)
        for index in self._large:
            tensor = tensors[index]
            if tensor is not None:
                self._reduce_large(found, index, tensor, sums=sums)
        return found

    @np.errstate(all="ignore")
    def norms(self, tensors: Sequence[Tensor | None]) -> Floats:
        """Return the norms alone, in one read: the squares themselves tell whether they can be trusted."""
        found = Reduced.of(self._count)
        for pack in self._packs:
            _reduce_pack(found, pack, _joined(pack, tensors), sums=False)
        for index in self._large:
            tensor, squares = tensors[index], 0.0
            for block in () if tensor is None else self._blocks(tensor):
                square = float(dot(block, block))
                squares += square if SAFE < square < SAFE_CEILING else _carefully(block).squares
            found.norm[index] = squares**0.5
        return found.norm

    def _reduce_large(self, found: Reduced, index: int, tensor: Tensor, *, sums: bool) -> None:
        """Reduce one tensor block by block, each reduction of a block behind the other.

        The largest magnitude tells whether the squares could be trusted: it finds NaN, infinities and all that leaves
        float32's range, so that the common case needs no other check.
        """
        squares = peak = total = 0.0
        bad = zeros = 0
        for block in self._blocks(tensor):
            block_squares, high, block_total, block_zeros = self._reduce_block(block, sums=sums)
            if FLOOR < high < CEILING:
                squares, total = squares + block_squares, total + block_total
            elif high != 0:
                careful = _carefully(block)
                squares, bad, total = squares + careful.squares, bad + careful.nonfinite, total + careful.total
                high = careful.peak
            zeros += block_zeros
            if high > peak:
                peak = float(high)
        found.norm[index], found.peak[index] = squares**0.5, peak
        if bad:
            found.nonfinite[index] = bad
        if sums:
            found.total[index], found.zeros[index] = total, zeros

    def _reduce_block(self, block: NDArray[np.float32 | np.float64], *, sums: bool) -> Numbers:
        if self._one_read is not None and _is_float32(block):
            return self._one_read(block, block.view(np.int32))
        # NaN is in both, the largest and the smallest.
        squares, high = dot(block, block), max(maximum(block), -minimum(block))
        if not sums:
            return float(squares), float(high), 0.0, 0
        zeros = np.count_nonzero(np.equal(block, 0, out=self._flags[: block.size]))
        return float(squares), float(high), float(add(block)), int(zeros)

    def _blocks(self, tensor: Tensor) -> Iterable[NDArray[np.float32 | np.float64]]:
        """Cut a tensor into blocks."""
        values = _array(tensor)
        if values is None:
            return self._widened(flat(real(tensor)))
        return [values[start : start + BLOCK] for start in range(0, values.size, BLOCK)]

    def _widened(self, elements: Tensor) -> Iterator[NDArray[np.float32]]:
        """Yield half precision block by block through the scratch memory."""
        for start in range(0, elements.numel(), BLOCK):
            piece = elements[start : start + BLOCK]
            yield self._scratch[: len(piece)].copy_(piece).numpy()


def _array(tensor: Tensor) -> NDArray[np.float32 | np.float64] | None:
    """Return the elements as an array of one dimension that shares their memory; None for half precision."""
    if tensor.dtype is torch.float32 and tensor.is_contiguous() and not tensor.requires_grad:
        return tensor.numpy().reshape(-1)  # the common case, half as dear as the general one
    elements = flat(real(tensor))
    return elements.numpy() if elements.dtype in (torch.float32, torch.float64) else None


def _is_float32(block: NDArray[np.float32 | np.float64]) -> TypeGuard[NDArray[np.float32]]:
    return block.dtype == np.float32


@dataclass(frozen=True, slots=True)
class _Careful:
    squares: float
    peak: float
    nonfinite: int
    total: float


def _carefully(block: NDArray[np.float32 | np.float64]) -> _Careful:
    """Reduce a block with NaN or infinities, or whose squares leave float32's range: scaled by a power of two."""
    bad = 0
    high = max(maximum(block), -minimum(block))
    if not np.isfinite(high):
        finite = np.isfinite(block)
        bad = block.size - int(np.count_nonzero(finite))
        block = np.where(finite, block, 0)
        high = max(maximum(block), -minimum(block))
    # Beyond 100 the factor itself would leave float32's range; there the squares are safe already.
    exponent = max(-100, min(100, int(np.frexp(high)[1])))
    scaled = block * block.dtype.type(2.0**-exponent)
    squares = math.ldexp(float(dot(scaled, scaled)), 2 * exponent)
    return _Careful(squares, float(high), bad, float(add(block, dtype=np.float64)))


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
    shapes = tuple(tensors[index].shape for index in members)
    return _Pack(members, shapes, np.array(members, dtype=np.int64), first, lengths, scalars=not shapes[0])


def _joined(pack: _Pack, tensors: Sequence[Tensor | None]) -> NDArray[np.float32]:
    """Copy the members one behind the other; the copy may be overwritten."""
    join = torch.stack if pack.scalars else torch.cat
    members: list[Any] = [tensors[index] for index in pack.members]
    try:
        joined = join(members)
    except (TypeError, RuntimeError):  # an absent or a sparse gradient; looking for them first would cost every step
        joined = join([_filled(member, shape) for member, shape in zip(members, pack.shapes, strict=True)])
    if joined.layout != torch.strided:
        joined = joined.to_dense()
    values: NDArray[np.float32] = joined.detach().reshape(-1).to(torch.float32).numpy()
    return values


def _filled(member: Tensor | None, shape: torch.Size) -> Tensor:
    if member is None:
        return torch.zeros(()).expand(shape)
    return member if member.layout == torch.strided else member.to_dense()


def _reduce_pack(found: Reduced, pack: _Pack, values: NDArray[np.float32], *, sums: bool) -> None:
    rows, first = pack.positions, pack.first
    if sums:
        found.zeros[rows] = np.add.reduceat(values == 0, first, dtype=np.int64)
        finite = np.isfinite(values)
        found.total[rows] = np.add.reduceat(np.where(finite, values, 0), first, dtype=np.float64)
    np.abs(values, out=values)
    peak = np.maximum.reduceat(values, first)
    if bool((((peak > FLOOR) & (peak < CEILING)) | (peak == 0)).all()):
        np.multiply(values, values, out=values)
        found.norm[rows] = np.sqrt(np.add.reduceat(values, first))
        found.peak[rows] = peak
    else:
        _reduce_pack_carefully(found, pack, values)


def _reduce_pack_carefully(found: Reduced, pack: _Pack, magnitudes: NDArray[np.float32]) -> None:
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

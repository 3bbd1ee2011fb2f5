"""The element sample: which elements of each tensor are looked at one by one, fixed when the tensors are planned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

SAMPLED = 1024
"""Elements a tensor; all of them where there are no more."""
SAMPLED_OF_MANY = 256
"""The same with more than `MANY` tensors."""
MANY = 1000
GRID_ROWS, GRID_COLUMNS = 8, 64
"""The spread of rows is read from so many rows and columns."""


@dataclass(frozen=True, slots=True, eq=False)
class Places:
    """Positions in the memory of one tensor, as offsets from its first element."""

    elements: NDArray[np.int32]
    """One random element in each of equally long stretches: a stride of n // k would often sample a single column."""
    grid: NDArray[np.int32]
    """`GRID_ROWS` x `GRID_COLUMNS` elements, row by row; empty below two dimensions or three rows."""


def places(tensors: Sequence[Tensor]) -> list[Places]:
    """Choose the sample of each tensor; the same tensors always get the same one, and no global generator is used."""
    generator = np.random.default_rng(0)
    size = SAMPLED_OF_MANY if len(tensors) > MANY else SAMPLED
    return [Places(_elements(tensor, size, generator), _grid(tensor, generator)) for tensor in tensors]


def _elements(tensor: Tensor, size: int, generator: np.random.Generator) -> NDArray[np.int32]:
    number = tensor.numel()
    if number <= size:
        return np.arange(number, dtype=np.int32)
    edges = np.arange(size + 1, dtype=np.int64) * number // size
    return (edges[:-1] + generator.integers(0, np.diff(edges))).astype(np.int32)


def _grid(tensor: Tensor, generator: np.random.Generator) -> NDArray[np.int32]:
    if tensor.dim() < 2 or tensor.shape[0] < 3 or tensor.numel() == 0:
        return np.empty(0, dtype=np.int32)
    strides = _dense_strides(tensor)
    row_shape = tuple(tensor.shape[1:])
    chosen = np.linspace(0, tensor.shape[0] - 1, GRID_ROWS).astype(np.int64)
    columns = generator.integers(0, int(np.prod(row_shape)), GRID_COLUMNS)
    inside = sum(
        index * stride for index, stride in zip(np.unravel_index(columns, row_shape), strides[1:], strict=True)
    )
    return (chosen[:, None] * strides[0] + inside).astype(np.int32).ravel()


def _dense_strides(tensor: Tensor) -> tuple[int, ...]:
    """Strides of the tensor in `flat`'s memory."""
    return tensor.stride() if is_dense(tensor) else torch.empty(tensor.shape, device="meta").stride()


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill one stretch of memory in any order of dimensions (channels last, transposed)."""
    if tensor.is_contiguous():
        return True
    expected = 1
    for size, stride in sorted(zip(tensor.shape, tensor.stride(), strict=True), key=lambda pair: pair[1]):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def flat(tensor: Tensor) -> Tensor:
    """Return the elements as one dimension in the order of memory, without a copy where they are dense."""
    tensor = tensor.detach()
    if tensor.is_contiguous():
        return tensor.view(-1)
    if is_dense(tensor):
        return tensor.as_strided((tensor.numel(),), (1,))
    return tensor.reshape(-1)


def real(tensor: Tensor) -> Tensor:
    """Return the stored values of a gradient as real numbers: those of a sparse one, complex ones as pairs."""
    if tensor.layout != torch.strided:
        tensor = tensor.detach().coalesce().values()
    return torch.view_as_real(tensor.detach().resolve_conj()) if tensor.is_complex() else tensor

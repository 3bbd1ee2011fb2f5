"""Joins layers to at most a few dozen blocks, so that a model of any size fits on one page."""

from __future__ import annotations

import numpy as np

from gradwatch.records import Snapshot, Tensors

MAX_BLOCKS = 60


def block_norms(snapshot: Snapshot) -> dict[str, float]:
    """Return the gradient norm of each block, first block first; blocks without a gradient are left out."""
    squares: dict[str, float] = {}
    for name, norm in zip(blocks(snapshot.tensors), snapshot.norm.tolist(), strict=True):
        if np.isfinite(norm):
            squares[name] = squares.get(name, 0.0) + norm**2
    return {name: float(np.sqrt(square)) for name, square in squares.items()}


def blocks(tensors: Tensors) -> tuple[str, ...]:
    """Return the block of each tensor: the longest beginning of its layer's name that makes few enough blocks.

    Where even the first component makes too many, neighbours in depth are joined under the name of the first.
    """
    paths = [layer.split(".") for layer in tensors.layers]
    best: tuple[str, ...] | None = None
    for length in range(1, max(map(len, paths), default=1) + 1):
        names = tuple(".".join(path[:length]) or "(root)" for path in paths)
        if len(set(names)) > MAX_BLOCKS:
            break
        best = names
    return best if best is not None else _runs(tensors.layers)


def _runs(layers: tuple[str, ...]) -> tuple[str, ...]:
    distinct = list(dict.fromkeys(layers))
    stride = -(-len(distinct) // MAX_BLOCKS)
    first = {layer: distinct[position - position % stride] for position, layer in enumerate(distinct)}
    return tuple(f"{first[layer]}..." for layer in layers)

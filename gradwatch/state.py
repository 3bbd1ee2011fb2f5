"""The state of the watch as plain Python values and tensors, which every checkpoint format keeps."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch


def to_portable(value: object) -> object:
    """Turn arrays into tensors, NumPy scalars into Python ones and tuples into lists, at any depth.

    A deque, a dataclass or a NumPy value in a checkpoint makes ``torch.load(weights_only=True)`` refuse all of it.
    """
    if isinstance(value, np.ndarray):
        return torch.from_numpy(np.ascontiguousarray(value)).clone()
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Mapping):
        return {key: to_portable(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [to_portable(entry) for entry in value]
    return value


def from_portable(value: object) -> object:
    """Turn tensors back into arrays."""
    if isinstance(value, torch.Tensor):
        return value.detach().cpu().numpy().copy()  # from a checkpoint: no device has to wait
    if isinstance(value, Mapping):
        return {key: from_portable(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [from_portable(entry) for entry in value]
    return value

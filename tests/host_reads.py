"""Counts how often the host asks a device for numbers."""

from __future__ import annotations

import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

READS = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique")
"""Operators whose result the host has to wait for; `nonzero` is what indexing by a boolean mask calls."""


@dataclass
class HostReads(TorchDispatchMode):
    """While active, notes each waiting operator and the module of the package that called it."""

    found: list[tuple[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in READS:
            self.found.append((name, _caller()))
        return func(*args, **(kwargs or {}))

    def outside(self, module: str) -> list[tuple[str, str]]:
        return [(name, caller) for name, caller in self.found if caller not in (module, "")]

    def inside(self, module: str) -> list[str]:
        return [name for name, caller in self.found if caller == module]


def _caller() -> str:
    """The innermost file of the package on the stack, or nothing: the training loop's own reads are not ours."""
    frames = [Path(frame.filename) for frame in traceback.extract_stack()]
    ours = [frame.name for frame in frames if frame.parent.name in ("gradwatch", "measure", "attach", "sinks")]
    return ours[-1] if ours else ""

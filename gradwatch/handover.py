"""What the transforms of one step leave for the optimizer: one factor, and a veto."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Handover:
    """For a fused optimizer device scalars that its kernels read; for others the gradients are scaled already."""

    factor: Tensor | None = None
    """What a fused optimizer multiplies the gradients by; None if nothing is left to do."""
    veto: Tensor | None = None
    """A fused optimizer skips the step if this is true; shape []."""
    skips: bool = False
    """Another optimizer is to find no gradients."""

"""What the adaptive clippers remember of the norms they saw, on the device; a norm that is not finite never enters."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

REARM = 25
"""Clipped steps in a row after which a lasting shift of the norm is believed: published clippers lock in on one."""


@dataclass(slots=True, eq=False)
class Window:
    """The newest accepted norms, in a ring."""

    size: int
    values: Tensor = field(default_factory=lambda: torch.empty(0))
    count: Tensor = field(default_factory=lambda: torch.zeros(()))

    def on(self, like: Tensor) -> None:
        """Make room on the device of the norms, at the first one."""
        if not len(self.values):
            self.values = torch.full((self.size,), float("nan"), dtype=like.dtype, device=like.device)
            self.count = torch.zeros((), dtype=torch.long, device=like.device)

    def add(self, norm: Tensor, *, where: Tensor) -> None:
        """Take a norm in where the flag holds."""
        slot = (self.count % self.size).reshape(1)
        kept = torch.where(where, norm, self.values[slot].squeeze(0))
        self.values = self.values.index_copy(0, slot, kept.reshape(1))
        self.count = self.count + where.long()

    def clear(self, *, where: Tensor) -> None:
        """Forget everything where the flag holds."""
        self.values = torch.where(where, float("nan"), self.values)
        self.count = torch.where(where, 0, self.count)

    def quantile(self, level: float) -> Tensor:
        """Quantile of what is there; NaN of nothing."""
        return torch.nanquantile(self.values, level)


@dataclass(slots=True, eq=False)
class Streak:
    """Steps in a row that were clipped, and whether that has just become a new level."""

    length: Tensor = field(default_factory=lambda: torch.zeros(()))
    rearmed: Tensor = field(default_factory=lambda: torch.zeros(()))
    """How often the clipper has begun afresh."""

    def on(self, like: Tensor) -> None:
        """Move to the device of the norms, at the first one."""
        if self.length.device != like.device or self.length.dtype != torch.long:
            self.length = self.length.to(like.device, torch.long)
            self.rearmed = self.rearmed.to(like.device, torch.long)

    def count(self, *, clipped: Tensor, finite: Tensor) -> Tensor:
        """Take in a step; return the flag of a new level. A step that is not finite changes nothing."""
        length = torch.where(clipped, self.length + 1, 0)
        length = torch.where(finite, length, self.length)
        anew = length >= REARM
        self.length = torch.where(anew, 0, length)
        self.rearmed = self.rearmed + anew.long()
        return anew

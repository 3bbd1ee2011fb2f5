"""A limit for each tensor that follows its own norm."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gradwatch.transforms.clipping import EPS
from gradwatch.transforms.gradients import Gradients
from gradwatch.transforms.memory import REARM
from gradwatch.transforms.options import OnFailure, check_on_failure, check_positive, check_share

FLOOR = 1e-3
"""Smallest limit of a tensor, relative to the mean of all: a limit of zero would hold for ever."""


@dataclass(slots=True)
class AdaGC:
    """Clip each tensor at `ratio` times a running mean of its own clipped norm.

    Wang et al., "AdaGC: improving training stability for large language model pretraining" (2025), equations 2 to 4:
    ``h_i = min(1, ratio · γ_i / ‖g_i‖)`` and ``γ_i ← beta γ_i + (1 - beta) h_i ‖g_i‖`` after `warmup` steps of global
    clipping at `max_norm`. Differences: γ begins as the mean and not as the minimum of the warm-up, it has a floor, a
    tensor whose first gradient comes late begins then, a norm that is not finite changes nothing, and a tensor that was
    clipped 25 steps in a row begins afresh.
    """

    ratio: float = 1.05
    beta: float = 0.98
    warmup: int = 100
    max_norm: float = 1.0
    on_failure: OnFailure = field(default="raise", kw_only=True)
    _limits: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)
    """Per tensor: running mean, steps with a gradient, clipped steps in a row; shape [3]."""
    _steps: int = field(default=0, init=False, repr=False)

    def __post_init__(self) -> None:
        check_positive(ratio=self.ratio, warmup=self.warmup, max_norm=self.max_norm)
        check_share(beta=self.beta)
        check_on_failure(self.on_failure)

    def __call__(self, gradients: Gradients) -> Tensor:
        """Clip; return the factors."""
        warming = self._steps < self.warmup
        self._steps += 1
        if warming:
            factor = gradients.scale_((self.max_norm / (gradients.global_norm + EPS)).clamp(max=1.0))
            del factor
        norms = gradients.norms
        if not len(norms):
            return norms
        nothing = torch.zeros(3, dtype=norms.dtype, device=norms.device)
        mean, seen, streak = torch.stack([self._limits.get(n, nothing) for n in gradients.names]).unbind(1)
        known = seen > 0
        floor = FLOOR * torch.where(known, mean, 0.0).sum() / known.sum().clamp(min=1)
        limit = self.ratio * torch.maximum(mean, floor)
        factors = torch.ones_like(norms)
        if not warming:
            factors = torch.where(known, (limit / (norms + EPS * limit)).clamp(max=1.0), 1.0)
        self._remember(gradients, norms, factors, torch.stack([mean, seen, streak], 1), warming=warming)
        return factors if warming else gradients.scale_each_(factors)

    def _remember(self, gradients: Gradients, norms: Tensor, factors: Tensor, before: Tensor, *, warming: bool) -> None:
        mean, seen, streak = before.unbind(1)
        finite = torch.isfinite(norms) & (norms > 0) & ~gradients.nonfinite
        clipped = norms * factors
        weight = 1 / (seen + 1) if warming else torch.where(seen > 0, 1 - self.beta, 1.0)
        moved = mean + weight * (torch.where(finite, clipped, 0.0) - mean)
        row = torch.where(factors < 0.999, streak + 1, 0.0)
        anew = row >= REARM
        moved = torch.where(anew, torch.where(finite, norms, 0.0), moved)
        after = torch.stack([moved, seen + 1, torch.where(anew, 0.0, row)], 1)
        kept = torch.where(finite[:, None], after, before)
        self._limits |= dict(zip(gradients.names, kept.unbind(0), strict=True))

    def state(self) -> Mapping[str, object]:
        """Return what `restore` takes."""
        return {"steps": self._steps, "limits": dict(self._limits)}

    def restore(self, state: Mapping[str, object]) -> None:
        """Go on from what `state` returned."""
        limits, steps = state["limits"], state["steps"]
        if isinstance(limits, Mapping) and isinstance(steps, int):
            self._limits, self._steps = dict(limits), steps

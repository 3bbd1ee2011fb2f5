"""Clipping of norms that are outliers by their z-score."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gradwatch.transforms.clipping import down_to
from gradwatch.transforms.gradients import Gradients, Include
from gradwatch.transforms.memory import Streak
from gradwatch.transforms.options import OnFailure, check_on_failure, check_positive, check_share


@dataclass(slots=True)
class ZClip:
    """Clip the global norm where it lies more than `z` deviations above its running mean.

    Kumar, Owen, Roy Chowdhury, Güra, "ZClip: adaptive spike mitigation for LLM pre-training" (2025), equations 2 to 7:
    with ``s = (G - μ) / (σ + eps)`` above `z` the norm becomes ``μ + z² σ / s``; the running mean and variance, of
    decay `alpha`, take the clipped norm in. Differences: a norm that is not finite changes nothing; `max_norm` is a
    limit at all times, the `warmup` steps included, in which the paper only collects; and after 25 clipped steps in a
    row the statistics begin afresh, because a norm that has doubled for good would be clipped for ever.
    """

    z: float = 2.5
    alpha: float = 0.97
    warmup: int = 25
    max_norm: float = 10.0
    eps: float = 1e-6
    include: Include = "*"
    on_failure: OnFailure = field(default="raise", kw_only=True)
    _sums: Tensor = field(default_factory=lambda: torch.empty(0), init=False, repr=False)
    """Count, sum and sum of squares of the warm-up, then mean and variance; shape [5]."""
    _streak: Streak = field(default_factory=Streak, init=False, repr=False)

    def __post_init__(self) -> None:
        check_positive(z=self.z, warmup=self.warmup, max_norm=self.max_norm, eps=self.eps)
        check_share(alpha=self.alpha)
        check_on_failure(self.on_failure)

    @property
    def rearmed(self) -> Tensor:
        """How often a new level was believed; shape []."""
        return self._streak.rearmed

    def __call__(self, gradients: Gradients) -> Tensor:
        """Clip; return the factor."""
        rows = gradients.rows(self.include)
        norm = gradients.norm_of(rows)
        if not len(self._sums):
            self._sums = torch.zeros(5, dtype=norm.dtype, device=norm.device)
        self._streak.on(norm)
        finite = torch.isfinite(norm) & ~gradients.nonfinite
        count, _, _, mean, variance = self._sums.unbind()
        warm = count >= self.warmup
        deviation = variance.clamp(min=0).sqrt()
        score = (norm - mean) / (deviation + self.eps)
        outlier = warm & (score > self.z)
        target = torch.where(outlier, mean + self.z**2 * deviation / score, norm).clamp(max=self.max_norm)
        taken = torch.where(finite, target, 0.0)
        self._sums = torch.where(finite, self._after(taken, warm), self._sums)
        anew = self._streak.count(clipped=outlier, finite=finite)
        self._sums = torch.where(anew, 0.0, self._sums)
        return gradients.scale_(down_to(target, norm), rows)

    def _after(self, norm: Tensor, warm: Tensor) -> Tensor:
        """Statistics with one more norm: plain ones in the warm-up, running ones later."""
        count, total, squares, mean, variance = self._sums.unbind()
        moved = self.alpha * mean + (1 - self.alpha) * norm
        spread = self.alpha * variance + (1 - self.alpha) * (norm - moved) ** 2
        more, added, added_squares = count + 1, total + norm, squares + norm**2
        plain = added / more
        return torch.stack(
            [
                more,
                added,
                added_squares,
                torch.where(warm, moved, plain),
                torch.where(warm, spread, (added_squares / more - plain**2).clamp(min=0)),
            ]
        )

    def state(self) -> Mapping[str, Tensor]:
        """Return what `restore` takes."""
        return {"sums": self._sums, "length": self._streak.length, "rearmed": self._streak.rearmed}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state` returned."""
        self._sums = state["sums"]
        self._streak.length, self._streak.rearmed = state["length"], state["rearmed"]

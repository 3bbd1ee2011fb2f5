"""Clipping at a quantile of the norms so far."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gradwatch.transforms.clipping import down_to
from gradwatch.transforms.gradients import Gradients, Include
from gradwatch.transforms.memory import Streak, Window
from gradwatch.transforms.options import OnFailure, check_on_failure, check_positive


@dataclass(slots=True)
class AutoClip:
    """Clip the global norm at a percentile of the norms so far, this one included.

    Seetharaman, Wichern, Pardo, Le Roux, "AutoClip: adaptive gradient clipping for source separation networks" (2020),
    algorithm 1, with three differences: the history is a ring of `window` norms, a norm that is not finite never enters
    it, and the first `warmup` steps are clipped at `max_norm` alone, which stays an upper limit later: without one, an
    explosion at the first step becomes the reference. After 25 clipped steps in a row the history begins afresh where
    `percentile` is above 50; at the paper's 10 nine steps of ten are clipped by design, and nothing is concluded.
    """

    percentile: float = 90.0
    """The paper recommends 10, which under SGD acts as a smaller learning rate; 90 clips outliers only."""
    window: int = 1000
    max_norm: float = 10.0
    warmup: int = 25
    include: Include = "*"
    on_failure: OnFailure = field(default="raise", kw_only=True)
    _history: Window = field(init=False, repr=False)
    _streak: Streak = field(default_factory=Streak, init=False, repr=False)

    def __post_init__(self) -> None:
        check_positive(percentile=self.percentile, window=self.window, max_norm=self.max_norm, warmup=self.warmup)
        check_positive(**{"100 - percentile": 100 - self.percentile})
        check_on_failure(self.on_failure)
        self._history = Window(self.window)

    @property
    def rearmed(self) -> Tensor:
        """How often a new level was believed; shape []."""
        return self._streak.rearmed

    def __call__(self, gradients: Gradients) -> Tensor:
        """Clip; return the factor."""
        rows = gradients.rows(self.include)
        norm = gradients.norm_of(rows)
        self._history.on(norm)
        self._streak.on(norm)
        finite = torch.isfinite(norm) & ~gradients.nonfinite
        self._history.add(norm, where=finite)
        limit = self._history.quantile(self.percentile / 100).to(norm.dtype)
        limit = torch.where(self._history.count > self.warmup, limit.clamp(max=self.max_norm), self.max_norm)
        if self.percentile > 50:
            over = (norm > limit) & (self._history.count > self.warmup)
            self._history.clear(where=self._streak.count(clipped=over, finite=finite))
        return gradients.scale_(down_to(limit, norm), rows)

    def state(self) -> Mapping[str, Tensor]:
        """Return what `restore` takes."""
        history, streak = self._history, self._streak
        return {"values": history.values, "count": history.count, "length": streak.length, "rearmed": streak.rearmed}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state` returned."""
        self._history.values, self._history.count = state["values"], state["count"]
        self._streak.length, self._streak.rearmed = state["length"], state["rearmed"]

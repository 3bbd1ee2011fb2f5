"""Leaving out a step exactly: weights, moments, step counter and weight decay stay as they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gradwatch.transforms.gradients import Gradients
from gradwatch.transforms.memory import Window
from gradwatch.transforms.options import OnFailure, check_on_failure, check_positive


@dataclass(slots=True)
class SkipNonfinite:
    """Skip a step whose gradients hold a NaN or infinite element.

    A run that skips again and again does not train: after `max_consecutive` skipped steps in a row, or `max_in_window`
    of the newest 100, training stops with `TrainingStopped`, which names the tensors.
    """

    max_consecutive: int = 20
    max_in_window: int = 50
    on_failure: OnFailure = field(default="raise", kw_only=True)

    def __post_init__(self) -> None:
        check_positive(max_consecutive=self.max_consecutive, max_in_window=self.max_in_window)
        check_on_failure(self.on_failure)

    def __call__(self, gradients: Gradients) -> None:
        """Veto the step if need be."""
        gradients.veto(gradients.nonfinite)


@dataclass(slots=True)
class SkipSpike:
    """Skip a step whose global norm, or loss, lies more than `sigma` deviations above the newest accepted ones.

    The rule of OLMo's skip-step optimizer (Groeneveld et al., 2024: six deviations of the last 128), with three
    differences: what was rejected does not enter the window, or the second spike passes; neither does what is not
    finite, or one NaN skips the next 128 steps; and however calm the window was, a spike is a norm of at least three
    times its mean or a loss of at least twice its mean.
    """

    sigma: float = 6.0
    window: int = 128
    warmup: int = 64
    max_consecutive: int = 20
    max_in_window: int = 50
    on_failure: OnFailure = field(default="raise", kw_only=True)
    _norms: Window = field(init=False, repr=False)
    _losses: Window = field(init=False, repr=False)
    _streak: Tensor = field(default_factory=lambda: torch.zeros(()), init=False, repr=False)

    def __post_init__(self) -> None:
        check_positive(sigma=self.sigma, window=self.window, warmup=self.warmup)
        check_positive(max_consecutive=self.max_consecutive, max_in_window=self.max_in_window)
        check_on_failure(self.on_failure)
        self._norms, self._losses = Window(self.window), Window(self.window)

    def __call__(self, gradients: Gradients) -> None:
        """Veto the step if it is a spike."""
        norm = gradients.global_norm
        finite = torch.isfinite(norm) & ~gradients.nonfinite
        spike = self._is_spike(self._norms, norm, least=3.0)
        loss = gradients.loss
        if loss is not None:
            value = torch.as_tensor(loss).detach().to(norm.device, norm.dtype, non_blocking=True).reshape(())
            spike = spike | self._is_spike(self._losses, value, least=2.0)
            self._losses.add(value, where=finite & ~spike & torch.isfinite(value))
        self._norms.add(norm, where=finite & ~spike)
        gradients.veto(spike & finite)

    def _is_spike(self, window: Window, value: Tensor, *, least: float) -> Tensor:
        window.on(value)
        known = torch.isfinite(window.values)
        count = known.sum().clamp(min=2)
        mean = torch.nansum(window.values) / count
        spread = torch.where(known, (window.values - mean) ** 2, 0.0).sum() / (count - 1)
        above = torch.maximum(self.sigma * spread.sqrt(), (least - 1) * mean.abs())
        return (window.count >= self.warmup) & (value > mean + above)

    def state(self) -> Mapping[str, Tensor]:
        """Return what `restore` takes."""
        return {
            "norms": self._norms.values,
            "norms_count": self._norms.count,
            "losses": self._losses.values,
            "losses_count": self._losses.count,
        }

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state` returned."""
        self._norms.values, self._norms.count = state["norms"], state["norms_count"]
        self._losses.values, self._losses.count = state["losses"], state["losses_count"]

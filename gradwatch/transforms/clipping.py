"""Clipping at limits that do not change."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from gradwatch.transforms.gradients import Gradients, Include
from gradwatch.transforms.options import OnFailure, check_on_failure, check_positive

EPS = 1e-6
"""Added to the norm, as `torch.nn.utils.clip_grad_norm_` does."""


def down_to(limit: Tensor, norm: Tensor) -> Tensor:
    """Return the factor that brings a norm down to a limit: exactly 1 where it lies within; shape of `norm`."""
    return torch.where(limit < norm, limit / (norm + EPS), 1.0)


@dataclass(slots=True)
class ClipByGlobalNorm:
    """Scale all gradients by ``min(1, max_norm / (‖g‖ + 1e-6))``, one factor for all: the direction stays.

    Pascanu, Mikolov, Bengio, "On the difficulty of training recurrent neural networks" (2013), algorithm 1; equal to
    `torch.nn.utils.clip_grad_norm_`. Under SGD a clipped step is a step at a smaller rate; under Adam clipping protects
    the moments from outliers and does not make ordinary steps smaller.
    """

    max_norm: float
    include: Include = "*"
    on_failure: OnFailure = field(default="raise", kw_only=True)

    def __post_init__(self) -> None:
        check_positive(max_norm=self.max_norm)
        check_on_failure(self.on_failure)

    def __call__(self, gradients: Gradients) -> Tensor:
        """Clip; return the factor."""
        rows = gradients.rows(self.include)
        return gradients.scale_((self.max_norm / (gradients.norm_of(rows) + EPS)).clamp(max=1.0), rows)


@dataclass(slots=True)
class ClipByTensorNorm:
    """Scale each gradient by ``min(1, max_norm / (‖g_i‖ + 1e-6))``: one large tensor does not shrink the others.

    The layer-wise variant of Pascanu (2013), algorithm 1; the direction of the whole gradient changes.
    """

    max_norm: float
    include: Include = "*"
    on_failure: OnFailure = field(default="raise", kw_only=True)

    def __post_init__(self) -> None:
        check_positive(max_norm=self.max_norm)
        check_on_failure(self.on_failure)

    def __call__(self, gradients: Gradients) -> Tensor:
        """Clip; return the factors."""
        rows = gradients.rows(self.include)
        norms = gradients.norms if rows is None else gradients.norms[rows]
        return gradients.scale_each_((self.max_norm / (norms + EPS)).clamp(max=1.0), rows)


@dataclass(slots=True)
class ClipByValue:
    """Clamp every element to [-limit, limit]; equal to `torch.nn.utils.clip_grad_value_`.

    The direction changes, and infinite elements become the limit: put `SkipNonfinite` before it.
    """

    limit: float
    include: Include = "*"
    on_failure: OnFailure = field(default="raise", kw_only=True)

    def __post_init__(self) -> None:
        check_positive(limit=self.limit)
        check_on_failure(self.on_failure)

    def __call__(self, gradients: Gradients) -> None:
        """Clamp."""
        gradients.clamp_(self.limit, self.include)

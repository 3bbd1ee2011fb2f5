"""Adaptive gradient clipping: a limit for each output unit, relative to its weights."""

from __future__ import annotations

from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from gradwatch.transforms.gradients import Gradients
from gradwatch.transforms.options import OnFailure, check_on_failure, check_positive

TINY = 1e-6


@dataclass(slots=True)
class AdaptiveGradientClip:
    """Clip each unit's gradient to `ratio` times the norm of its weights (AGC).

    Brock, De, Smith, Simonyan, "High-performance large-scale image recognition without normalization" (2021),
    equation 3: ``g_u ← ratio · max(‖w_u‖, eps) / ‖g_u‖ · g_u`` where ``‖g_u‖ > ratio · max(‖w_u‖, eps)``. A unit is a
    row: everything but the first dimension; a bias is one unit an element. The paper leaves the last linear layer out:
    `exclude` names it, or "last", the default, finds it.
    """

    ratio: float = 0.01
    eps: float = 1e-3
    exclude: str | tuple[str, ...] = "last"
    on_failure: OnFailure = field(default="raise", kw_only=True)

    def __post_init__(self) -> None:
        check_positive(ratio=self.ratio, eps=self.eps)
        check_on_failure(self.on_failure)

    def __call__(self, gradients: Gradients) -> None:
        """Clip every unit that is over its limit."""
        gradients.scale_units_(self._factors, self._rows(gradients))

    def _rows(self, gradients: Gradients) -> list[int]:
        if self.exclude == "last":
            matrices = [name for name, p in zip(gradients.names, gradients.params, strict=True) if p.dim() >= 2]
            head = matrices[-1].rpartition(".")[0] if matrices else None
            return [row for row, name in enumerate(gradients.names) if name.rpartition(".")[0] != head]
        globs = (self.exclude,) if isinstance(self.exclude, str) else self.exclude
        return [row for row, name in enumerate(gradients.names) if not any(fnmatchcase(name, glob) for glob in globs)]

    def _factors(self, parameter: Tensor, gradient: Tensor) -> Tensor:
        if gradient.shape != parameter.shape:  # sparse: rows of an embedding that were used, and no others
            return torch.ones((), device=gradient.device)
        limit = self.ratio * _unit_norm(parameter.detach()).clamp(min=self.eps)
        norm = _unit_norm(gradient)
        return torch.where(norm > limit, limit / norm.clamp(min=TINY), 1.0)


def _unit_norm(values: Tensor) -> Tensor:
    """Norm of each unit, in float32 at least, of a shape that broadcasts over the tensor."""
    dtype = torch.promote_types(values.dtype, torch.float32)
    if values.dim() < 2:
        return values.abs().to(dtype if not values.is_complex() else torch.float32)
    dims = tuple(range(1, values.dim()))
    norm: Tensor = torch.linalg.vector_norm(values, dim=dims, keepdim=True, dtype=dtype)
    return norm

"""What a transform would have done."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from gradwatch.errors import ConfigurationError
from gradwatch.transforms.gradients import Gradients, Transform


@dataclass(slots=True)
class DryRun:
    """Run a transform on the norms without touching a gradient: its factor is logged, and nothing is clipped.

    `AdaptiveGradientClip` and `ClipByValue` have no factor; they are not computed.
    """

    transform: Transform
    on_failure: str = field(default="disable", kw_only=True)

    def __post_init__(self) -> None:
        if not callable(self.transform):
            raise ConfigurationError(f"DryRun() takes a transform, such as DryRun(ZClip()), got {self.transform!r}")

    def __call__(self, gradients: Gradients) -> Tensor | None:
        """Return the factor that would have been applied."""
        before, gradients.dry = gradients.dry, True
        try:
            factor: Any = self.transform(gradients)
        finally:
            gradients.dry = before
        return factor if isinstance(factor, Tensor) else None

    def state(self) -> Mapping[str, Any]:
        """Return what `restore` takes."""
        state = getattr(self.transform, "state", None)
        return {} if state is None else state()

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` returned."""
        if state and hasattr(self.transform, "restore"):
            self.transform.restore(state)

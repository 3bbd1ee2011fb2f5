"""Wrappers around a GradScaler's unscaling: where mixed-precision gradients are first seen in their own size."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType

from torch import Tensor
from torch.amp import GradScaler
from torch.optim import Optimizer

from gradwatch.attach.weak import WeakHook
from gradwatch.pipeline import GradWatch


class Wrapped:
    """A scaler's method, with a call of ours behind it. Copies and pickles give the plain method again."""

    def __init__(self, scaler: GradScaler, name: str, after: WeakHook) -> None:
        self._scaler = scaler
        self._name = name
        self._original: Callable[..., object] = getattr(scaler, name)
        self._after = after

    def __call__(self, *arguments: object, **keywords: object) -> object:
        """Call the scaler's own method first."""
        result = self._original(*arguments, **keywords)
        self._after(*arguments, **keywords)
        return result

    def __reduce__(self) -> tuple[Callable[..., object], tuple[GradScaler, str]]:
        return (getattr, (self._scaler, self._name))


class ScalerHooks:
    """Observes behind ``scaler.unscale_`` and notices, at ``scaler.update``, the steps that it skipped.

    ``scaler.step`` calls ``unscale_`` itself if the user has not; a fused optimizer is stepped without it, on
    gradients that are still scaled: its step hook divides.
    """

    def __init__(self, watch: GradWatch, scaler: GradScaler) -> None:
        self._watch = watch
        self._scaler = scaler

    def attach(self) -> None:
        """Wrap both methods on the instance until the watch is detached."""
        hooks = {"unscale_": self.unscaled, "update": self.updated}
        for name, hook in hooks.items():
            setattr(self._scaler, name, Wrapped(self._scaler, name, WeakHook(hook)))
        self._watch.on_detach(self.remove)

    def remove(self) -> None:
        """Give the scaler its own methods back."""
        for name in ("unscale_", "update"):
            self._scaler.__dict__.pop(name, None)

    def unscaled(self, optimizer: Optimizer) -> None:
        """Gradients have their own size now: observe, also if they overflowed."""
        for lane in self._watch.lanes.values():
            if lane.optimizer is optimizer or lane.optimizer is getattr(optimizer, "optimizer", None):
                self._watch.act(lane, lambda lane: lane.skip())  # what was observed before was never applied
                self._watch.act(lane, lambda lane: lane.observe("unscale", loss_scale=self._scale()))

    def updated(self, *_arguments: object, **_keywords: object) -> None:
        """The cycle is over: what is still pending was skipped."""
        for lane in self._watch.lanes.values():
            self._watch.act(lane, lambda lane: lane.skip())

    def _scale(self) -> Tensor | None:
        """Return the scale without waiting for it, as `get_scale` would; a copy, for `update` writes in place."""
        scale = self._scaler._get_scale_async()  # noqa: SLF001
        return scale.clone() if isinstance(scale, Tensor) else None


def find_on_stack() -> GradScaler | None:
    """Return the GradScaler whose ``step`` is calling the optimizer, for users who did not pass it.

    Only the scaler's own frame is opened: reading ``f_locals`` of the user's would keep their variables alive.
    """
    frame: FrameType | None = sys._getframe(1)  # noqa: SLF001 - one walk, at the first step only
    while frame is not None:
        if frame.f_code is GradScaler.step.__code__:
            owner = frame.f_locals.get("self")
            return owner if isinstance(owner, GradScaler) and owner.is_enabled() else None
        frame = frame.f_back
    return None

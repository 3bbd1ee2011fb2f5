"""Hooks on the optimizer: the last look before the update, and the commit after it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from gradwatch.attach.overlay import Overlay
from gradwatch.attach.weak import WeakHook
from gradwatch.lane import Lane
from gradwatch.pipeline import GradWatch

Arguments: TypeAlias = tuple[Any, ...]
Keywords: TypeAlias = dict[str, Any]


class StepHooks:
    """Observes one optimizer's steps. It holds the watch strongly, so that a watch lives as long as its optimizer."""

    def __init__(
        self, watch: GradWatch, lane: Lane, on_first_step: Callable[[], None] | None, *, keeps_pending: bool
    ) -> None:
        self.watch: GradWatch | None = watch
        self._lane = lane
        self._on_first_step = on_first_step
        self._keeps_pending = keeps_pending
        self._inside = False
        self._overlay = Overlay()

    def before(self, optimizer: Optimizer, arguments: Arguments, keywords: Keywords) -> tuple[Any, Any] | None:
        """Observe what nobody has observed; a closure's gradients do not exist yet: observe inside it."""
        with self._running():
            self._overlay.restore(optimizer)  # the step before may have raised
            result = self._before(optimizer, arguments, keywords)
            if self.watch is not None and self._lane.rate_factors:
                self._overlay.put_rates(optimizer, self._lane.rate_factors)
            return result

    def after(self, optimizer: Optimizer, _arguments: Arguments, _keywords: Keywords) -> None:
        """Commit: the update was made, unless ``found_inf`` vetoed it on the device."""
        with self._running():
            if self.watch is not None:
                found_inf = getattr(optimizer, "found_inf", None)
                skipped = self._overlay.skips
                try:
                    self.watch.act(self._lane, lambda lane: _end(lane, found_inf, skipped=skipped))
                finally:
                    self._overlay.restore(optimizer)
                while self._lane.deferred:
                    self.watch.act(self._lane, lambda lane: lane.deferred.pop(0)())

    def _before(self, optimizer: Optimizer, arguments: Arguments, keywords: Keywords) -> tuple[Any, Any] | None:
        if self.watch is None:
            return None
        if (first := self._on_first_step) is not None:
            self._on_first_step = None
            self.watch.act(self._lane, lambda _: first())
        closure = arguments[1] if len(arguments) > 1 else keywords.get("closure")
        if not callable(closure):
            self.watch.act(self._lane, lambda lane: _last_look(lane, optimizer))
            self._hand_over(optimizer)
            return None
        if not self._keeps_pending:
            self.watch.act(self._lane, _before_closure)
        observed = self._observing(closure, optimizer)
        if len(arguments) > 1:
            return (arguments[0], observed, *arguments[2:]), keywords
        return arguments, {**keywords, "closure": observed}

    @contextmanager
    def _running(self) -> Iterator[None]:
        self._inside = True
        try:
            yield
        finally:
            self._inside = False

    def end(self, optimizer: Optimizer) -> None:
        """Leave the optimizer as it was."""
        if not self._inside:
            self._overlay.restore(optimizer)

    def kill(self) -> None:
        """Do nothing from now on and let the watch go."""
        self.watch, self._on_first_step = None, None

    @property
    def is_running(self) -> bool:
        """Whether the optimizer is in its loop over the hooks, which removing one would break."""
        return self._inside

    def _hand_over(self, optimizer: Optimizer) -> None:
        pending = self._lane.pending
        if pending is not None:
            self._overlay.put_handover(optimizer, pending.handover)

    def _observing(self, closure: Callable[..., object], optimizer: Optimizer) -> Callable[..., object]:
        """Wrap a closure so that its first evaluation is observed; later ones (L-BFGS) are not steps."""
        evaluated = False

        def observed(*arguments: object, **keywords: object) -> object:
            nonlocal evaluated
            result = closure(*arguments, **keywords)
            if not evaluated and self.watch is not None:
                evaluated = True
                self.watch.act(self._lane, lambda lane: _after_evaluation(lane, optimizer))
                self._hand_over(optimizer)
            elif self.watch is not None:
                self.watch.act(self._lane, lambda lane: lane.transform_again(_scale_of(optimizer)))
            return result

        return observed


def attach_all(
    watch: GradWatch, on_first_step: Callable[[], None] | None = None, *, keeps_pending: bool = False
) -> None:
    """Observe every ``optimizer.step()`` of the watched optimizers.

    `keeps_pending` says that what was observed before a step with a closure belongs to that step all the same.
    """
    others = OtherOptimizers()
    others.attach(watch, (lane.optimizer for lane in watch.lanes.values()))
    for lane in watch.lanes.values():
        lane.owned_elsewhere = others.owns
        if lane.optimizer is not None:
            _attach(watch, lane.optimizer, StepHooks(watch, lane, on_first_step, keeps_pending=keeps_pending))


def _attach(watch: GradWatch, optimizer: Optimizer, hooks: StepHooks) -> None:
    before = optimizer.register_step_pre_hook(_uncompiled(hooks.before))
    after = optimizer.register_step_post_hook(_uncompiled(hooks.after))

    def remove() -> None:
        hooks.end(optimizer)
        if not hooks.is_running:
            before.remove()
            after.remove()
        hooks.kill()

    watch.on_detach(remove)


def watched_by(optimizer: Optimizer) -> GradWatch | None:
    """Return the live watch whose hooks are on this optimizer."""
    for hook in optimizer._optimizer_step_pre_hooks.values():  # noqa: SLF001 - torch has no public list of hooks
        hooks = getattr(getattr(hook, "_torchdynamo_orig_callable", hook), "__self__", None)
        if isinstance(hooks, StepHooks) and hooks.watch is not None:
            return hooks.watch
    return None


class OtherOptimizers:
    """Notes which parameters are updated by any optimizer: none of those is an orphan."""

    def __init__(self) -> None:
        self._owned: dict[int, frozenset[int]] = {}

    def attach(self, watch: GradWatch, optimizers: Iterable[Optimizer | None]) -> None:
        """Begin with the watched ones; listen to every optimizer of the process until the watch is gone."""
        for optimizer in optimizers:
            if optimizer is not None:
                self.note(optimizer)
        handle = register_optimizer_step_post_hook(cast("Any", WeakHook(self.note)))
        watch.on_detach(handle.remove)
        weakref.finalize(watch, handle.remove)

    def note(self, optimizer: Optimizer, *_step: object) -> None:
        """Remember the parameters of an optimizer."""
        sizes = sum(len(group["params"]) for group in optimizer.param_groups)
        if len(self._owned.get(id(optimizer), ())) != sizes:
            self._owned[id(optimizer)] = frozenset(id(p) for group in optimizer.param_groups for p in group["params"])

    def owns(self, parameter: int) -> bool:
        """Whether any of them updates the parameter with this ``id``."""
        return any(parameter in owned for owned in self._owned.values())


def unwrap(optimizer: object) -> Optimizer | None:
    """Return the torch optimizer inside wrappers such as Accelerate's, or None if there is none."""
    seen: set[int] = set()
    while id(optimizer) not in seen:
        attributes: Mapping[str, object] = getattr(optimizer, "__dict__", {})
        if "_optimizer_step_pre_hooks" in attributes:
            return cast("Optimizer", optimizer)
        seen.add(id(optimizer))
        optimizer = attributes.get("_optimizer", attributes.get("optimizer"))
    return None


def _uncompiled(hook: Callable[..., object]) -> Any:  # noqa: ANN401 - torch types its hooks by exact signature
    """Keep a compiled ``optimizer.step`` from tracing into a hook."""
    return torch.compiler.disable(hook)


def _last_look(lane: Lane, optimizer: Optimizer) -> None:
    if lane.pending is None or lane.pending.sealed:  # sealed: the step before it raised
        lane.observe("step", divisor=_scale_of(optimizer))
    lane.before_update()


def _before_closure(lane: Lane) -> None:
    lane.discard()  # whatever was seen belongs to gradients that the closure will replace


def _after_evaluation(lane: Lane, optimizer: Optimizer) -> None:
    if lane.pending is None:
        lane.observe("closure", divisor=_scale_of(optimizer))
    lane.before_update()


def _end(lane: Lane, found_inf: Tensor | None, *, skipped: bool) -> None:
    if skipped:
        lane.skip()
    else:
        lane.commit(found_inf=found_inf)
    lane.hooked = True


def _scale_of(optimizer: Optimizer) -> Tensor | None:
    """Return what a GradScaler left in the gradients for a fused optimizer to divide by."""
    scale = getattr(optimizer, "grad_scale", None)
    return scale if isinstance(scale, Tensor) else None

"""Whether the gradients were cleared between two steps, seen from what a backward pass finds when it arrives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from gradwatch.attach.weak import WeakHook
from gradwatch.lane import Lane
from gradwatch.pipeline import GradWatch

MAX_PARAMETERS = 3
"""Parameters whose gradients are looked at: a hook each."""


@dataclass(slots=True, eq=False)
class _Mark:
    """One parameter's gradient right after the last commit."""

    parameter: nn.Parameter
    identity: int = 0
    version: int = -1

    def set(self) -> None:
        gradient = self.parameter.grad
        self.identity, self.version = (0, -1) if gradient is None else (id(gradient), gradient._version)  # noqa: SLF001 - the only sign of a change in place

    def is_untouched(self) -> bool:
        gradient = self.parameter.grad
        return gradient is not None and id(gradient) == self.identity and gradient._version == self.version  # noqa: SLF001


class ClearedCheck:
    """Compares each gradient at the arrival of a backward pass with itself as the last commit or backward pass left it.

    What is clipped between a backward pass and the commit does not count: the commit sets the mark again. A backward
    pass for another optimizer (a generator's fills the discriminator's gradients too) adds to what it finds, and
    whether the user clears that before the next pass is seen then.
    """

    def __init__(self, watch: GradWatch, lane: Lane) -> None:
        self._watch = watch
        self._lane = lane
        self._marks: list[_Mark] = []
        self._handles: list[RemovableHandle] = []
        self._cleared: bool | None = None
        self._committed = False

    def attach(self) -> None:
        """Hang the hooks on, now and whenever the lane plans anew."""
        self.hang()
        self._lane.on_plan.append(WeakHook(self.hang))
        self._lane.on_end.append(WeakHook(self.step_ended))
        self._lane.was_cleared = lambda: self._cleared
        self._watch.on_detach(self.remove)

    def hang(self) -> None:
        """Choose parameters of the optimizer over the whole depth."""
        self.remove()
        groups = self._lane.groups()
        entries = [entry.parameter for entry in self._lane.entries() if id(entry.parameter) in groups]
        stride = max(1, -(-len(entries) // MAX_PARAMETERS))
        self._marks = [_Mark(parameter) for parameter in entries[::-1][::stride]]
        for index, mark in enumerate(self._marks):
            arrives, added = cast("Any", WeakHook(self.reached, index)), cast("Any", WeakHook(self.added, index))
            self._handles.append(mark.parameter.register_hook(arrives))
            self._handles.append(mark.parameter.register_post_accumulate_grad_hook(added))

    def remove(self) -> None:
        """Take the hooks off."""
        while self._handles:
            self._handles.pop().remove()

    def reached(self, index: int, _gradient: Tensor) -> None:
        """A gradient arrives and is about to be added to what is there."""
        mark = self._marks[index]
        if mark.version < 0 or not self._committed:
            return  # nothing was there, or it is the first window: nothing to clear
        self._cleared = bool(self._cleared) or not mark.is_untouched()

    def added(self, index: int, _parameter: nn.Parameter) -> None:
        """It was added: what changes from here on is the user's doing."""
        self._marks[index].set()

    def step_ended(self) -> None:
        """Remember every gradient as the commit left it."""
        self._cleared, self._committed = None, True
        for mark in self._marks:
            mark.set()

"""The end of backward: the only automatic point that is before the user's clipping and after the DDP all-reduce."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn
from torch.autograd import Variable
from torch.utils.hooks import RemovableHandle

from gradwatch.attach.weak import WeakHook
from gradwatch.errors import Part, contain
from gradwatch.lane import Lane
from gradwatch.pipeline import GradWatch

MAX_TRIGGERS = 32


class EndOfBackward:
    """Observes lanes when a backward pass is over, by an engine callback that a few parameters' hooks ask for.

    A hook on every parameter would cost 3 µs each; one a top-level block is enough, and a step whose backward reached
    none of them is seen by the step hooks. The callback queues itself once more, because DDP's reduction is queued in
    the same way: the second one comes after it.
    """

    def __init__(self, watch: GradWatch) -> None:
        self.enabled = True
        self._watch = watch
        self._task: int | None = None
        self._reached: set[str] = set()
        self._windows = {name: Window() for name in watch.lanes}
        self._handles: dict[str, list[RemovableHandle]] = {}
        self._part = Part("watching the end of backward")
        for lane in watch.lanes.values():
            self._handles[lane.name] = []

    def attach(self) -> None:
        """Hang the triggers on, now and whenever a lane plans anew."""
        for lane in self._watch.lanes.values():
            lane.on_plan.append(WeakHook(self.hang, lane.name))
            lane.on_end.append(WeakHook(self.step_ended, lane.name))
            self.hang(lane.name)
        self._watch.on_detach(self.remove)

    def hang(self, name: str) -> None:
        """Put this lane's triggers on the parameters that it watches now."""
        self._unhang(name)
        if not self.enabled:
            return
        lane = self._watch.lanes[name]
        for parameter in _triggers(lane):
            hook = WeakHook(self.reached, name)
            self._handles[name].append(parameter.register_post_accumulate_grad_hook(cast("Any", hook)))

    def remove(self) -> None:
        """Take every trigger off."""
        self.enabled = False
        for name in self._handles:
            self._unhang(name)

    def step_ended(self, name: str) -> None:
        """Learn the length of the accumulation window that ended with this step."""
        self._windows[name].close()

    def reached(self, name: str, _parameter: nn.Parameter) -> None:
        """A gradient has arrived: ask the engine for a call at the end, once a backward pass.

        Keyed by the engine's task, because a flag would stay set after an exception inside backward.
        """
        if not self.enabled or self._part.failed or not self._watch.active:
            return
        task = torch._C._current_graph_task_id()  # noqa: SLF001 - the only name of a backward pass
        if task == self._task:
            self._reached.add(name)
            return
        self._task, self._reached = task, {name}
        with contain(self._part):
            _queue(lambda: _queue(WeakHook(self.ended)))

    def ended(self) -> None:
        """Observe every lane that the pass reached, at the last backward of its accumulation window only."""
        for name in self._reached:
            lane = self._watch.lanes[name]
            if self.enabled and self._windows[name].is_due() and not (lane.pending and lane.pending.sealed):
                self._watch.act(lane, lambda lane: lane.observe("backward"))

    def _unhang(self, name: str) -> None:
        while self._handles[name]:
            self._handles[name].pop().remove()


class Window:
    """Counts the backward passes of one accumulation window; its length is known from the window before."""

    def __init__(self) -> None:
        self._expected = 1
        self._passed = 0

    def is_due(self) -> bool:
        """Count one pass; true from the expected last one on. A shorter window is measured at the step."""
        self._passed += 1
        return self._passed >= self._expected

    def close(self) -> None:
        """The optimizer has stepped."""
        if self._passed:
            self._expected = self._passed
        self._passed = 0


def _queue(callback: Callable[[], object]) -> None:
    Variable._execution_engine.queue_callback(cast("Any", callback))  # noqa: SLF001 - as DDP does


def _triggers(lane: Lane) -> list[nn.Parameter]:
    """One trainable parameter a top-level block, the last of each: it lies nearest the loss; evenly thinned."""
    entries = lane.entries()
    depth = _common_depth([entry.layer for entry in entries])
    blocks = {".".join(entry.name.split(".")[: depth + 1]): entry.parameter for entry in entries}
    chosen = list(blocks.values())
    return chosen[:: -(-len(chosen) // MAX_TRIGGERS)] if chosen else []


def _common_depth(layers: list[str]) -> int:
    """Number of leading components that all layer names share: wrappers with a single child are no blocks."""
    paths = [layer.split(".") for layer in layers]
    depth = 0
    while paths and all(len(path) > depth and path[depth] == paths[0][depth] for path in paths):
        depth += 1
    return depth

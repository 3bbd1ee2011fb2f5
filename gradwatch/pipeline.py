"""THE PIPELINE: what happens to a step once its numbers have arrived, and the life cycle of it all."""

from __future__ import annotations

import atexit
import os
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from types import TracebackType
from typing import Any, Self, TypeAlias, cast

from torch import Tensor
from torch.optim import Optimizer

from gradwatch.agreement import agree
from gradwatch.assembly import assemble
from gradwatch.detectors import build
from gradwatch.episodes import Episodes
from gradwatch.errors import ConfigurationError, Part, contain
from gradwatch.interventions import ChangeLog
from gradwatch.judge import Judge
from gradwatch.lane import Lane, LossMean
from gradwatch.reacting import Reactions, budgets_of
from gradwatch.reactions import Reaction
from gradwatch.records import Alert, Intervention, Sink, Snapshot
from gradwatch.run import LaneRun
from gradwatch.state import from_portable, to_portable
from gradwatch.transforming import Transforms
from gradwatch.transforms.gradients import Transform

Remover: TypeAlias = Callable[[], None]

STATE_VERSION = 1
MAX_INTERVENTIONS = 10_000


class GradWatch:
    """What `gradwatch.watch` returns: drives measuring, judging and writing, and can be taken off again."""

    def __init__(  # noqa: PLR0913 - the parts of a watch
        self,
        lanes: Iterable[Lane],
        sinks: Iterable[Sink],
        *,
        detectors: Iterable[object],
        mute: Iterable[tuple[str, str]] = (),
        transforms: Iterable[Transform] = (),
        reactions: Iterable[Reaction] = (),
    ) -> None:
        self.lanes = {lane.name: lane for lane in lanes}
        self.should_stop = False
        """A reaction has asked for the end of training; the loop reads it."""
        detectors, mute = tuple(detectors), tuple(mute)
        self._judges = {
            name: Judge(name=name, detectors=build(detectors), episodes=Episodes(mute=mute)) for name in self.lanes
        }
        self._sinks = [(sink, Part(f"the sink {type(sink).__name__}")) for sink in sinks]
        self._alerts: dict[object, Alert] = {}
        self._removers: list[Remover] = []
        self._latest: dict[str, Snapshot] = {}
        self._paused = False
        self._closed = False
        self._process = os.getpid()
        self._shared_loss = LossMean()
        self._interventions: list[Intervention] = []
        self._changes = {name: ChangeLog() for name in self.lanes}
        transforms, reactions = tuple(transforms), tuple(reactions)
        self._agreement = agree() if reactions else None
        self._agreeing = Part("agreeing with the other ranks")
        own = (lambda parts: tuple(map(deepcopy, parts))) if len(self.lanes) > 1 else tuple
        self._reactions = {
            name: Reactions(own((*reactions, *budgets_of(transforms))), LaneRun(lane, self._stop))
            for name, lane in self.lanes.items()
        }
        for name, lane in self.lanes.items():
            # What a transform remembers is of one optimizer: with several each has copies of its own.
            lane.transforms = Transforms(own(transforms))
            lane.wants_detail = self._judges[name].wants_detail
            lane.wants_probe = self._judges[name].wants_probe
            lane.shared_loss = self._shared_loss
        self._close_sinks = weakref.finalize(self, _close_sinks, self._sinks, self._process)
        atexit.register(_close, weakref.ref(self))

    # -- for people ----------------------------------------------------------------------------------------------

    @property
    def alerts(self) -> tuple[Alert, ...]:
        """All alerts so far, resolved ones too, in order of opening."""
        return tuple(self._alerts.values())

    @property
    def interventions(self) -> tuple[Intervention, ...]:
        """What was changed about the training, in order: the newest ten thousand changes."""
        return tuple(self._interventions)

    @property
    def latest(self) -> Snapshot | None:
        """The newest Snapshot that has arrived, of any optimizer."""
        return next(reversed(self._latest.values()), None)

    def latest_of(self, optimizer: str) -> Snapshot | None:
        """The newest judged step of the optimizer of this name."""
        return self._latest.get(optimizer)

    def log_loss(self, loss: object, *, optimizer: str | None = None) -> None:
        """Hand over the loss of the step to come, before the optimizer steps; it is not read before it has arrived.

        Several losses before one step (accumulation) are averaged. With several optimizers `optimizer` names the one
        that steps on this loss; without it, the loss goes to whichever steps next.

        Raises:
            ConfigurationError: the loss is not a number or a tensor of one element.
        """
        if not isinstance(loss, Tensor | float | int) or (isinstance(loss, Tensor) and loss.numel() != 1):
            shape = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else repr(loss)
            raise ConfigurationError(f"log_loss() takes one number, got {shape}; reduce it first, as in loss.mean()")
        if not self.active:
            return
        if optimizer is None:
            self._shared_loss.add(loss)
        for lane in () if optimizer is None else self._chosen(optimizer):
            lane.loss.add(loss)

    def observe(self, optimizer: Optimizer | str | None = None) -> None:
        """Measure the gradients now; for loops whose gradients no hook can see, before anything clips them."""
        for lane in self._chosen(optimizer):
            self.act(lane, lambda lane: lane.observe("manual"))

    def step(self, optimizer: Optimizer | str | None = None) -> None:
        """Tell that the parameters were updated; for loops whose update no hook can see.

        Measures the gradients first if nothing has. Where hooks saw the step already, this does nothing.
        """
        for lane in self._chosen(optimizer):
            if lane.hooked and lane.pending is None:
                lane.hooked = False
                continue
            self.act(lane, _step_by_hand)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Look away inside the block: a learning-rate finder, an inner loop."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def state_dict(self) -> dict[str, object]:
        """Return what must survive a restart: plain Python values and tensors only."""
        self.collect(wait=True)
        lanes = {
            name: {
                "step": lane.step,
                "judge": to_portable(self._judges[name].state()),
                "transforms": lane.transforms.state(),
                "reactions": to_portable(self._reactions[name].state()),
                "rate_factors": {str(group): factor for group, factor in lane.rate_factors.items()},
            }
            for name, lane in self.lanes.items()
        }
        return {"version": STATE_VERSION, "lanes": lanes}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned.

        Raises:
            ConfigurationError: the state is of another version or of other optimizers.
        """
        lanes = state.get("lanes")
        if state.get("version") != STATE_VERSION or not isinstance(lanes, Mapping):
            raise ConfigurationError(
                f"this is no state of gradwatch in version {STATE_VERSION}; pass what watch.state_dict() returned"
            )
        if set(lanes) != set(self.lanes):
            raise ConfigurationError(
                f"the state is of the optimizers {sorted(lanes)}, this watch has {sorted(self.lanes)}; "
                "give watch() the same names"
            )
        for name, saved in lanes.items():
            self.lanes[name].step = saved["step"]
            judge = self._judges[name]
            judge.restore(from_portable(saved["judge"]))
            self._alerts |= {alert.key: alert for alert in judge.episodes.open}
            self.lanes[name].transforms.restore(saved.get("transforms", ()))
            self._reactions[name].restore(cast("Sequence[Any]", from_portable(saved.get("reactions", []))))
            factors = saved.get("rate_factors", {})
            self.lanes[name].rate_factors = {int(group): factor for group, factor in factors.items()}

    def detach(self) -> None:
        """Take every hook off model, optimizer and scaler; what was measured stays readable."""
        self.collect(wait=True)
        while self._removers:
            self._removers.pop()()

    def close(self) -> None:
        """Detach, write out what is left and close the files."""
        if self._closed:
            return
        self.detach()
        self._closed = True
        self._close_sinks()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    # -- for attach and the integrations -------------------------------------------------------------------------

    @property
    def active(self) -> bool:
        """Whether steps are looked at: not paused, not closed, and in the process that made the watch."""
        return not self._paused and not self._closed and os.getpid() == self._process

    def on_detach(self, remover: Remover) -> None:
        """Let `remover` undo an attachment; called in reverse order."""
        self._removers.append(remover)

    def act(self, lane: Lane, act: Callable[[Lane], object]) -> None:
        """Perform one act on a lane, contained, and judge what has arrived."""
        if not self.active or lane.part.failed or lane.is_capturing():
            return
        with contain(lane.part):
            act(lane)
            self._collect(lane)

    def collect(self, *, wait: bool = False) -> None:
        """Judge and write every step that has arrived; with `wait` every step there is."""
        for lane in self.lanes.values():
            if not lane.part.failed:
                with contain(lane.part):
                    self._collect(lane, wait=wait)

    def _collect(self, lane: Lane, *, wait: bool = False) -> None:
        # Ranks that have to agree judge the same step at the same time.
        for delivery in lane.deliveries(wait=wait or self._agreement is not None):
            snapshot = assemble(lane.name, delivery, several_lanes=len(self.lanes) > 1)
            made: list[Intervention] = list(self._changes[lane.name].update(snapshot))
            if (rate := self._changes[lane.name].clip_rate) is not None:
                snapshot = replace(snapshot, clip_rate=rate)
            self._latest.pop(lane.name, None)  # the newest is last
            self._latest[lane.name] = snapshot
            changed = self._judges[lane.name].judge(snapshot)
            for alert in changed:
                self._alerts[alert.key] = alert
            try:
                for intervention in self._react(lane, snapshot, changed):
                    made.append(intervention)  # noqa: PERF402 - a stop may end it halfway
            finally:  # a stop is an exception: what led to it is on record all the same
                self._interventions = [*self._interventions, *made][-MAX_INTERVENTIONS:]
                self._write(snapshot, changed, tuple(made))

    def _react(self, lane: Lane, snapshot: Snapshot, alerts: tuple[Alert, ...]) -> Iterator[Intervention]:
        """Let reactions have their turn, on what rank 0 knows where there are several."""
        if self._agreement is not None:
            agreed = None
            if not self._agreeing.failed:
                with contain(self._agreeing):
                    agreed = self._agreement.share(snapshot.loss, alerts)
            if agreed is None:
                return
            snapshot, alerts = replace(snapshot, loss=agreed[0]), agreed[1]
        yield from self._reactions[lane.name].react(snapshot, alerts)

    def _write(self, snapshot: Snapshot, alerts: tuple[Alert, ...], interventions: tuple[Intervention, ...]) -> None:
        for sink, part in self._sinks:
            if not part.failed:
                with contain(part):
                    sink.write(snapshot, alerts, interventions)

    def _stop(self, _reason: str) -> None:
        self.should_stop = True

    def _chosen(self, optimizer: Optimizer | str | None) -> tuple[Lane, ...]:
        """Return the lanes meant: all of them for None."""
        if optimizer is None:
            return tuple(self.lanes.values())
        for lane in self.lanes.values():
            if optimizer in (lane.name, lane.optimizer):
                return (lane,)
        raise ConfigurationError(
            f"no watched optimizer is called {optimizer!r}; this watch has {', '.join(map(repr, self.lanes))}"
        )


def _step_by_hand(lane: Lane) -> None:
    if lane.pending is None:
        lane.observe("manual")
    lane.commit()


def _close(reference: weakref.ref[GradWatch]) -> None:
    """Bring in what is still on the device before the interpreter goes."""
    watch = reference()
    if watch is not None:
        watch.close()


def _close_sinks(sinks: Iterable[tuple[Sink, Part]], process: int) -> None:
    """Close the files of a watch that was closed or forgotten; a forked child must not touch its parent's."""
    if os.getpid() != process:
        return
    for sink, part in sinks:
        with contain(part):
            sink.close()

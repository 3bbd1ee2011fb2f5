"""What may happen to training after a step was judged: backoff, stopping, saving, rolling back. All of it is opt-in."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from os import PathLike
from typing import Any, Protocol, TypeAlias, cast

from gradwatch.errors import ConfigurationError, TrainingStopped
from gradwatch.records import KINDS, Alert, Intervention, Snapshot
from gradwatch.trouble import Trouble


class Run(Protocol):
    """The running training of one optimizer, as reactions may change it; each change is an Intervention."""

    def multiply_lr(self, factor: float, *, reason: str, group: int | None = None) -> Intervention:
        """Multiply the learning rate of all parameter groups, or of one, by `factor` from the next step on."""

    def stop(self, reason: str) -> Intervention:
        """Ask the loop to end: sets `GradWatch.should_stop`, and Lightning's ``trainer.should_stop``."""

    def save(self, path: str | PathLike[str], *, reason: str) -> Intervention:
        """Write model and optimizer to a file that ``torch.load(weights_only=True)`` reads."""

    def capture(self) -> object:
        """Copy model and optimizer state to the host."""

    def restore(self, captured: object, *, reason: str) -> Intervention:
        """Put a captured state back when the step is over; learning rates stay as they are."""


Reaction: TypeAlias = Callable[[Snapshot, tuple[Alert, ...], Run], Iterable[Intervention]]
"""Called after every judged step with the alerts that opened or got worse at it."""


def on(kind: str, reaction: Reaction | Callable[[Alert, Run], object]) -> Reaction:
    """Return the reaction shown only alerts of one kind; it is still called after every step.

    A plain function of an alert and a run is called when such an alert opens or escalates.

    Raises:
        ConfigurationError: the kind is not a string, or the reaction cannot be called.
    """
    if not isinstance(kind, str):
        raise ConfigurationError(f"on() takes a kind of alert, such as 'exploding', got {kind!r}")
    if not callable(reaction):
        raise ConfigurationError(f"on({kind!r}, ...) takes a reaction, such as BackOffLR(), got {reaction!r}")
    return _On(kind, reaction)


@dataclass(slots=True)
class _On:
    kind: str
    reaction: Callable[..., Any]

    def __call__(self, snapshot: Snapshot, alerts: tuple[Alert, ...], run: Run) -> Iterator[Intervention]:
        mine = tuple(alert for alert in alerts if alert.kind == self.kind)
        if not _takes_an_alert(self.reaction):
            yield from self.reaction(snapshot, mine, run) or ()
            return
        for alert in mine:
            result = self.reaction(alert, run)
            if isinstance(result, Intervention):
                yield result
            elif isinstance(result, Iterable):
                yield from result

    def state(self) -> Mapping[str, Any]:
        return cast("Mapping[str, Any]", self.reaction.state()) if hasattr(self.reaction, "state") else {}

    def restore(self, state: Mapping[str, Any]) -> None:
        if state and hasattr(self.reaction, "restore"):
            self.reaction.restore(state)


def kinds_of(reactions: Iterable[object]) -> tuple[str, ...]:
    """Return the kinds that reactions were made for, to be checked against those there are."""
    return tuple(reaction.kind for reaction in reactions if isinstance(reaction, _On))


def check_kinds(reactions: Iterable[object], kinds: Iterable[str] = KINDS) -> None:
    """Raise if a reaction waits for a kind of alert that no detector raises.

    Raises:
        ConfigurationError: names the kind and those there are.
    """
    known = tuple(kinds)
    for kind in kinds_of(reactions):
        if kind not in known:
            raise ConfigurationError(f"{kind!r} is no kind of alert; use one of {', '.join(known)}")


def _takes_an_alert(reaction: Callable[..., Any]) -> bool:
    try:
        parameters = inspect.signature(reaction).parameters.values()
    except (TypeError, ValueError):
        return False
    required = [
        p for p in parameters if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    return len(required) == 2


@dataclass(slots=True, kw_only=True)
class BackOffLR:
    """Multiply the learning rate by `factor` when training gets into trouble, and let it grow back slowly.

    Trouble is a loss that doubles or rises for five steps, a gradient norm eight times the usual one for three steps,
    repeated non-finite steps, or an alert of ``exploding`` or ``spike`` (see `gradwatch.trouble`). After `cooldown`
    steps the rate may fall again; after `recover_after` quiet steps it grows by √2, up to a ceiling that each event
    lowers to 0.7 of where the trouble began: growing back in full leads back into it. At the floor, or after
    `max_events`, training is asked to stop. The scheduler's own rate is never touched. A fast divergence needs
    `Rollback` or clipping as well.
    """

    factor: float = 0.5
    floor: float = 1 / 64
    cooldown: int = 20
    recover_after: int = 100
    growth: float = 2**0.5
    ceiling_decay: float = 0.7
    grace: int = 50
    max_events: int = 8
    _current: float = field(default=1.0, init=False, repr=False)
    _ceiling: float = field(default=1.0, init=False, repr=False)
    _cooling: int = field(default=0, init=False, repr=False)
    _clean: int = field(default=0, init=False, repr=False)
    _events: int = field(default=0, init=False, repr=False)
    _since_growth: int = field(default=10**9, init=False, repr=False)
    _patience: int = field(default=0, init=False, repr=False)
    _trouble: Trouble = field(default_factory=Trouble, init=False, repr=False)

    def __post_init__(self) -> None:
        for name in ("factor", "floor", "ceiling_decay"):
            if not 0 < getattr(self, name) < 1:
                raise ConfigurationError(f"{name} must lie between 0 and 1, got {getattr(self, name)!r}")
        for name in ("cooldown", "recover_after", "max_events"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ConfigurationError(f"{name} must be a whole number of at least 1, got {getattr(self, name)!r}")
        if not self.growth > 1:
            raise ConfigurationError(f"growth must be larger than 1, got {self.growth!r}")
        self._trouble = Trouble(grace=self.grace)
        self._patience = self.recover_after

    def __call__(self, snapshot: Snapshot, alerts: tuple[Alert, ...], run: Run) -> Iterator[Intervention]:
        """Judge one step."""
        reason = self._trouble.update(snapshot, alerts)
        self._since_growth += 1
        if reason is not None and self._cooling == 0:
            yield from self._back_off(reason, run)
            return
        self._cooling = max(0, self._cooling - 1)
        self._clean = self._clean + 1 if self._cooling == 0 and reason is None else 0
        if self._clean >= self._patience and self._current < self._ceiling:
            yield self._move(min(self._ceiling, self._current * self.growth), run, f"{self._clean} quiet steps")
            self._clean = self._since_growth = 0

    def _back_off(self, reason: str, run: Run) -> Iterator[Intervention]:
        if self._current <= self.floor or self._events >= self.max_events:
            yield run.stop(
                f"the learning rate was lowered {self._events} times and training is still in trouble: {reason}"
            )
            return
        if self._since_growth < 2 * self._patience:
            self._patience *= 2  # it grew too soon
        self._events += 1
        self._ceiling = min(self._ceiling, max(self.floor, self.ceiling_decay * self._current))
        self._cooling, self._clean = self.cooldown, 0
        self._trouble.begin_afresh()
        yield self._move(max(self.floor, self.factor * self._current), run, reason)

    def _move(self, target: float, run: Run, reason: str) -> Intervention:
        change, self._current = target / self._current, target
        return run.multiply_lr(change, reason=reason)

    def state(self) -> Mapping[str, Any]:
        """Return what `restore` takes."""
        return {"values": [getattr(self, name) for name in _REMEMBERED], "trouble": self._trouble.state()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` returned."""
        for name, value in zip(_REMEMBERED, state["values"], strict=True):
            setattr(self, name, value)
        self._trouble.restore(state["trouble"])


_REMEMBERED = ("_current", "_ceiling", "_cooling", "_clean", "_events", "_since_growth", "_patience")


@dataclass(slots=True, kw_only=True)
class Rollback:
    """Go back to a saved state when training gets into trouble. Copies model and optimizer to the host: opt-in.

    A state is saved every `every` steps and may be used once it is `age` steps old and nothing happened since: one from
    the middle of the trouble is useless. The data goes on: the bad batches are behind. After `max_restores` training is
    asked to stop. Learning rates are not restored; combine with `BackOffLR`, or the run walks into the same wall.
    """

    every: int = 50
    age: int = 20
    keep: int = 6
    max_restores: int = 5
    grace: int = 50
    _ring: list[tuple[int, object]] = field(default_factory=list, init=False, repr=False)
    _restores: int = field(default=0, init=False, repr=False)
    _resting: int = field(default=0, init=False, repr=False)
    _trouble: Trouble = field(default_factory=Trouble, init=False, repr=False)

    def __post_init__(self) -> None:
        for name in ("every", "age", "keep", "max_restores"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ConfigurationError(f"{name} must be a whole number of at least 1, got {getattr(self, name)!r}")
        self._trouble = Trouble(grace=self.grace)

    def __call__(self, snapshot: Snapshot, alerts: tuple[Alert, ...], run: Run) -> Iterator[Intervention]:
        """Save, or go back."""
        reason = self._trouble.update(snapshot, alerts)
        self._resting = max(0, self._resting - 1)
        if reason is not None and self._resting == 0:
            yield from self._go_back(snapshot.step, reason, run)
        elif reason is None and snapshot.step % self.every == 0 and not snapshot.skipped and not snapshot.bad.any():
            self._ring = [*self._ring, (snapshot.step, run.capture())][-self.keep :]

    def _go_back(self, step: int, reason: str, run: Run) -> Iterator[Intervention]:
        aged = [entry for entry in self._ring if step - entry[0] >= self.age]
        if not aged:
            return
        if self._restores >= self.max_restores:
            yield run.stop(f"the run was rolled back {self._restores} times and is still in trouble: {reason}")
            return
        self._restores += 1
        self._resting = self.age
        self._ring = aged
        self._trouble.begin_afresh()
        yield run.restore(aged[-1][1], reason=f"{reason}; back to the state of step {aged[-1][0]}")


@dataclass(slots=True, kw_only=True)
class StopTraining:
    """End training at the first alert of severity ``critical``, or of any with `any_severity`.

    The loop reads `GradWatch.should_stop`; with `hard` the step itself raises `TrainingStopped`. Usually within
    ``on("nonfinite", StopTraining())``.
    """

    hard: bool = False
    any_severity: bool = False

    def __call__(self, _snapshot: Snapshot, alerts: tuple[Alert, ...], run: Run) -> Iterator[Intervention]:
        """Stop if an alert asks for it."""
        for alert in alerts:
            if alert.severity == "critical" or self.any_severity:
                yield run.stop(alert.message)
                if self.hard:
                    raise TrainingStopped(f"{alert.kind} at step {alert.step}: {alert.message}")
                return


@dataclass(slots=True)
class SaveCheckpoint:
    """Save model and optimizer when an alert opens, once: the state before more damage is done.

    `path` may hold ``{kind}`` and ``{step}``.
    """

    path: str | PathLike[str]
    _saved: bool = field(default=False, init=False, repr=False)

    def __call__(self, snapshot: Snapshot, alerts: tuple[Alert, ...], run: Run) -> Iterator[Intervention]:
        """Save at the first alert."""
        if alerts and not self._saved:
            self._saved = True
            target = str(self.path).format(kind=alerts[0].kind, step=snapshot.step)
            yield run.save(target, reason=alerts[0].message)


@dataclass(slots=True)
class SkipBudget:
    """Ends a run whose steps are skipped again and again, with an error that names the tensors."""

    max_consecutive: int
    max_in_window: int
    window: int = 100
    _recent: list[bool] = field(default_factory=list, init=False, repr=False)

    def __call__(self, snapshot: Snapshot, _alerts: tuple[Alert, ...], _run: Run) -> Iterator[Intervention]:
        """Count one step."""
        self._recent = [*self._recent[-self.window + 1 :], snapshot.vetoed]
        in_a_row = next((i for i, skipped in enumerate(reversed(self._recent)) if not skipped), len(self._recent))
        if in_a_row > self.max_consecutive or sum(self._recent) > self.max_in_window:
            bad = [snapshot.names[row] for row in snapshot.bad.nonzero()[0].tolist()]
            where = (
                f"the gradients of {', '.join(bad[:5])} are not finite" if bad else "the norm is far above all others"
            )
            raise TrainingStopped(
                f"{sum(self._recent)} of the last {len(self._recent)} steps were skipped, {in_a_row} in a row: "
                f"{where}; the run does not train"
            )
        yield from ()

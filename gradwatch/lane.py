"""THE HOT PATH: what one optimizer's step costs. Everything here runs on the training thread and waits for nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gradwatch.cadence import DETAIL_EVERY, detail_is_due, probe_is_due
from gradwatch.errors import Part
from gradwatch.handover import Handover
from gradwatch.measure.clipped import look_again
from gradwatch.measure.plan import Backend, Meter, plan
from gradwatch.probe.recorder import Probed
from gradwatch.records import Source, Tensors
from gradwatch.table import StatTable
from gradwatch.targets import Entry, Target
from gradwatch.transfer import Delivery, Transfer
from gradwatch.transforming import Transforms, finish, gradients_of, merged, names_of

SCAN_EVERY = 100
"""The models are searched for new parameters at every tenth of the first hundred steps, later at every hundredth."""

_versions = attrgetter("_version")


@dataclass(frozen=True, slots=True, eq=False)
class StepNote:
    """What the host knows about a step while its numbers are still on the device."""

    step: int
    log_step: int
    source: Source
    skipped: bool
    detail: bool
    tensors: Tensors
    optimizer: str
    learning_rates: tuple[float | None, ...]
    """None where the rate is a tensor: its value travels with the table."""
    weight_decay: tuple[float, ...]
    eps: tuple[float, ...]
    scheduled: bool
    transforms: tuple[str, ...] = ()
    probed: tuple[Probed, ...] = ()
    cleared: bool | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Taken:
    """What was read of a model's forward passes since the step before."""

    input: Mapping[str, Tensor]
    numbers: Tensor | None
    probed: Probed | None


class Reader(Protocol):
    """Reads forward passes."""

    def take(self, lane: Lane) -> Taken | None:
        """Hand over what was read since the step before; None if it belongs to another lane."""


@dataclass(slots=True, eq=False)
class Pending:
    """A step that was observed and is neither committed nor skipped yet."""

    step: int
    log_step: int | None
    source: Source
    detail: bool
    table: StatTable
    loss_scale: Tensor | float | None
    divisor: Tensor | None
    """What the gradients in memory are still multiplied by."""
    identities: list[int]
    """`id` and version of the gradients: whoever changes one before the update has clipped it."""
    versions: list[int]
    scalars: dict[str, Tensor | float] = field(default_factory=dict)
    sampled: bool = False
    """The weights were sampled before the update."""
    clipped: bool = False
    """Somebody else changed the gradients after they were observed."""
    handover: Handover = field(default_factory=Handover)
    """What the transforms leave for the optimizer."""
    sealed: bool = False
    """The update is under way: later gradients (L-BFGS evaluates its closure again) are not this step's."""


@dataclass(slots=True, eq=False)
class LossMean:
    """Mean of the losses logged since it was last taken; added up where they are, never read."""

    _total: Tensor | float = 0.0
    _count: int = 0

    def add(self, loss: Tensor | float) -> None:
        """Take one loss into the mean."""
        if isinstance(loss, Tensor):
            loss = loss.detach().reshape(()).to(torch.float32, copy=True)
        self._total = self._total + loss
        self._count += 1

    def peek(self, other: LossMean) -> Tensor | float | None:
        """Return the mean of this one, else of the other, without starting afresh."""
        if self._count:
            return self._total / self._count
        return other._total / other._count if other._count else None

    def take(self) -> Tensor | float | None:
        """Return the mean and start afresh; None if nothing was logged."""
        mean = self._total / self._count if self._count else None
        self._total, self._count = 0.0, 0
        return mean


@dataclass(eq=False)
class Lane:
    """One optimizer and the tensors it updates: measures each of its steps exactly once.

    `attach` calls four acts: `observe` (repeatable, the last before the commit wins), `before_update`, and one of
    `commit` (the parameters moved) and `skip` (they did not).
    """

    name: str
    optimizer: Optimizer | None
    target: Target
    step: int = 0
    orphans_of: frozenset[str] = frozenset()
    """Models whose trainable parameters without any optimizer are measured here, so that somebody sees them."""
    backend: Backend | None = None
    owned_elsewhere: Callable[[int], bool] = lambda _: False
    """Whether another optimizer updates the parameter with this ``id``."""
    on_plan: list[Callable[[], object]] = field(default_factory=list)
    """Called when the watched tensors have changed,"""
    on_end: list[Callable[[], object]] = field(default_factory=list)
    """and when a step was committed or skipped."""
    readers: list[Reader] = field(default_factory=list)
    was_cleared: Callable[[], bool | None] = lambda: None
    """Whether the gradients were cleared since the step before; None where that was not seen."""
    wants_detail: Callable[[], bool] = lambda: False
    wants_probe: Callable[[], bool] = lambda: False
    log_every: int = DETAIL_EVERY
    """One step in so many is logged,"""
    log_first: int = 0
    """this one first."""
    next_log_step: Callable[[], int | None] = lambda: None

    transforms: Transforms = field(default_factory=lambda: Transforms(()))
    deferred: list[Callable[[], object]] = field(default_factory=list)
    """What reactions left to be done when the optimizer is through with its step."""
    rate_factors: dict[int, float] = field(default_factory=dict)
    """What each parameter group's learning rate is multiplied by around the update; 1 where there is none."""

    loss: LossMean = field(default_factory=LossMean)
    """Losses logged for this optimizer by name."""
    shared_loss: LossMean = field(default_factory=LossMean)
    """Losses logged for whichever optimizer steps next."""

    part: Part = field(init=False)
    hooked: bool = field(default=False, init=False)
    """A hook has committed a step since the last `GradWatch.step` by hand."""
    params: list[nn.Parameter] = field(default_factory=list, init=False)
    pending: Pending | None = field(default=None, init=False)
    transfer: Transfer[StepNote] = field(default_factory=Transfer, init=False)
    _tensors: Tensors = field(init=False)
    _meter: Meter = field(init=False)
    _frozen: list[nn.Parameter] = field(default_factory=list, init=False)
    _planned_for: list[tuple[int, ...]] = field(default_factory=list, init=False)
    _planned: bool = field(default=False, init=False)
    _on_cuda: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self.part = Part(f"measuring {self.name!r}" if self.name else "measuring")

    # -- the four acts -------------------------------------------------------------------------------------------

    def observe(self, source: Source, *, divisor: Tensor | None = None, loss_scale: Tensor | None = None) -> Pending:
        """Measure the gradients as they are now; `divisor` is what they are still multiplied by."""
        detail = self.detail_due()
        if self._is_stale(thorough=self.step % (DETAIL_EVERY if self.step < SCAN_EVERY else SCAN_EVERY) == 0):
            self._plan()
        grads = [parameter.grad for parameter in self.params]
        present = [grad for grad in grads if grad is not None]
        pending = Pending(
            step=self.step,
            log_step=self.next_log_step(),
            source=source,
            detail=detail,
            table=self._meter.measure(grads, divisor=divisor, detail=detail),
            loss_scale=divisor if loss_scale is None else loss_scale,
            divisor=divisor,
            identities=list(map(id, present)),
            versions=list(map(_versions, present)),
        )
        if self.optimizer is None:  # no hook will tell when the update begins
            self._sample_weights(pending)
        self.pending = pending
        return pending

    def before_update(self) -> None:
        """Look again if somebody changed the gradients since they were observed, and remember the weights."""
        pending = self.pending
        if pending is None:
            return
        grads = [parameter.grad for parameter in self.params]
        present = [grad for grad in grads if grad is not None]
        if list(map(id, present)) != pending.identities:  # other gradients, not the same ones clipped
            pending = self.observe("step")
        elif (versions := list(map(_versions, present))) != pending.versions:
            everywhere = all(now != then for now, then in zip(versions, pending.versions, strict=True))
            optimized = self._tensors.optimized
            pending.scalars |= look_again(self._meter, pending.table, grads, optimized, everywhere=everywhere)
            pending.clipped = True
        if self.transforms.transforms:
            self._transform(pending, grads)
        self._sample_weights(pending)
        pending.sealed = True

    def transform_again(self, divisor: Tensor | None) -> None:
        """Transform the gradients of a further evaluation of a closure; the step is measured at its first."""
        if self.transforms.transforms and self.pending is not None:
            grads = [parameter.grad for parameter in self.params]
            rows = self._rows(grads)
            gradients = gradients_of(self._tensors.names, self.params, self.pending.table, rows, divisor=divisor)
            gradients.measure()
            self.transforms.run(gradients)
            gradients.apply()

    def commit(self, *, found_inf: Tensor | None = None) -> None:
        """The update was made; `found_inf` is the flag by which a fused optimizer may have vetoed it on the device."""
        pending = self.pending
        if pending is None:
            return
        if pending.sampled:
            self._meter.sample_after(pending.table)
        if found_inf is not None:
            pending.scalars["found_inf"] = found_inf
        self._send(pending, skipped=False)

    def skip(self) -> None:
        """The observed gradients were not applied."""
        if self.pending is not None:
            self._send(self.pending, skipped=True)

    # -- around them ---------------------------------------------------------------------------------------------

    def detail_due(self) -> bool:
        """Whether the step to come measures the detail tier."""
        wanted = self.wants_detail()
        return detail_is_due(self.step, wanted=wanted, log_every=self.log_every, log_first=self.log_first)

    def probe_due(self) -> bool:
        """Whether the forward pass of the step to come is to be read."""
        return probe_is_due(self.step, wanted=self.wants_probe())

    def is_capturing(self) -> bool:
        """Whether a CUDA graph is being captured: nothing but kernels may happen then, and no hook runs on replay."""
        return self._on_cuda and torch.cuda.is_current_stream_capturing()

    def discard(self) -> None:
        """Forget what was observed, as if it had not been."""
        self.pending = None

    def entries(self) -> list[Entry]:
        """List the tensors of this lane in depth order: the optimizer's and the orphans, trainable ones only."""
        groups = self.groups()
        mine = [
            entry
            for entry in self.target.scan()
            if id(entry.parameter) in groups
            or (entry.model in self.orphans_of and not self.owned_elsewhere(id(entry.parameter)))
        ]
        self._frozen = [entry.parameter for entry in mine if not entry.parameter.requires_grad]
        return self.target.in_depth_order(entry for entry in mine if entry.parameter.requires_grad)

    def groups(self) -> Mapping[int, int]:
        """Parameter group of each parameter of the optimizer, by ``id``; without an optimizer all are in one."""
        if self.optimizer is None:
            return {id(entry.parameter): 0 for entry in self.target.scan()}
        groups = enumerate(self.optimizer.param_groups)
        return {id(parameter): index for index, group in groups for parameter in group["params"]}

    def deliveries(self, *, wait: bool = False) -> list[Delivery[StepNote]]:
        """Return the steps whose numbers have arrived; with `wait` all that were sent."""
        return self.transfer.drain() if wait else self.transfer.arrived()

    def _sample_weights(self, pending: Pending) -> None:
        if pending.detail:
            self._meter.sample_before()
            pending.sampled = True

    def _transform(self, pending: Pending, grads: list[Tensor | None]) -> None:
        rows = self._rows(grads)
        if not rows:
            return
        gradients = gradients_of(self._tensors.names, self.params, pending.table, rows, divisor=pending.divisor)
        gradients.loss = self.loss.peek(self.shared_loss)
        if pending.clipped:
            gradients.measure()
            pending.scalars["clipped_elsewhere"] = 1.0
        pending.scalars |= self.transforms.run(gradients)
        pending.scalars |= merged(pending.scalars, gradients)
        if gradients.skip is not None:
            pending.scalars["veto"] = gradients.skip.to(torch.float32)
        fused = bool(getattr(self.optimizer, "_step_supports_amp_scaling", False))
        pending.handover = finish(gradients, fused=fused, host=not isinstance(pending.table.values, Tensor))

    def _rows(self, grads: list[Tensor | None]) -> list[int]:
        """Return the tensors of the optimizer that have a gradient."""
        optimized = self._tensors.optimized.tolist()  # a NumPy array: nothing waits
        return [row for row, grad in enumerate(grads) if grad is not None and optimized[row] and grad.numel()]

    def _is_stale(self, *, thorough: bool) -> bool:
        """Whether the plan no longer fits: cheap signs at every step, a full scan where `thorough`."""
        if not self._planned or self._signature() != self._planned_for:
            return True
        if any(parameter.requires_grad for parameter in self._frozen):
            return True
        return thorough and list(map(id, self.params)) != [id(entry.parameter) for entry in self.entries()]

    def _signature(self) -> list[tuple[int, ...]]:
        """Number of parameters in each group, and which are the first and the last."""
        groups = [] if self.optimizer is None else [group["params"] for group in self.optimizer.param_groups]
        return [(len(params), *(id(param) for param in params[:1] + params[-1:])) for params in groups]

    def _plan(self) -> None:
        entries = self.entries()
        self._tensors = self.target.tensors(entries, self.groups())
        self.params = [entry.parameter for entry in entries]
        self._meter = plan(self.params, backend=self.backend)
        self._planned_for = self._signature()
        self._on_cuda = any(parameter.is_cuda for parameter in self.params)
        self._planned = True
        for listener in self.on_plan:
            listener()

    def _send(self, pending: Pending, *, skipped: bool) -> None:
        groups = [] if self.optimizer is None else self.optimizer.param_groups
        scalars = pending.scalars
        shared, own = self.shared_loss.take(), self.loss.take()
        loss = shared if own is None else own
        if loss is not None:
            scalars["loss"] = loss
        if pending.loss_scale is not None:
            scalars["loss_scale"] = pending.loss_scale
        taken = [entry for reader in self.readers if (entry := reader.take(self)) is not None]
        scalars |= {name: value for entry in taken for name, value in entry.input.items()}
        rates = [group["lr"] for group in groups]
        if self.rate_factors:
            scalars["rate_factor"] = min(self.rate_factors.values())
        scalars |= {f"learning_rate/{index}": rate for index, rate in enumerate(rates) if isinstance(rate, Tensor)}
        note = StepNote(
            step=pending.step,
            log_step=pending.step if pending.log_step is None else pending.log_step,
            source=pending.source,
            skipped=skipped,
            detail=pending.detail,
            tensors=self._tensors,
            optimizer="" if self.optimizer is None else type(self.optimizer).__name__,
            learning_rates=tuple(None if isinstance(rate, Tensor) else float(rate) for rate in rates),
            weight_decay=tuple(_plain(group.get("weight_decay")) for group in groups),
            eps=tuple(_plain(group.get("eps")) for group in groups),
            scheduled=any("initial_lr" in group for group in groups),
            transforms=names_of(self.transforms.transforms),
            probed=tuple(entry.probed for entry in taken if entry.probed is not None),
            cleared=self.was_cleared(),
        )
        readings = [entry.numbers for entry in taken if entry.numbers is not None]
        self.transfer.send(pending.table, scalars, note, readings)
        self.pending = None
        self.step += 1
        for listener in self.on_end:
            listener()


def _plain(value: object) -> float:
    """A hyperparameter as a number, 0.0 where the optimizer has none (Adafactor's eps is a pair)."""
    return float(value) if isinstance(value, int | float) else 0.0

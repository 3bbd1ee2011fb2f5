"""What a labelled run is, and how one is trained."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

Log = Callable[..., None]
Half = Literal["development", "test"]


@dataclass(kw_only=True)
class Training:
    """One run ready to begin. Either `loss` gives the ordinary loop, or `step` makes a whole step by itself."""

    model: nn.Module | Mapping[str, nn.Module]
    optimizer: Optimizer | Mapping[str, Optimizer]
    loss: Callable[[int], Tensor] | None = None
    """Loss of the i-th micro-batch."""
    step: Callable[[int, Log], None] | None = None
    before: Callable[[int], None] | None = None
    """Called before each step: schedules, faults."""
    accumulate: int = 1
    clip: float | None = None
    clears: bool = True

    def run(self, index: int, log: Log) -> None:
        """Make the step of this index."""
        if self.before is not None:
            self.before(index)
        if self.step is not None:
            self.step(index, log)
            return
        assert isinstance(self.optimizer, Optimizer)
        assert isinstance(self.model, nn.Module)
        assert self.loss is not None
        if self.clears:
            self.optimizer.zero_grad()
        for micro in range(self.accumulate):
            loss = self.loss(index * self.accumulate + micro)
            log(loss)
            (loss / self.accumulate).backward()
        if self.clip is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()


@dataclass(frozen=True, kw_only=True)
class Run:
    """A kind of training run and what is right to say about it."""

    name: str
    make: Callable[[], Training]
    steps: int
    kinds: tuple[str, ...] = ()
    """Acceptable alert kinds; empty for a healthy run."""
    causes: tuple[str, ...] = ()
    """The strict cause first, then others that are acceptable."""
    onset: int = 0
    """Step at which the fault is put in."""

    @property
    def is_sick(self) -> bool:
        """Whether something is to be found."""
        return bool(self.kinds)

    @property
    def half(self) -> Half:
        """Half of the suite that this run belongs to, by a hash of its name."""
        return "test" if hashlib.sha256(self.name.encode()).digest()[0] % 2 else "development"


RUNS: dict[str, Run] = {}


def healthy(name: str, make: Callable[[], Training], *, steps: int = 150) -> None:
    """Register a run on which silence is right."""
    _register(Run(name=name, make=make, steps=steps))


def sick(name: str, kinds: str, causes: str, make: Callable[[], Training], *, steps: int = 60, onset: int = 0) -> None:
    """Register a run with a fault; kinds and causes are separated by spaces, the right ones first."""
    run = Run(name=name, make=make, steps=steps, kinds=tuple(kinds.split()), causes=tuple(causes.split()), onset=onset)
    _register(run)


def _register(run: Run) -> None:
    assert run.name not in RUNS, run.name
    RUNS[run.name] = run


def begin(run: Run, seed: int) -> Training:
    """Seed everything and build the run."""
    torch.manual_seed(seed)
    return run.make()

"""How reactions change the training of one optimizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from gradwatch.lane import Lane
from gradwatch.records import Intervention


@dataclass(frozen=True, eq=False)
class Captured:
    """Model and optimizer state on the host."""

    step: int
    models: Mapping[str, Mapping[str, Any]]
    optimizer: Mapping[Tensor, Mapping[str, Any]]


@dataclass(eq=False)
class LaneRun:
    """One optimizer's run."""

    lane: Lane
    ask_to_stop: Callable[[str], object]

    def multiply_lr(self, factor: float, *, reason: str, group: int | None = None) -> Intervention:
        """Multiply the factor that is laid over the rates around each update."""
        groups = range(len(self._groups())) if group is None else (group,)
        before = self.lane.rate_factors.get(min(groups, default=0), 1.0)
        for index in groups:
            self.lane.rate_factors[index] = self.lane.rate_factors.get(index, 1.0) * factor
        return self._made("learning_rate", reason, before, before * factor)

    def stop(self, reason: str) -> Intervention:
        """Ask the loop to end."""
        self.ask_to_stop(reason)
        return self._made("stop", reason, 0.0, 1.0)

    def save(self, path: str | PathLike[str], *, reason: str) -> Intervention:
        """Write the states that ``load_state_dict`` takes."""
        optimizer = None if self.lane.optimizer is None else self.lane.optimizer.state_dict()
        models = {name: model.state_dict() for name, model in self.lane.target.models.items()}
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        model = models.get("", models)
        torch.save({"step": self.lane.step, "model": model, "optimizer": optimizer}, target)
        return self._made("save", f"{target}: {reason}", 0.0, 1.0)

    def capture(self) -> Captured:
        """Copy everything to the host."""
        models = {name: _to_host(model.state_dict()) for name, model in self.lane.target.models.items()}
        state = {} if self.lane.optimizer is None else self.lane.optimizer.state
        return Captured(self.lane.step, models, {parameter: _to_host(entry) for parameter, entry in state.items()})

    def restore(self, captured: object, *, reason: str) -> Intervention:
        """Put it back once the optimizer is through with its step."""
        state = cast("Captured", captured)
        self.lane.deferred.append(lambda: self._put_back(state))
        return self._made("rollback", reason, float(self.lane.step), float(state.step))

    def _put_back(self, captured: Captured) -> None:
        with torch.no_grad():
            for name, saved in captured.models.items():
                self.lane.target.models[name].load_state_dict(dict(saved))
        if self.lane.optimizer is None:
            return
        for parameter in list(self.lane.optimizer.state):
            kept = captured.optimizer.get(parameter)
            if kept is None:
                del self.lane.optimizer.state[parameter]  # its first step came later
                continue
            entry = self.lane.optimizer.state[parameter]
            for key, value in kept.items():
                now = entry.get(key)
                entry[key] = value.to(now.device, copy=True) if isinstance(now, Tensor) else deepcopy(value)

    def _groups(self) -> list[Any]:
        return [] if self.lane.optimizer is None else self.lane.optimizer.param_groups

    def _made(self, kind: str, reason: str, before: float, after: float) -> Intervention:
        step = max(self.lane.step - 1, 0)
        return Intervention(step=step, optimizer=self.lane.name, kind=kind, reason=reason, before=before, after=after)


def _to_host(state: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else deepcopy(value)
        for key, value in state.items()
    }

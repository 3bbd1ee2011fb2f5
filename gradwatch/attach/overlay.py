"""Around one optimizer's update: what transforms and learning-rate backoff ask for is put in place and taken back."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.optim import Optimizer

from gradwatch.handover import Handover

_ABSENT = object()


@dataclass(slots=True, eq=False)
class Overlay:
    """Changes an optimizer for the length of one step; `restore` leaves the very objects that were there before.

    Written into ``param_groups`` for good, a smaller learning rate would be overwritten by the next step of most of
    PyTorch's schedulers and would end in checkpoints.
    """

    _attributes: dict[str, object] = field(default_factory=dict, init=False)
    _rates: list[tuple[dict[str, object], object]] = field(default_factory=list, init=False)
    _tensors: list[tuple[Tensor, Tensor]] = field(default_factory=list, init=False)
    _gradients: list[tuple[Tensor, Tensor]] = field(default_factory=list, init=False)

    @property
    def skips(self) -> bool:
        """The gradients are hidden from the optimizer."""
        return bool(self._gradients)

    def put_rates(self, optimizer: Optimizer, factors: dict[int, float]) -> None:
        """Multiply the learning rate of each group in `factors`; a tensor that groups share only once, in place."""
        seen: set[int] = set()
        for index, factor in factors.items():
            if factor == 1 or index >= len(optimizer.param_groups):
                continue
            group = optimizer.param_groups[index]
            rate = group["lr"]
            if not isinstance(rate, Tensor):
                self._rates.append((group, rate))
                group["lr"] = rate * factor
            elif id(rate) not in seen:
                seen.add(id(rate))
                self._tensors.append((rate, rate.clone()))
                rate.mul_(factor)

    def put_handover(self, optimizer: Optimizer, handover: Handover) -> None:
        """Give a fused optimizer its factor and veto; hide the gradients from another one whose step is vetoed."""
        if handover.factor is not None:
            before = getattr(optimizer, "grad_scale", None)
            divisor = (1 / handover.factor).to(torch.float32)
            self._set(optimizer, "grad_scale", divisor if before is None else before * divisor)
        if handover.veto is not None:
            before = getattr(optimizer, "found_inf", None)
            flag = handover.veto.to(torch.float32)
            self._set(optimizer, "found_inf", flag if before is None else torch.maximum(before, flag))
        if handover.skips:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        self._gradients.append((parameter, parameter.grad))
                        parameter.grad = None

    def restore(self, optimizer: Optimizer) -> None:
        """Put everything back; safe to repeat."""
        while self._attributes:
            name, value = self._attributes.popitem()
            if value is _ABSENT:
                optimizer.__dict__.pop(name, None)
            else:
                setattr(optimizer, name, value)
        while self._rates:
            group, rate = self._rates.pop()
            group["lr"] = rate
        while self._tensors:
            tensor, rate = self._tensors.pop()
            tensor.copy_(rate)
        while self._gradients:
            parameter, gradient = self._gradients.pop()
            parameter.grad = gradient

    def _set(self, optimizer: Optimizer, name: str, value: Tensor) -> None:
        self._attributes.setdefault(name, optimizer.__dict__.get(name, _ABSENT))
        setattr(optimizer, name, value)

"""Runs the transforms of one optimizer on one step's gradients, on the norms that were measured anyway."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from gradwatch.errors import Part, TrainingStopped, contain
from gradwatch.handover import Handover
from gradwatch.table import ROW, StatTable
from gradwatch.transfer import read_flag
from gradwatch.transforms.gradients import Gradients, Transform


@dataclass(eq=False)
class Transforms:
    """The transforms of one optimizer, in order, each with its own way to fail."""

    transforms: tuple[Transform, ...]
    _parts: tuple[Part, ...] = field(init=False)

    def __post_init__(self) -> None:
        self._parts = tuple(Part(f"the transform {name_of(transform)}") for transform in self.transforms)

    def run(self, gradients: Gradients) -> dict[str, Tensor | float]:
        """Let each transform have its turn; return its factor, or the smallest of its factors, by its place."""
        factors: dict[str, Tensor | float] = {}
        with torch.no_grad():
            for place, (transform, part) in enumerate(zip(self.transforms, self._parts, strict=True)):
                if part.failed:
                    continue
                factor = self._run_one(transform, part, gradients)
                if isinstance(factor, Tensor) and factor.numel():
                    factors[f"transform/{place}"] = factor.amin() if factor.dim() else factor
                rearmed = getattr(transform, "rearmed", None)
                if isinstance(rearmed, Tensor):
                    factors[f"rearmed/{place}"] = rearmed.to(torch.float64)
        return factors

    def state(self) -> list[object]:
        """Return what each of them remembers, None where it is nothing."""
        return [_state(transform) for transform in self.transforms]

    def restore(self, states: Sequence[Any]) -> None:
        """Go on from what `state` returned; a list of other transforms begins afresh."""
        for transform, state in zip(self.transforms, states, strict=False):
            if state and hasattr(transform, "restore"):
                cast("Any", transform).restore(state)

    def _run_one(self, transform: Transform, part: Part, gradients: Gradients) -> object:
        if getattr(transform, "on_failure", "raise") == "disable":
            returned = []
            with contain(part):
                returned.append(transform(gradients))
            return returned[0] if returned else None
        try:
            return transform(gradients)
        except Exception as error:
            raise TrainingStopped(
                f"{part.name} failed, and training stops without its protection: {type(error).__name__}: {error}; "
                'on_failure="disable" would let it go on'
            ) from error


def name_of(transform: object) -> str:
    """Return the class or function name of a transform; of a dry run, that of what it tries."""
    inner = getattr(transform, "transform", None)
    if inner is not None:
        return f"DryRun({name_of(inner)})"
    return str(getattr(transform, "__name__", type(transform).__name__))


def gradients_of(
    names: Sequence[str], params: Sequence[Tensor], table: StatTable, rows: Sequence[int], *, divisor: Tensor | None
) -> Gradients:
    """Lay out the gradients of the tensors in `rows` with the norms that are in the table."""
    grads = [cast("Tensor", params[row].grad) for row in rows]
    values = table.values
    if isinstance(values, np.ndarray):
        norms = torch.from_numpy(values[ROW["norm"], rows])
        counts = values[ROW["nonfinite"], rows]
        nonfinite = torch.from_numpy(np.asarray((counts > 0).any()))  # NaN, of a missing one, is not
    else:
        index = torch.tensor(list(rows), device=values.device)
        norms = values[ROW["norm"]].index_select(0, index)
        nonfinite = ~torch.isfinite(norms).all()
    return Gradients(
        [names[row] for row in rows], [params[row] for row in rows], grads, norms, nonfinite=nonfinite, divisor=divisor
    )


def finish(gradients: Gradients, *, fused: bool, host: bool) -> Handover:
    """Apply what waits, or leave it to a fused optimizer's kernel; on the host nothing is done for a factor of one."""
    factor = gradients.only_factor
    if host and factor is not None and float(factor) == 1:
        gradients.forget()
        factor = None
    if not (fused and factor is not None):
        gradients.apply()
        factor = None
    if fused:
        return Handover(factor=factor, veto=gradients.skip)
    if gradients.skip is None:
        return Handover()
    return Handover(skips=bool(gradients.skip) if host else read_flag(gradients.skip))


def merged(scalars: Mapping[str, Tensor | float], gradients: Gradients) -> dict[str, Tensor | float]:
    """Return the norm after all clipping, the user's and ours, and the smallest and largest factor of a tensor."""
    low, high = gradients.extremes()
    if "clip_low" in scalars:
        low, high = low * scalars["clip_low"], high * scalars["clip_high"]
    return {"clipped_norm": gradients.global_norm, "clip_low": low, "clip_high": high}


def _state(transform: object) -> object:
    state = getattr(transform, "state", None)
    return state() if callable(state) else None


def names_of(transforms: Iterable[Transform]) -> tuple[str, ...]:
    """Return what the log calls them."""
    return tuple(name_of(transform) for transform in transforms)

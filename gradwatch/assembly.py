"""Puts the numbers that arrived from the device and the note of their step together into a Snapshot."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from gradwatch.lane import StepNote
from gradwatch.measure.clipped import SAME_FACTOR
from gradwatch.records import Floats, GradientState, OptimizerFacts, Snapshot, Tensors
from gradwatch.transfer import Delivery


def assemble(lane: str, delivery: Delivery[StepNote], *, several_lanes: bool = False) -> Snapshot:
    """Return the frozen record of one step."""
    note, scalars, columns = delivery.note, delivery.scalars, dict(delivery.columns)
    state = columns.pop("state").astype(np.int8)
    total = _global_norm(note.tensors, state, columns["norm"])
    return Snapshot(
        optimizer=lane,
        step=note.step,
        log_step=note.log_step,
        source=note.source,
        skipped=note.skipped or total is None or scalars.get("found_inf", 0.0) > 0,
        detail=note.detail,
        tensors=note.tensors,
        optimizer_facts=_facts(note, scalars),
        several_lanes=several_lanes,
        loss=scalars.get("loss"),
        loss_scale=scalars.get("loss_scale"),
        global_norm=total,
        clipped_norm=scalars.get("clipped_norm"),
        clip_coefficient=_coefficient(scalars),
        state=state,
        std=_std(note.tensors, columns),
        histogram=delivery.histogram,
        **columns,
    )


def _global_norm(tensors: Tensors, state: np.ndarray[tuple[int, ...], np.dtype[np.int8]], norm: Floats) -> float | None:
    present = tensors.optimized & (state != GradientState.MISSING)
    return float(np.linalg.norm(norm[present])) if present.any() else None


def _coefficient(scalars: Mapping[str, float]) -> float | None:
    """One factor for all tensors, or None: clipping by value or by tensor has no single factor."""
    low, high = scalars.get("clip_low", math.nan), scalars.get("clip_high", math.nan)
    return (low + high) / 2 if high - low <= SAME_FACTOR * high else None


def _std(tensors: Tensors, columns: Mapping[str, Floats]) -> Floats:
    """Standard deviation over the finite elements, from the root mean square and the mean."""
    finite = np.maximum(tensors.numel - np.nan_to_num(columns["nonfinite"]), 1)
    square = columns["norm"] ** 2 / finite - columns["mean"] ** 2
    return np.sqrt(np.maximum(square, 0.0))


def _facts(note: StepNote, scalars: Mapping[str, float]) -> OptimizerFacts:
    rates = enumerate(note.learning_rates)
    return OptimizerFacts(
        name=note.optimizer,
        learning_rates=tuple(scalars[f"learning_rate/{i}"] if rate is None else rate for i, rate in rates),
        weight_decay=note.weight_decay,
        eps=note.eps,
    )

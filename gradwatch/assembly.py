"""Puts the numbers that arrived from the device and the note of their step together into a Snapshot."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from gradwatch.lane import StepNote
from gradwatch.measure.clipped import SAME_FACTOR
from gradwatch.probe.operations import LOOPED, READINGS
from gradwatch.probe.recorder import Probed
from gradwatch.records import (
    Floats,
    GradientState,
    InputReading,
    ModuleReadings,
    OptimizerFacts,
    Recurrence,
    Snapshot,
    Tensors,
)
from gradwatch.transfer import Delivery


def assemble(lane: str, delivery: Delivery[StepNote], *, several_lanes: bool = False) -> Snapshot:
    """Return the frozen record of one step."""
    note, scalars = delivery.note, delivery.scalars
    columns: dict[str, Any] = dict(delivery.columns)
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
        clipped_elsewhere=scalars.get("clipped_elsewhere", 0.0) > 0,
        vetoed=scalars.get("veto", 0.0) > 0,
        factors=_by_name(note.transforms, scalars, "transform"),
        rearmed={name: int(count) for name, count in _by_name(note.transforms, scalars, "rearmed").items()},
        rate_factor=scalars.get("rate_factor", 1.0),
        input=_input(scalars),
        modules=_modules(delivery),
        cleared=note.cleared,
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
        scheduled=note.scheduled,
    )


def _by_name(names: tuple[str, ...], scalars: Mapping[str, float], what: str) -> dict[str, float]:
    """Numbers of the transforms by their names; two of one kind are told apart by their place."""
    found = {}
    for place, name in enumerate(names):
        if f"{what}/{place}" in scalars:
            label = name if names.count(name) == 1 else f"{name}_{place}"
            found[label] = scalars[f"{what}/{place}"]
    return found


def _input(scalars: Mapping[str, float]) -> InputReading | None:
    if "input_max" not in scalars:
        return None
    return InputReading(rms=scalars["input_rms"], max_abs=scalars["input_max"])


def _modules(delivery: Delivery[StepNote]) -> ModuleReadings | None:
    """Name what the probe read; with several models in one lane, one after the other."""
    probed = delivery.note.probed
    if not probed:
        return None
    width = len(READINGS)
    tables = iter(delivery.readings)
    rows, recurrences = [], []
    for entry in probed:
        count = len(entry.operations)
        fused = [sequence for sequence in entry.sequences if sequence[1] != "loop"]
        table = next(tables) if count or fused else np.empty((0, width))
        rows.append(table[:count])
        recurrences += [
            Recurrence(
                module=module,
                cell=cell,
                steps=steps,
                decades=float(row[0]),
                last_tenth=float(row[1]),
                saturated=float(row[2]),
            )
            for (module, cell, steps), row in zip(fused, table[count:], strict=True)
        ]
        gradients = table[:count, READINGS.index("gradient_rms")]
        recurrences += [
            found for sequence in entry.sequences[len(fused) :] if (found := _loop(sequence, entry, gradients))
        ]
    table = np.concatenate(rows)
    return ModuleReadings(
        modules=tuple(name for entry in probed for name in entry.modules),
        operations=tuple(name for entry in probed for name in entry.operations),
        elements=np.array([count for entry in probed for count in entry.elements], dtype=np.int64),
        dtypes=tuple(name for entry in probed for name in entry.dtypes),
        ran=frozenset().union(*(entry.ran for entry in probed)),
        cuts=tuple(cut for entry in probed for cut in entry.cuts),
        frozen_statistics=tuple(name for entry in probed for name in entry.frozen_statistics),
        recurrences=tuple(recurrences),
        **{name: table[:, column] for column, name in enumerate(READINGS)},
    )


def _loop(sequence: tuple[str, str, int], probed: Probed, gradients: Floats) -> Recurrence | None:
    """Read a recurrence that is written as a loop: the gradient at the module's first call against its last."""
    module, cell, steps = sequence
    pairs = zip(probed.modules, probed.operations, gradients, strict=True)
    arrived = [
        value for name, operation, value in pairs if name == module and operation in LOOPED and np.isfinite(value)
    ]
    if len(arrived) < steps or arrived[-1] <= 0:
        return None
    decades = math.log10(max(arrived[0], 1e-38) / arrived[-1])
    return Recurrence(module=module, cell=cell, steps=steps, decades=decades, last_tenth=math.nan)

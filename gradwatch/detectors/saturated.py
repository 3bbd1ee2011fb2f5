"""Activations whose outputs lie where their slope is nearly zero."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from gradwatch.history import History
from gradwatch.records import Evidence, Floats, ModuleReadings, Snapshot

CEILING = 0.6
"""Share of flat outputs; 0.13 in health, from 0.79 on when sick."""
BOTH_SIDES = 0.15
"""Part of the flat outputs that lies on the smaller side: a sigmoid shut or open by its bias is a gate."""
OPENING, WATCHED = 3, 10
"""Steps that are judged always, and while evidence gathers; later only a network that is known not to learn."""


def saturated(snapshot: Snapshot, history: History, /) -> Iterator[Evidence]:
    """Judge the worst activation of the forward pass: before training, or once the loss shows no progress."""
    modules = snapshot.modules
    if modules is None or snapshot.skipped:
        return
    early = history.steps <= OPENING
    if not early and not history.is_stuck and not (history.steps <= WATCHED and not history.knows_loss):
        return
    share = np.append(flat_shares(modules, softmax=early), [entry.saturated for entry in modules.recurrences])
    if not np.isfinite(share).any():
        return
    places = [*zip(modules.operations, modules.modules, strict=True)]
    places += [(f"the candidate states of the {entry.cell}", entry.module) for entry in modules.recurrences]
    worst = int(np.nanargmax(share))
    reading = float(share[worst])
    value = (reading - CEILING) / 0.1
    yield Evidence(
        "saturated",
        kind="saturated",
        value=value if early or history.is_stuck or value < 0 or history.opening.saturated > CEILING else 0.0,
        reading=reading,
        threshold=CEILING,
        layers=tuple(dict.fromkeys(places[row][1] for row in np.flatnonzero(share > CEILING).tolist())),
        message=f"{100 * reading:.0f} % of the outputs of {_place(*places[worst])} lie where its slope is nearly zero.",
    )


def flat_shares(modules: ModuleReadings, *, softmax: bool = True) -> Floats:
    """Share of saturated outputs of every bounded activation; NaN for other operations."""
    low, high = modules.low, modules.high
    share: Floats = low + high
    operations = np.array(modules.operations)
    one_sided = np.minimum(low, high) <= BOTH_SIDES * share
    share = np.where((operations == "sigmoid") & one_sided, 0.0, share)
    return share if softmax else np.where(operations == "softmax", np.nan, share)


def _place(operation: str, module: str) -> str:
    return f"{operation} in {module}" if module else operation

"""Builders with defaults for the records that tests make by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from gradwatch.records import Alert, OptimizerFacts, Snapshot, Tensors


def tensors(number: int = 4, **changes: object) -> Tensors:
    names = changes.pop("names", None) or tuple(f"block{i // 2}.layer{i}.weight" for i in range(number))
    number = len(names)
    made = Tensors(
        names=tuple(names),
        layers=tuple(name.rpartition(".")[0] for name in names),
        modules=("Linear",) * number,
        shapes=((8, 8),) * number,
        dtypes=("float32",) * number,
        groups=np.zeros(number, dtype=np.int64),
        series=np.ones(number, dtype=bool),
    )
    return replace(made, **changes)


def snapshot(step: int = 0, *, of: Tensors | None = None, detail: bool = True, **changes: object) -> Snapshot:
    of = tensors() if of is None else of
    number = len(of.names)
    nothing, some = np.full(number, np.nan), np.full(number, 0.5)
    norm = changes.pop("norm", some)
    detailed = {
        "mean": nothing,
        "std": nothing,
        "zero_fraction": np.zeros(number),
        "row_spread": np.ones(number),
        "weight_norm": np.full(number, 8.0),
        "weight_row_spread": np.ones(number),
        "update_norm": np.full(number, 8e-3),
        "update_ratio": np.full(number, 1e-3),
        "lost": np.zeros(number),
        "moved": np.ones(number),
    }
    made = Snapshot(
        optimizer="",
        step=step,
        log_step=step,
        source="backward",
        skipped=False,
        detail=detail,
        tensors=of,
        optimizer_facts=OptimizerFacts(name="SGD", learning_rates=(0.1,), weight_decay=(0.0,), eps=(0.0,)),
        global_norm=float(np.sqrt(np.nansum(norm**2))),
        state=np.full(number, 2, dtype=np.int8),
        norm=norm,
        max_abs=norm,
        nonfinite=np.zeros(number),
        histogram=np.ones((number, 64)) if detail else None,
        **(detailed if detail else dict.fromkeys(detailed, nothing)),
    )
    return replace(made, **changes)


def alert(**changes: object) -> Alert:
    made = Alert(
        kind="vanishing",
        symptom="profile_down",
        severity="warning",
        optimizer="",
        step=12,
        first_step=3,
        opened=12,
        change="opened",
        layers=("block0.layer0", "block0.layer1"),
        tensors=("block0.layer0.weight", "block0.layer1.weight"),
        value=5.5,
        threshold=2.25,
        message="The gradient falls by 5.5 decades.",
    )
    return replace(made, **changes)

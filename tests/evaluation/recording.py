"""Trains every run once a seed through the real package, at its densest cadence, and keeps the snapshots."""

from __future__ import annotations

import pickle
import time
import zlib
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import MISSING, fields, replace
from pathlib import Path

import numpy as np
import torch

import gradwatch
from evaluation.suite import RUNS
from evaluation.training import Run, begin
from gradwatch.records import Snapshot

FOLDER = Path("runs/evaluation")
NARROW = ("max_abs", "mean", "std", "zero_fraction", "row_spread", "weight_row_spread", "update_ratio", "lost", "moved")
"""Columns kept in float32; norms may be smaller than that holds."""


def record(run: Run, seed: int) -> tuple[Snapshot, ...]:
    """Return the snapshots of one run, everything measured at every step."""
    training = begin(run, seed)
    sink = gradwatch.MemorySink(limit=None)
    watch = gradwatch.watch(training.model, training.optimizer, sinks=[sink], detectors=())
    for lane in watch.lanes.values():
        lane.wants_detail = lane.wants_probe = lambda: True
    for step in range(run.steps):
        training.run(step, watch.log_loss)
    watch.close()
    broken = [lane.part.name for lane in watch.lanes.values() if lane.part.failed]
    if broken or not sink.snapshots:
        raise RuntimeError(f"{run.name}: nothing was measured ({broken})")
    return tuple(sink.snapshots)


def path_of(name: str, seed: int) -> Path:
    return FOLDER / str(seed) / f"{name}.bin"


def save(snapshots: Iterable[Snapshot], path: Path) -> None:
    narrow = [
        replace(s, histogram=None, **{name: getattr(s, name).astype(np.float32) for name in NARROW}) for s in snapshots
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(zlib.compress(pickle.dumps(narrow, protocol=5), 2))


def load(path: Path) -> list[Snapshot]:
    snapshots: list[Snapshot] = pickle.loads(zlib.decompress(path.read_bytes()))
    for field in fields(Snapshot):  # a recording of an earlier version has the defaults of what was added since
        if field.default_factory is not MISSING:
            for snapshot in snapshots:
                if not hasattr(snapshot, field.name):
                    object.__setattr__(snapshot, field.name, field.default_factory())
    return snapshots


def record_all(seeds: Iterable[int], names: Iterable[str] = ()) -> None:
    """Record what is asked for, on two processes, and say how long it took."""
    chosen = list(names) or list(RUNS)
    began = time.monotonic()
    with ProcessPoolExecutor(2, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        jobs = [(name, seed) for seed in seeds for name in chosen]
        for (name, seed), (seconds, error) in zip(jobs, pool.map(_job, jobs), strict=True):
            print(f"{name:40s} seed {seed}  {seconds:5.1f} s  {error}", flush=True)
    print(f"{len(jobs)} runs in {time.monotonic() - began:.0f} s")


def _job(job: tuple[str, int]) -> tuple[float, str]:
    name, seed = job
    began = time.monotonic()
    try:
        save(record(RUNS[name], seed), path_of(name, seed))
    except Exception as error:  # noqa: BLE001 - the others go on
        return time.monotonic() - began, f"FAILED {type(error).__name__}: {error}"
    return time.monotonic() - began, ""

"""What detection and diagnosis cost on the host, for 2,000 tensors: ``python -m benchmarks.judging``."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import nn

import gradwatch
from gradwatch.cadence import DENSE_STEPS, detail_is_due
from gradwatch.detectors import DEFAULT_DETECTORS, build
from gradwatch.episodes import Episodes
from gradwatch.judge import Judge
from gradwatch.records import Snapshot

TENSORS = 2000


def recorded(steps: int) -> Iterator[Snapshot]:
    """Yield the steps of a run of 2,000 tensors, as a sink gets them: healthy, with the noise of real gradients."""
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(TENSORS // 2)))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    memory = gradwatch.MemorySink()
    watch = gradwatch.watch(model, optimizer, sinks=[memory], detectors=[], probe=False)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    watch.close()
    first, noise = memory.snapshots[0], np.random.default_rng(0)
    for step in range(steps):
        detail = detail_is_due(step, wanted=False)
        norm = first.norm * noise.lognormal(0, 0.1, len(first.norm))
        loss = 2.0 * 0.99**step + 0.01 * noise.normal()
        yield replace(first, step=step, detail=detail, norm=norm, global_norm=float(np.linalg.norm(norm)), loss=loss)


def line(steps: int) -> str:
    """Judge a run and say what a step took."""
    judge = Judge(name="", detectors=build(DEFAULT_DETECTORS), episodes=Episodes())
    seconds = []
    for snapshot in recorded(steps):
        before = time.process_time()
        judge.judge(snapshot)
        seconds.append(time.process_time() - before)
    low, middle, high = 1000 * np.quantile(seconds[DENSE_STEPS:], [0.25, 0.5, 0.75])
    return f"judging {TENSORS} tensors: {middle:.2f} ms a step in the median ({low:.2f}-{high:.2f})"


def main() -> None:
    """Print it, from a process of its own, whose memory and garbage no other benchmark has filled."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=400)
    torch.set_num_threads(1)
    print(line(parser.parse_args().steps))


if __name__ == "__main__":
    main()

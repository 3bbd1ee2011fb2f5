"""What measuring costs: every route on the same gradients, interleaved in one run, as ratios against one read of them.

Process time of one thread; each round makes real gradients, shuffles the routes and cools the cache before each.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

import torch

from benchmarks import clipping, lightning
from benchmarks.models import MODELS, Workload
from benchmarks.routes import ONE_READ, WATCH, Route, check, routes
from benchmarks.timing import quartiles, ratios, timed

BACKWARD = "forward + backward"


def rounds(workload: Workload, chosen: dict[str, Route], number: int, device: torch.device) -> dict[str, list[float]]:
    """Time every route once a round, in another order each time."""
    seconds: dict[str, list[float]] = defaultdict(list)
    for index in range(number + 1):
        workload.model.zero_grad()
        reading = timed(lambda: workload.loss().backward(), device)
        order = list(chosen)
        random.shuffle(order)
        readings = {BACKWARD: reading} | {name: timed(chosen[name], device) for name in order}
        if index:  # the first round plans and warms up
            for name, value in readings.items():
                seconds[name].append(value / 10 if name == WATCH else value)
    return seconds


def table(name: str, number: int, device: torch.device, log_dir: Path) -> None:
    """Print one model's table."""
    torch.manual_seed(0)
    workload = MODELS[name](device)
    params = list(workload.model.parameters())
    workload.loss().backward()
    check(params)
    chosen = routes(params, workload.model, log_dir / name)
    seconds = rounds(workload, chosen, number, device)
    size = sum(param.numel() for param in params) / 1e6
    print(
        f"\n{name}: {len(params)} tensors, {size:.2f} M elements, {device.type}; median (quartiles) of {number} rounds"
    )
    print("\n| route | x one read |\n|---|---|")
    for route, values in ratios(seconds, ONE_READ).items():
        print(f"| {route} | {quartiles(values)} |")


def main() -> None:
    """Print a table a model, those of the Lightning callback, and the extra memory."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer rounds and steps")
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=list(MODELS))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    random.seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as log_dir:
        for name in arguments.models:
            table(name, 5 if arguments.quick else 15, device, Path(log_dir))
    clipping.tables(5 if arguments.quick else 15, device)
    print(flush=True)
    steps = "100" if arguments.quick else "400"
    subprocess.run([sys.executable, "-m", "benchmarks.judging", "--steps", steps], check=True)
    lightning.tables(3 if arguments.quick else 5, device)
    print(flush=True)
    steps = "100" if arguments.quick else "1000"
    subprocess.run([sys.executable, "-m", "benchmarks.memory", "--steps", steps], check=True)


if __name__ == "__main__":
    main()

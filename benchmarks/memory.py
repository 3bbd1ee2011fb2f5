"""Extra memory on a model of 100 million parameters in 150 tensors, in a process of its own."""

from __future__ import annotations

import argparse
import ctypes
from pathlib import Path

import torch
from torch import nn

import gradwatch

TENSORS, ELEMENTS = 150, 100_000_000


def wide(elements: int) -> nn.Module:
    """Return a module of 150 matrices with gradients."""
    side = int((elements / TENSORS) ** 0.5)
    model = nn.Module()
    model.weights = nn.ParameterList(torch.rand(side, side) for _ in range(TENSORS))
    for parameter in model.parameters():
        parameter.grad = torch.rand_like(parameter)
    return model


def status(name: str) -> int:
    """Return a size of this process in KiB, as Linux counts it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def resident() -> int:
    """Give free memory back, forget the peak so far, and return the resident size."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return status("VmRSS")


def grown(model: nn.Module, steps: int) -> tuple[int, int]:
    """Watch `steps` steps; return the KiB that the peak rose in 25 of them, detail steps included, and in all."""
    before = resident()
    watch = gradwatch.watch(model, None, sinks=[])
    early = 0
    for step in range(steps):
        watch.observe()
        watch.step()
        if step == 24:
            early = status("VmHWM") - before
    return early, status("VmHWM") - before


def main() -> None:
    """Print by how much the first steps and all steps raised the peak of the process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1000)
    steps = parser.parse_args().steps
    torch.set_num_threads(1)
    grown(wide(1_000_000), 30)  # loads every module, fills every allocator
    early, late = grown(wide(ELEMENTS), steps)
    print(f"extra memory, {ELEMENTS // 10**6} M parameters in {TENSORS} tensors: ", end="")
    print(f"{early / 1024:.2f} MiB after 25 steps, {late / 1024:.2f} MiB after {steps}")


if __name__ == "__main__":
    main()

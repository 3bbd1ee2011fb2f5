"""Extra memory on a model of 100 million parameters in 150 tensors, in a process of its own."""

from __future__ import annotations

import argparse
import resource

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


def peak() -> int:
    """Return the largest resident size of this process so far, in KiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def grown(model: nn.Module, steps: int) -> tuple[int, int]:
    """Watch `steps` steps; return KiB after 25 of them, detail steps included, and after all."""
    before = peak()
    watch = gradwatch.watch(model, None, sinks=[])
    early = 0
    for step in range(steps):
        watch.observe()
        watch.step()
        if step == 24:
            early = peak() - before
    return early, peak() - before


def main() -> None:
    """Print what the first steps and all steps added to the process."""
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

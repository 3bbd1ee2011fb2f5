"""Small models, batches and watches that the tests of whole loops share."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor, nn

import gradwatch
from gradwatch.records import Snapshot


def mlp(*, width: int = 8, depth: int = 2) -> nn.Sequential:
    layers: list[nn.Module] = []
    for _ in range(depth):
        layers += [nn.Linear(width, width), nn.Tanh()]
    return nn.Sequential(*layers, nn.Linear(width, 3))


def batch(step: int = 0, *, size: int = 16, width: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    inputs = torch.randn(size, width, generator=generator)
    return inputs, torch.randint(0, 3, (size,), generator=generator)


def backward(model: nn.Module, step: int = 0, *, factor: float = 1.0) -> Tensor:
    inputs, labels = batch(step)
    loss = nn.functional.cross_entropy(model(inputs), labels) * factor
    loss.backward()
    return loss


def watched(
    model: nn.Module | dict[str, nn.Module],
    optimizer: object,
    **options: object,
) -> tuple[gradwatch.GradWatch, gradwatch.MemorySink]:
    memory = gradwatch.MemorySink()
    return gradwatch.watch(model, optimizer, sinks=[memory], **options), memory


def true_norm(parameters: Iterable[Tensor]) -> float:
    squares = [p.grad.detach().double().pow(2).sum() for p in parameters if p.grad is not None]
    return float(torch.stack(squares).sum().sqrt())


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, *, start: int = 0) -> list[float]:
    norms = []
    for step in range(start, start + steps):
        optimizer.zero_grad()
        backward(model, step)
        norms.append(true_norm(model.parameters()))
        optimizer.step()
    return norms


def norms_of(snapshots: Iterable[Snapshot]) -> list[float | None]:
    return [snapshot.global_norm for snapshot in snapshots]


def assert_close(seen: Iterable[float | None], expected: Iterable[float], *, rtol: float = 1e-5) -> None:
    np.testing.assert_allclose(np.array(list(seen), dtype=float), np.array(list(expected), dtype=float), rtol=rtol)


def weights_after(build: Callable[[], nn.Module], run: Callable[[nn.Module], None]) -> list[Tensor]:
    torch.manual_seed(0)
    model = build()
    run(model)
    return [parameter.detach().clone() for parameter in model.parameters()]

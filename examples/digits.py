"""The handwritten digits of scikit-learn and the ordinary training loop that all examples share."""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from sklearn.datasets import load_digits
from torch import nn

import gradwatch


def batches(size: int = 64) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return 1,797 images of 8 x 8 pixels, standardised, with their digits, in shuffled batches."""
    digits = load_digits()
    images = torch.tensor(digits.data, dtype=torch.float32)
    images = (images - images.mean()) / images.std()
    order = torch.randperm(len(images))
    labels = torch.tensor(digits.target)
    return list(zip(images[order].split(size), labels[order].split(size), strict=True))


def train(
    name: str, model: nn.Module, optimizer: torch.optim.Optimizer, *, epochs: int = 12, log_dir: str | None = None
) -> gradwatch.GradWatch:
    """Train, watched; print one line an epoch."""
    watch = gradwatch.watch(model, optimizer, log_dir=log_dir)
    for epoch in range(1, epochs + 1):
        right = seen = 0
        for images, labels in batches():
            optimizer.zero_grad()
            logits = model(images)
            loss = nn.functional.cross_entropy(logits, labels)
            watch.log_loss(loss)
            loss.backward()
            optimizer.step()
            right += int((logits.argmax(dim=1) == labels).sum())
            seen += len(labels)
        print(f"{name}: epoch {epoch:2d}/{epochs}   loss {loss.item():9.3g}   accuracy {right / seen:6.1%}")
    watch.close()
    return watch


def main(name: str, build: Callable[[], tuple[nn.Module, torch.optim.Optimizer]]) -> None:
    """Run one example from the command line."""
    parser = argparse.ArgumentParser(description=f"Train {name} on handwritten digits, watched.")
    parser.add_argument("--log-dir", help="folder for TensorBoard and gradwatch.jsonl", default=f"runs/{name}")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    train(name, *build(), log_dir=arguments.log_dir)
    print(f"\nThe whole run: tensorboard --logdir {arguments.log_dir}")

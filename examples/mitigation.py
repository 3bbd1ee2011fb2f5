"""A learning rate that rises far too high: the same run by itself, and with backoff, rollback and skipping."""

from __future__ import annotations

from statistics import median

import torch
from digits import batches
from torch import nn

import gradwatch


def train(name: str, **mitigation: list[object]) -> None:
    """Train five layers while the rate rises to 1.0; print the loss, and each change that was made."""
    torch.manual_seed(0)
    widths = [64, 64, 64, 64, 64]
    layers = [part for width in widths[:-1] for part in (nn.Linear(width, width), nn.ReLU())]
    model = nn.Sequential(*layers, nn.Linear(64, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 300))
    watch = gradwatch.watch(model, optimizer, **mitigation)
    losses: list[float] = []
    for epoch in range(1, 25):
        for images, labels in batches():
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(images), labels)
            watch.log_loss(loss)
            loss.backward()
            optimizer.step()
            scheduler.step()
            losses.append(loss.item())
        if epoch % 4 == 0:
            now, rate = median(losses[-28:]), scheduler.get_last_lr()[0]
            print(f"{name}: epoch {epoch:2d}/24   loss {now:9.3g}   rate {rate:.2f}")
    watch.close()


if __name__ == "__main__":
    train("by itself")
    train(
        "with gradwatch",
        transforms=[gradwatch.SkipNonfinite()],
        reactions=[gradwatch.BackOffLR(), gradwatch.Rollback(every=20)],
    )

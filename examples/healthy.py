"""An ordinary network that trains well: the watch has nothing to say."""

from __future__ import annotations

import torch
from digits import main
from torch import nn


def build() -> tuple[nn.Module, torch.optim.Optimizer]:
    """Return a small convolutional network with batch normalisation, under Adam."""
    model = nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1, stride=2),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 4 * 4, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )
    return model, torch.optim.Adam(model.parameters(), lr=1e-3)


if __name__ == "__main__":
    main("healthy", build)

"""A ReLU network whose weights begin three times too large: the first updates throw them far away."""

from __future__ import annotations

from itertools import pairwise

import torch
from digits import main
from torch import nn


def build() -> tuple[nn.Module, torch.optim.Optimizer]:
    """Return four ReLU layers with three times the standard deviation that He's initialisation gives."""
    widths = [64, *[64] * 4]
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        linear = nn.Linear(before, after)
        nn.init.kaiming_normal_(linear.weight, nonlinearity="relu")
        with torch.no_grad():
            linear.weight.mul_(3)
        layers += [linear, nn.ReLU()]
    model = nn.Sequential(*layers, nn.Linear(64, 10))
    return model, torch.optim.SGD(model.parameters(), lr=0.05)


if __name__ == "__main__":
    main("exploding", build)

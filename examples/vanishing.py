"""A deep network of sigmoids: each takes most of the gradient away, and the first layers learn nothing."""

from __future__ import annotations

from itertools import pairwise

import torch
from digits import main
from torch import nn


def build() -> tuple[nn.Module, torch.optim.Optimizer]:
    """Return twelve sigmoid layers of 32 units, with the initialisation that the textbook gives them."""
    widths = [64, *[32] * 12]
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        linear = nn.Linear(before, after)
        nn.init.xavier_uniform_(linear.weight)
        layers += [linear, nn.Sigmoid()]
    model = nn.Sequential(*layers, nn.Linear(32, 10))
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


if __name__ == "__main__":
    main("vanishing", build)

"""Where a gradient is lost on its way back: in the activations or in the weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from gradwatch.records import ModuleReadings

IDEAL_SLOPE = {
    "relu": 0.5**0.5,
    "leaky": 0.5**0.5,
    "gelu": 0.7,
    "elu": 0.9,
    "tanh": 1.0,
    "hardtanh": 1.0,
    "selu": 1.0,
    "sigmoid": 1.0,
    "softmax": 1.0,
    "exp": 1.0,
}
"""What an activation leaves of a gradient's root mean square when its inputs have the scale it was made for."""
WEIGHTED = ("linear", "conv")


@dataclass(frozen=True, slots=True)
class Decomposition:
    """Decades that a gradient changes by on its way from the last operation to the first; negative when it falls."""

    activations: float
    """Beyond the ideal slope of each: saturation, and flat functions such as the sigmoid with its slope of 1/4."""
    weights: float
    """Beyond what keeps the scale together with the activations: the initialisation."""
    layers: int
    """Activations that were passed."""

    @property
    def lost(self) -> float:
        """Decades that activations and weights take together."""
        return -(self.activations + self.weights)

    @property
    def activations_dominate(self) -> bool:
        """Whether the activations take more than the weights."""
        return self.activations < self.weights and self.activations < -0.5


def decompose(modules: ModuleReadings) -> Decomposition:
    """Split the change of the gradient between neighbours. Valid for chains; of residual nets the branch is seen."""
    activations = weights = 0.0
    layers = 0
    for earlier, later, change in _steps(modules):
        if later in IDEAL_SLOPE and earlier in WEIGHTED:
            activations += change - float(np.log10(IDEAL_SLOPE[later]))
            layers += 1
        elif later in WEIGHTED and earlier in IDEAL_SLOPE:
            weights += change + float(np.log10(IDEAL_SLOPE[earlier]))
        elif later in WEIGHTED and earlier in WEIGHTED:
            weights += change
    return Decomposition(activations, weights, layers)


def _steps(modules: ModuleReadings) -> Iterator[tuple[str, str, float]]:
    """Yield neighbours in order of execution, and log10 of what the later one leaves of the gradient."""
    gradients = modules.gradient_rms
    known = [row for row in range(len(gradients)) if np.isfinite(gradients[row]) and gradients[row] > 0]
    for earlier, later in pairwise(known):
        if later == earlier + 1:
            change = float(np.log10(gradients[earlier]) - np.log10(gradients[later]))
            yield modules.operations[earlier], modules.operations[later], change

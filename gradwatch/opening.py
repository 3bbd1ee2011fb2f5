"""What a run showed in its first steps, before training changed it: an initialisation is judged by nothing later."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

import numpy as np

from gradwatch.readings import median
from gradwatch.records import GradientState, ModuleReadings, Snapshot

STEPS = 3
"""Steps that count as the opening."""
HIDDEN = ("linear", "conv")


@dataclass(slots=True, eq=False)
class Opening:
    """Facts of the first steps; NaN where nothing was read."""

    gain: float = float("nan")
    """Median over all weights but the last of rms(w)·√fan_in: 1.4 keeps the scale through ReLU (He, 2015), 1 tanh."""
    gains: dict[str, float] = field(default_factory=dict)
    """The same of each weight."""
    zero_weights: list[str] = field(default_factory=list)
    """Weights that were zero as a whole."""
    input_rms: float = float("nan")
    forward_growth: float = float("nan")
    """Output of the last hidden operation over that of the first one."""
    forward_fall: float = float("nan")
    """Smallest output of a hidden operation that is not zero over that of the first: a signal that dies out."""
    output_gradient: float = float("nan")
    """rms of the loss's gradient at the model's last weighted output."""
    output_elements: int = 0
    """Number of elements of that output."""
    logits: float = float("nan")
    """Largest root mean square of any attention's logits."""
    saturated: float = float("nan")
    """Largest share of saturated outputs of any bounded activation."""
    norm: float = float("nan")
    """Global gradient norm of the first step."""
    profile_up: float = 0.0
    """Largest number of decades by which the gradient grew from the last layers to the first."""
    recurrent_growth: float = float("nan")
    """Largest number of decades by which a gradient grows over the time steps of a recurrent module."""
    recurrent_module: str = ""
    recurrent_steps: int = 0
    seen: bool = False
    probed: bool = False

    def take(self, snapshot: Snapshot) -> None:
        """Take in one of the first steps; the first one that shows a fact decides it."""
        if not self.seen:
            self.seen = True
            self._take_weights(snapshot)
            self.norm = float("nan") if snapshot.global_norm is None else snapshot.global_norm
        if np.isnan(self.input_rms) and snapshot.input is not None and snapshot.step < STEPS:
            self.input_rms = snapshot.input.rms
        if snapshot.modules is not None and snapshot.step < STEPS and not self.probed:
            self.probed = True
            self._take_modules(snapshot.modules)

    def state(self) -> Mapping[str, object]:
        """Return everything as plain values."""
        return asdict(self)

    def _take_weights(self, snapshot: Snapshot) -> None:
        tensors = snapshot.tensors
        rows = np.flatnonzero(tensors.is_weight & np.isfinite(snapshot.weight_norm))
        for row in rows.tolist():
            fan_in = int(np.prod(tensors.shapes[row][1:]))
            rms = float(snapshot.weight_norm[row]) / max(int(tensors.numel[row]), 1) ** 0.5
            if rms > 0:
                self.gains[tensors.names[row]] = rms * fan_in**0.5
            elif snapshot.state[row] != GradientState.MISSING:
                self.zero_weights.append(tensors.names[row])
        hidden = list(self.gains.values())[:-1]
        self.gain = median(hidden) if hidden else float("nan")

    def _take_modules(self, modules: ModuleReadings) -> None:
        rows = [row for row, operation in enumerate(modules.operations) if operation in HIDDEN]
        hidden = modules.output_rms[rows[:-1]]
        if len(hidden) > 1 and hidden[0] > 0:
            self.forward_growth = float(hidden[-1] / hidden[0]) if np.isfinite(hidden[-1]) else float("inf")
            alive = hidden[hidden > 0]
            self.forward_fall = float(alive.min() / hidden[0])
        if rows:
            self.output_gradient = float(modules.gradient_rms[rows[-1]])
            self.output_elements = int(modules.elements[rows[-1]])
        known = modules.logits[np.isfinite(modules.logits)]
        self.logits = float(known.max()) if known.size else float("nan")
        for entry in modules.recurrences:
            if entry.cell != "loop" and not entry.decades <= self.recurrent_growth and np.isfinite(entry.decades):
                self.recurrent_growth, self.recurrent_module = entry.decades, entry.module
                self.recurrent_steps = entry.steps
        bounded = np.append(modules.low + modules.high, [entry.saturated for entry in modules.recurrences])
        bounded = np.nan_to_num(bounded)
        self.saturated = float(bounded.max()) if bounded.size else float("nan")

"""One alert with all that is known around it, in the words that the rules use."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from gradwatch.detectors.stalled import is_adaptive
from gradwatch.diagnosis.decomposition import Decomposition, decompose
from gradwatch.history import History
from gradwatch.opening import Opening
from gradwatch.readings import gap_to_top, live_weights
from gradwatch.records import Alert, ModuleReadings, Snapshot

BATCH_MEMORY = 10
"""Steps that a bad batch is kept in mind before the symptom begins: under plain SGD the loss shows it later."""
JUMP_MEMORY = 12
"""The same for a jump of the learning rate."""
HARD_CLIPPING = 1e-3
"""Share of the gradient below which a clipping limit lies far under the usual norm."""


@dataclass(frozen=True, eq=False)
class Case:
    """What the rules ask."""

    alert: Alert
    snapshot: Snapshot
    history: History

    @property
    def opening(self) -> Opening:
        """What the first steps showed."""
        return self.history.opening

    @property
    def probe(self) -> ModuleReadings | None:
        """The newest forward pass that was read, if any."""
        return self.history.probe

    @cached_property
    def decomposition(self) -> Decomposition | None:
        """Where the gradient is lost; None without the probe, or without any activation."""
        found = None if self.probe is None else decompose(self.probe)
        return found if found is not None and found.layers else None

    @property
    def is_adaptive(self) -> bool:
        """The optimizer divides by the gradient's own size: clipping is no smaller step."""
        return is_adaptive(self.snapshot.optimizer_facts.name)

    @property
    def is_float16(self) -> bool:
        """Numbers above 65,504 or below 6e-8 do not exist here."""
        return "float16" in self.snapshot.tensors.dtypes or self.snapshot.loss_scale is not None or self._half_outputs

    @property
    def _half_outputs(self) -> bool:
        return self.probe is not None and "float16" in self.probe.dtypes

    @property
    def rate(self) -> float:
        """Largest learning rate."""
        return max(self.snapshot.learning_rates, default=0.0)

    @property
    def recent_update(self) -> float:
        """Largest median update-to-weight ratio of the newest eight steps."""
        return self.history.largest_update(self.snapshot.step - 8)

    @property
    def largest_update(self) -> float:
        """Largest of the newest forty measured ones."""
        return self.history.largest_update(0)

    @property
    def rate_jumped(self) -> bool:
        """The rate grew fivefold at once, shortly before."""
        return self.history.rate_jump >= 0 and self.history.rate_jump >= self.alert.first_step - JUMP_MEMORY

    @property
    def batch_was_bad(self) -> bool:
        """A batch far out of all earlier ones came at the symptom's beginning or shortly before."""
        return self.history.bad_batch >= 0 and self.history.bad_batch >= self.alert.first_step - BATCH_MEMORY

    @property
    def loss_leapt(self) -> bool:
        """The loss leapt at the symptom's beginning or shortly before, and the weights had not moved far."""
        return self.history.leap >= 0 and self.history.leap >= self.alert.first_step - BATCH_MEMORY

    @property
    def has_norm_layers(self) -> bool:
        """The model normalises its activations."""
        kinds = ("LayerNorm", "RMSNorm", "BatchNorm", "GroupNorm", "InstanceNorm")
        named = any(kind in module for module in self.snapshot.tensors.modules for kind in kinds)
        return named or (self.probe is not None and "norm" in self.probe.operations)

    @property
    def depth(self) -> int:
        """Number of weights in a row."""
        return int(self.snapshot.tensors.is_weight.sum())

    @property
    def recurrence_grows(self) -> bool:
        """A gradient grew over the time steps of a recurrent module before training began."""
        return self.opening.recurrent_growth > 1.5

    @property
    def gradient_rms(self) -> float:
        """Median over the weights of the gradient's root mean square."""
        live = live_weights(self.snapshot)
        return float(np.median(self.snapshot.rms[live])) if live.any() else 0.0

    @property
    def top_gap(self) -> float:
        """Decades between the largest gradient of any tensor and that of the median weight."""
        return gap_to_top(self.snapshot) if live_weights(self.snapshot).any() else 0.0

    @property
    def last_operation(self) -> tuple[str, str]:
        """Module and operation that end the forward pass."""
        if self.probe is None or not self.probe.operations:
            return "", ""
        return self.probe.modules[-1], self.probe.operations[-1]

    @property
    def amplifying(self) -> str | None:
        """Module with an activation whose output is far larger than its input; None if there is none."""
        if self.probe is None:
            return None
        for row, operation in enumerate(self.probe.operations):
            large = 3 * self.probe.input_rms[row] + 1
            if operation == "exp" and not self.probe.output_rms[row] <= large:
                return self.probe.modules[row] or "the model"
        return None

    @cached_property
    def leaves_the_finite(self) -> tuple[str, float] | None:
        """Module in which this step's forward pass is no longer finite, and the largest values before it.

        None where the pass was not read, is finite, or was given something that is not.
        """
        probe = self.snapshot.modules
        if probe is None:
            return None
        bad = np.flatnonzero(~np.isfinite(probe.output_rms))
        if not bad.size or not np.isfinite(probe.input_rms[0]):
            return None
        first = int(bad[0])
        before = np.append(probe.output_rms[:first], probe.input_rms[0])
        return probe.modules[first], float(before.max())

    @property
    def input_is_zero(self) -> bool:
        """All that the first operation was given is zero."""
        return self.probe is not None and bool(self.probe.input_rms.size) and self.probe.input_rms[0] == 0

    @property
    def clipped_away(self) -> float | None:
        """Share of the gradient that clipping leaves, where the limit makes updates small; None elsewhere."""
        coefficient = self.snapshot.clip_coefficient
        return coefficient if coefficient is not None and coefficient < HARD_CLIPPING else None

    @property
    def eps(self) -> float:
        """What the optimizer adds to its divisor."""
        return max(self.snapshot.optimizer_facts.eps, default=0.0)

    @property
    def eps_decides(self) -> bool:
        """Beside what the optimizer adds to its divisor the gradient hardly counts."""
        return self.is_adaptive and self.gradient_rms < 10 * self.eps

    @property
    def inactive(self) -> str | None:
        """Module whose ReLU lets almost nothing through; None if there is none."""
        if self.probe is None or not np.isfinite(self.probe.inactive).any():
            return None
        worst = int(np.nanargmax(self.probe.inactive))
        return self.probe.modules[worst] if self.probe.inactive[worst] > 0.95 else None

    @property
    def saturated_share(self) -> float:
        """Median share of flat outputs over the bounded activations."""
        if self.probe is None:
            return 0.0
        known = (self.probe.low + self.probe.high)[np.isfinite(self.probe.low)]
        return float(np.median(known)) if known.size else 0.0

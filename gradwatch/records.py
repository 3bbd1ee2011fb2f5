"""The nouns that travel through the pipeline: frozen records over NumPy arrays, no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field
from enum import IntEnum
from functools import cached_property
from typing import Literal, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

Severity: TypeAlias = Literal["info", "warning", "critical"]
Change: TypeAlias = Literal["opened", "updated", "escalated", "resolved"]
Source: TypeAlias = Literal["backward", "step", "closure", "unscale", "manual", "lightning"]
Floats: TypeAlias = NDArray[np.float64]

KINDS: tuple[str, ...] = (
    "vanishing",
    "exploding",
    "nonfinite",
    "spike",
    "dead",
    "stalled",
    "saturated",
    "unoptimized",
)
"""The alert kinds; stable strings."""

CAUSES: tuple[str, ...] = (
    "depth",
    "activation",
    "initialization",
    "learning_rate",
    "precision",
    "data",
    "recurrence",
    "graph",
    "accumulation",
    "unknown",
)
"""What an alert can have for a reason; stable strings."""

SEVERITIES: tuple[Severity, ...] = ("info", "warning", "critical")
"""From the least to the most severe."""

LOWEST_OCTAVE = -48
OCTAVES = 64
"""The histogram has one bin an octave, of log2|g| from 2**-48 to 2**15; what lies outside counts in the outer bins."""


class GradientState(IntEnum):
    """What a tensor's gradient was at one step; `Snapshot.state` holds these."""

    MISSING = 0
    """``.grad`` was None."""
    ZERO = 1
    """Every element was exactly zero (or the tensor is empty)."""
    VALUE = 2
    """At least one element was not zero; non-finite ones count."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Tensors:
    """What stays the same from step to step about the watched tensors of a lane: one entry a tensor, in depth order."""

    names: tuple[str, ...]
    """Canonical parameter names, first layer first."""
    layers: tuple[str, ...]
    """Name of the module that owns the tensor."""
    modules: tuple[str, ...]
    """Class name of that module, such as ``"Linear"``."""
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[str, ...]
    """Such as ``"float32"``."""
    groups: NDArray[np.int64]
    """Index of the optimizer's parameter group, -1 for a tensor in no watched optimizer."""
    series: NDArray[np.bool_]
    """True where every path from the loss back to the inputs passes the operation that uses the tensor."""
    depths: tuple[int, ...] = ()
    """Longest path, in operations, from the loss to the operation that uses the tensor; parallel branches share it.
    Empty where no graph was walked: then every tensor has a depth of its own."""
    order_source: Literal["autograd", "registration"] = "registration"
    """Where the depth order comes from: the autograd graph of the first training output, or registration."""

    @cached_property
    def numel(self) -> NDArray[np.int64]:
        """Number of elements of each tensor."""
        return np.array([int(np.prod(shape, dtype=np.int64)) for shape in self.shapes], dtype=np.int64)

    @cached_property
    def optimized(self) -> NDArray[np.bool_]:
        """True where the tensor belongs to this lane's optimizer."""
        return self.groups >= 0

    @cached_property
    def index(self) -> Mapping[str, int]:
        """Position of each name."""
        return {name: position for position, name in enumerate(self.names)}

    @cached_property
    def is_matrix(self) -> NDArray[np.bool_]:
        """True for optimized tensors of two or more dimensions."""
        matrix: NDArray[np.bool_] = np.array([len(shape) >= 2 for shape in self.shapes], dtype=bool) & self.optimized
        return matrix

    @cached_property
    def is_weight(self) -> NDArray[np.bool_]:
        """The same without embeddings, whose rows are mostly empty: what the profile over depth reads."""
        embedding = np.array([module.startswith("Embedding") for module in self.modules], dtype=bool)
        weight: NDArray[np.bool_] = self.is_matrix & ~embedding
        return weight


@dataclass(frozen=True, kw_only=True)
class OptimizerFacts:
    """What the judging side has to know about the optimizer, one value a parameter group."""

    name: str
    """Class name, such as ``"AdamW"``."""
    learning_rates: tuple[float, ...]
    weight_decay: tuple[float, ...]
    eps: tuple[float, ...]
    """0.0 where the optimizer has none."""
    scheduled: bool = False
    """A learning-rate scheduler was made for it: the rate may still rise."""


@dataclass(frozen=True, kw_only=True)
class InputReading:
    """The batch, as the model got it: its first floating-point input. Integer inputs give none."""

    rms: float
    max_abs: float
    """Not finite if any element is not."""


@dataclass(frozen=True, kw_only=True)
class Recurrence:
    """How a gradient changes on its way back over the time steps of a recurrent module."""

    module: str
    cell: str
    """Class name, such as ``"LSTM"``; ``"loop"`` for a module that the model calls again and again."""
    steps: int
    decades: float
    """log10 of what is left of a gradient after the whole sequence: negative when it shrinks."""
    last_tenth: float
    """Share of the loss's own gradient that enters in the last tenth of the steps; NaN where that is unknown."""
    saturated: float = float("nan")
    """Share of the candidate states (tanh) that the inputs alone drive to where the slope is nearly zero."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ModuleReadings:
    """What the probe saw of the forward pass and of its backward: one entry an operation, in order of execution."""

    modules: tuple[str, ...]
    """Name of the module in whose forward pass the operation ran."""
    operations: tuple[str, ...]
    """``"linear"``, ``"conv"``, ``"norm"``, ``"attention"``, or an activation such as ``"relu"`` and ``"tanh"``."""
    elements: NDArray[np.int64]
    """Number of elements of the output."""
    dtypes: tuple[str, ...]
    """Of the output, such as ``"float16"``."""
    input_rms: Floats
    output_rms: Floats
    gradient_rms: Floats
    """Of the loss's gradient at the output; NaN where none arrived."""
    low: Floats
    """Share of outputs at the lower end of a bounded activation, where its slope is below 5 %; NaN for the others."""
    high: Floats
    """The same at the upper end; for softmax, rows with an entry above 0.99."""
    inactive: Floats
    """Share of units that no sample of the batch activates, for ReLU and its kin; NaN for the others."""
    between: Floats
    """Share of the output's mean square that differs between samples; NaN for activations."""
    logits: Floats
    """Root mean square of the attention logits; NaN for other operations."""
    ran: frozenset[str] = frozenset()
    """Names of all modules that ran."""
    cuts: tuple[str, ...] = ()
    """Operations that end a gradient's way, with the module they ran in: ``"encoder: detach"``."""
    frozen_statistics: tuple[str, ...] = ()
    """Batch normalisations that ran in evaluation mode while the model trains."""
    recurrences: tuple[Recurrence, ...] = ()


@dataclass(frozen=True, kw_only=True, eq=False)
class Snapshot:
    """One optimizer step as it was measured. Arrays follow `names`; what was not measured is NaN or None, never 0."""

    optimizer: str
    """Name of the optimizer, ``""`` where there is one only."""
    step: int
    """Optimizer step, skipped ones included."""
    log_step: int
    """The host framework's logging axis; equals `step` in a plain loop."""
    source: Source
    """Where the gradients were seen."""
    skipped: bool
    """The parameters did not move: overflow, or no gradient at all."""
    detail: bool
    """The detail tier was measured."""
    tensors: Tensors
    optimizer_facts: OptimizerFacts
    several_lanes: bool = False
    """Other optimizers are watched beside this one: sinks then put its name into their tags."""
    loss: float | None = None
    """Mean of the losses logged since the last step."""
    loss_scale: float | None = None
    """The gradient scaler's factor, already divided out of every statistic."""

    global_norm: float | None = None
    """L2 norm over all finite gradient elements of the optimizer, unscaled, before clipping; None without gradients."""
    clipped_norm: float | None = None
    """The same right before the update; None if nobody touched the gradients in between."""
    clip_coefficient: float | None = None
    """`clipped_norm` / `global_norm` where one factor was applied to all tensors."""

    state: NDArray[np.int8]
    norm: Floats
    """L2 norm over the finite elements; 0 for a zero gradient, NaN for a missing one."""
    max_abs: Floats
    nonfinite: Floats
    """Number of NaN and infinite elements."""

    mean: Floats
    """Detail tier from here on: NaN elsewhere."""
    std: Floats
    zero_fraction: Floats
    row_spread: Floats
    """‖G - mean row‖ / ‖G‖ over a sample of the gradient's rows; NaN below two dimensions or three rows."""
    weight_norm: Floats
    weight_row_spread: Floats
    update_norm: Floats
    """‖Δw‖, estimated from the sample: √(n/k · Σ Δw²)."""
    update_ratio: Floats
    """Update-to-weight ratio ‖Δw‖ / ‖w‖ over a fixed stratified random sample of elements."""
    lost: Floats
    """Share of sampled elements with a gradient whose weight did not change."""
    moved: Floats
    """1 if any sampled weight differs from its value at the sampled step before, 0 if none does."""
    histogram: Floats | None = None
    """Sampled elements by log2|g|, shape [tensors, 64]; see `LOWEST_OCTAVE`."""

    clipped_elsewhere: bool = False
    """The loop or the Trainer changed the gradients before our transforms saw them."""
    clip_rate: float | None = None
    """Share of the newest hundred steps at which a transform clipped."""
    vetoed: bool = False
    """A transform skipped the step."""
    factors: Mapping[str, float] = field(default_factory=dict)
    """Smallest factor that each transform applied to a tensor, by its name; 1 where it did nothing."""
    rearmed: Mapping[str, int] = field(default_factory=dict)
    """How often each adaptive clipper has begun afresh at a new level of the norm."""
    rate_factor: float = 1.0
    """What backoff has multiplied the learning rate by; `learning_rates` have it in them."""

    input: InputReading | None = None
    modules: ModuleReadings | None = None
    """What the probe read at this step, or None."""
    cleared: bool | None = None
    """Gradients were cleared since the step before; None where that could not be seen."""

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the tensors, in depth order."""
        return self.tensors.names

    @property
    def learning_rates(self) -> tuple[float, ...]:
        """Learning rate of each parameter group."""
        return self.optimizer_facts.learning_rates

    @cached_property
    def bad(self) -> NDArray[np.bool_]:
        """True where a gradient holds a NaN or infinite element.

        A backend that does not count them every step shows them by a norm that is not finite.
        """
        counted: NDArray[np.bool_] = self.nonfinite > 0
        flagged: NDArray[np.bool_] = (self.state == GradientState.VALUE) & ~np.isfinite(self.norm)
        return counted | flagged

    @cached_property
    def rms(self) -> Floats:
        """Root mean square: norm / √n."""
        return self.norm / np.sqrt(np.maximum(self.tensors.numel, 1))


@dataclass(frozen=True, eq=False)
class Evidence:
    """What a detector says at one step: how far a reading lies beyond its threshold. Nothing said means not looked."""

    symptom: str
    """Name of the criterion; sums are kept per symptom."""
    _: KW_ONLY
    kind: str
    """Alert kind it argues for."""
    value: float | Floats
    """In [-2, 2], negative when healthy; an array follows `Snapshot.names`, NaN where not looked."""
    reading: float | Floats = float("nan")
    """What was read, in the unit of `threshold`."""
    threshold: float = float("nan")
    message: str = ""
    """One sentence for people, with the numbers in it."""
    tensors: tuple[str, ...] = ()
    """The tensors concerned, worst first (for a single value; an array knows its own)."""
    layers: tuple[str, ...] = ()
    """Modules concerned, where it is not tensors that were read."""
    severity: Severity = "warning"
    immediate: bool = False
    """Alert at once, without accumulation."""


@dataclass(frozen=True, kw_only=True)
class Cause:
    """One possible reason for an alert."""

    name: str
    confidence: float
    evidence: str
    remedy: str


@dataclass(frozen=True, kw_only=True)
class Alert:
    """One open problem; later records with the same `key` replace it."""

    kind: str
    symptom: str
    severity: Severity
    optimizer: str
    """Name of the optimizer whose step it was."""
    step: int
    """Step of the latest evidence."""
    first_step: int
    """Step at which the symptom began."""
    opened: int
    """Step at which the alert was raised."""
    change: Change
    """What is new since the record before."""
    layers: tuple[str, ...]
    """Worst first."""
    tensors: tuple[str, ...]
    value: float
    """The reading, in the unit of `threshold`."""
    threshold: float
    message: str
    resolved: int | None = None
    """Step at which it ended, or None while it is open."""
    causes: tuple[Cause, ...] = field(default=())
    """Best first."""

    @property
    def cause(self) -> str:
        """Name of the first cause, ``"unknown"`` if there is none."""
        return self.causes[0].name if self.causes else "unknown"

    @property
    def key(self) -> tuple[str, str, int]:
        """What stays the same over the life of an alert."""
        return (self.optimizer, self.symptom, self.opened)


@dataclass(frozen=True, kw_only=True)
class Intervention:
    """A change that was made to training."""

    step: int
    optimizer: str
    kind: str
    reason: str
    before: float
    after: float


class Sink(Protocol):
    """Where records go. Every method may raise: the sink is then reported once and switched off."""

    def write(self, snapshot: Snapshot, alerts: tuple[Alert, ...], interventions: tuple[Intervention, ...]) -> None:
        """Take one step: `alerts` are those that changed at it."""

    def flush(self) -> None:
        """Make what was written durable."""

    def close(self) -> None:
        """Release files; called once."""

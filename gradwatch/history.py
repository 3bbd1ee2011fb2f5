"""The bounded past of one optimizer: the only place that remembers earlier steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

import numpy as np

from gradwatch.opening import Opening
from gradwatch.readings import Profile, median, median_update, profile
from gradwatch.records import Evidence, Floats, GradientState, ModuleReadings, Snapshot
from gradwatch.series import Runs, Thinned

RECENT = 40
OPENING_STEPS = 20
"""Steps in which a profile that grows towards the input is laid to the network and not to its training."""
LEAP = 10.0
"""Times the largest loss so far from which on a single batch is suspected."""
KNOWN_AFTER = 30
"""Losses from which on it is known whether the network learns."""
JUST = 5
"""Steps for which that is news."""
WEIGHT_STEPS = 32
"""Detail steps whose weight norms are kept: growth is read over ten steps, dense at the start."""


class History:
    """What detectors may know of the past. `update` comes before the detectors: the current step is included."""

    def __init__(self) -> None:  # noqa: PLR0915 - a list of what is remembered
        self.steps = 0
        """Judged steps, skipped ones included."""
        self.first_losses: list[float] = []
        self.losses: list[float] = []
        """The newest `RECENT` finite losses, oldest first."""
        self.all_losses = Thinned()
        self.losses_seen = 0
        self.largest_loss = 0.0
        self.norms: list[float] = []
        """The newest `RECENT` global norms of finite gradients."""
        self.norm_reference = 0.0
        """Largest running median of ten global norms, three steps behind: the run's own level in health."""
        self.updates: list[list[float]] = []
        """Step and median update-to-weight ratio of the newest `RECENT` detail steps."""
        self.first_update = 0.0
        """The first of them."""
        self.update_reference = 0.0
        """The same reference level for updates."""
        self.opening = Opening()
        """What the first steps showed, before training changed it."""
        self.largest_input = 0.0
        """Largest element of any batch before this step, and"""
        self.inputs_seen = 0
        """how many batches were read."""
        self.bad_batch = -1
        """Newest step whose batch held a non-finite element, or one ten times larger than every batch before; -1."""
        self.bad_batch_size = 0.0
        """How many times larger it was; infinite for a non-finite one."""
        self.leap = -1
        """Newest step whose loss was ten times any before although the update before it was ordinary: its batch; -1."""
        self.leap_size = 0.0
        """How many times larger it was."""
        self.probe: ModuleReadings | None = None
        """What the forward pass showed last, and"""
        self.probe_step = -1
        """when."""
        self.uncleared = 0
        """Commits in a row that used a gradient nobody had cleared."""
        self.profile: Profile | None = None
        """The profile over depth at this step, with the weight norms of the last detail step."""
        self.attenuation = Thinned()
        self.rates: list[float] = []
        """Largest learning rates of the newest twelve steps."""
        self.rate_jump = -1
        """Newest step at which the rate grew fivefold at once; -1."""
        self.rate_gone = 0
        """Steps in a row at less than a millionth of the peak rate."""
        self.peak_rate = 0.0
        self.rate_dropped = False
        """The rate once fell by a factor of fifty in one step: a fault, where a slow fall is annealing."""
        self.overflows = 0
        """Steps in a row that a gradient scaler has skipped."""
        self.weight_norms: list[tuple[int, Floats]] = []
        self.weight_norm: Floats = np.empty(0)
        self.zero = Runs(np.empty(0), np.empty(0))
        self.missing = Runs(np.empty(0), np.empty(0))
        self.ever_had_gradient = np.empty(0, dtype=bool)
        self._names: tuple[str, ...] = ()

    # -- taking a step in ----------------------------------------------------------------------------------------

    def update(self, snapshot: Snapshot) -> None:
        """Take in one step."""
        self.steps += 1
        self._align(snapshot)
        self._take_loss(snapshot)
        self._take_states(snapshot)
        self._take_forward(snapshot)
        overflowed = snapshot.skipped and snapshot.loss_scale is not None and bool(snapshot.bad.any())
        self.overflows = self.overflows + 1 if overflowed else 0
        self.profile = None
        if snapshot.skipped:
            return
        self._take_rate(snapshot)
        self._take_weights(snapshot)
        self.opening.take(snapshot)
        self.uncleared = self.uncleared + 1 if snapshot.cleared is False else 0
        if not snapshot.bad.any():
            self._take_norm(snapshot)
            self.profile = profile(snapshot, self.weight_norm)
            if self.profile is not None:
                self.attenuation.append(self.profile.down)
                if self.steps <= OPENING_STEPS:
                    self.opening.profile_up = max(self.opening.profile_up, self.profile.up)

    def _take_loss(self, snapshot: Snapshot) -> None:
        loss = snapshot.loss
        if loss is None or not np.isfinite(loss):
            return
        if abs(loss) > LEAP * self.largest_loss > 0 and self._step_before_was_ordinary(snapshot.step):
            self.leap, self.leap_size = snapshot.step, abs(loss) / self.largest_loss
        if len(self.first_losses) < 10:
            self.first_losses.append(loss)
        self.losses = [*self.losses[-RECENT + 1 :], loss]
        self.all_losses.append(abs(loss))
        self.losses_seen += 1
        self.largest_loss = max(self.largest_loss, abs(loss))

    def _take_states(self, snapshot: Snapshot) -> None:
        missing = snapshot.state == GradientState.MISSING
        zero = snapshot.state == GradientState.ZERO
        value = snapshot.state == GradientState.VALUE
        self.missing.update(missing, ended=~missing)
        self.zero.update(zero, ended=value)
        self.ever_had_gradient |= value

    def _take_rate(self, snapshot: Snapshot) -> None:
        if not snapshot.learning_rates:
            return
        rate = max(snapshot.learning_rates)
        if self.rates and 0 < rate < 0.02 * self.rates[-1]:
            self.rate_dropped = True
        if self.rates and 0 < 5 * self.rates[-1] < rate:
            self.rate_jump = snapshot.step
        self.rates = [*self.rates[-11:], rate]
        self.peak_rate = max(self.peak_rate, rate)
        self.rate_gone = self.rate_gone + 1 if rate < 1e-6 * self.peak_rate else 0

    def _take_forward(self, snapshot: Snapshot) -> None:
        if snapshot.modules is not None:
            self.probe, self.probe_step = snapshot.modules, snapshot.step
        if snapshot.input is None:
            return
        size = snapshot.input.max_abs
        if not np.isfinite(size):
            self.bad_batch, self.bad_batch_size = snapshot.step, float("inf")
            return
        if self.inputs_seen >= 5 and size > 10 * self.largest_input > 0:
            self.bad_batch, self.bad_batch_size = snapshot.step, size / self.largest_input
        self.largest_input = max(self.largest_input, size)
        self.inputs_seen += 1

    def _take_weights(self, snapshot: Snapshot) -> None:
        if snapshot.detail:
            update = median_update(snapshot)
            if np.isfinite(update):
                if not self.updates:
                    self.first_update = update
                self.updates = [*self.updates[-RECENT + 1 :], [float(snapshot.step), update]]
                past = [value for _, value in self.updates[-13:-3]]
                if len(past) >= 5:
                    self.update_reference = max(self.update_reference, median(past))
            known = np.isfinite(snapshot.weight_norm)
            self.weight_norm = np.where(known, snapshot.weight_norm, self.weight_norm)
            self.weight_norms = [*self.weight_norms[-WEIGHT_STEPS + 1 :], (snapshot.step, self.weight_norm)]

    def _take_norm(self, snapshot: Snapshot) -> None:
        if snapshot.global_norm is None:
            return
        self.norms = [*self.norms[-RECENT + 1 :], snapshot.global_norm]
        past = [norm for norm in self.norms[-13:-3] if norm > 0]
        if len(past) >= 5:
            self.norm_reference = max(self.norm_reference, median(past))

    def _step_before_was_ordinary(self, step: int) -> bool:
        """Neither gradient nor rate of the update before was unusual: the weights cannot have moved far."""
        if len(self.norms) < 10 or self.rate_jump >= step - 2 or self.rate_is_ramping:
            return False
        return self.norms[-1] <= 3 * median(self.norms[-13:-1])

    # -- what it tells -------------------------------------------------------------------------------------------

    @property
    def knows_loss(self) -> bool:
        """Enough losses were logged to tell whether the network learns."""
        return self.losses_seen >= KNOWN_AFTER

    @property
    def is_learning(self) -> bool:
        """The loss has fallen by more than the noise of two medians explains, and by more than 2 %."""
        if not self.knows_loss:
            return False
        first, last = median(self.first_losses), np.array(self.losses[-20:])
        now = median(last)
        deviation = 1.4826 * median(np.abs(last - now))
        noise = 3 * 1.25 * deviation * np.sqrt(1 / 10 + 1 / 20)
        return first - now > max(0.02 * abs(first), float(noise))

    @property
    def is_stuck(self) -> bool:
        """It is known that the network does not learn."""
        return self.knows_loss and not self.is_learning

    @property
    def just_stuck(self) -> bool:
        """It has become known just now that the network does not learn: time to look at the forward pass."""
        return self.is_stuck and self.losses_seen < KNOWN_AFTER + JUST

    @property
    def has_no_signal(self) -> bool:
        """The loss is nearly zero beside its largest value: a gradient of zero then means that all is done."""
        return bool(self.losses) and abs(self.losses[-1]) <= 1e-3 * (self.largest_loss or 1.0)

    @property
    def loss_is_falling(self) -> bool:
        """The last three losses lie clearly below the three before them, and below the first."""
        if len(self.losses) < 6:
            return False
        now = median(self.losses[-3:])
        return now < 0.9 * median(self.losses[-6:-3]) and now < 0.9 * self.first_losses[0]

    @property
    def schedule_is_quiet(self) -> bool:
        """The learning rate is zero, rising, or has come down slowly below a tenth: small updates are meant."""
        if not self.rates:
            return False
        rising = len(self.rates) > 1 and self.rates[-1] > 1.0001 * self.rates[-2]
        annealed = self.rates[-1] < 0.1 * self.peak_rate and not self.rate_dropped
        return self.rates[-1] == 0 or rising or annealed

    @property
    def is_transient(self) -> bool:
        """Attenuation over depth has shrunk since half of the run ago, as after a zero initialisation or a warm-up."""
        if self.profile is None:
            return False
        before = self.attenuation.halfway()
        return before is not None and before > 2.25 and self.profile.down < before - 0.25

    def largest_update(self, since: int, until: int | None = None) -> float:
        """Return the largest median update-to-weight ratio measured from step `since` on, 0.0 if there was none."""
        return max((u for step, u in self.updates if step >= since and (until is None or step <= until)), default=0.0)

    @property
    def rate_is_new(self) -> bool:
        """The rate is higher than it ever was, and still rising: nobody knows yet whether the run bears it."""
        return len(self.rates) > 1 and self.rates[-1] >= self.peak_rate and self.rates[-1] > 1.0001 * self.rates[-2]

    @property
    def rate_is_ramping(self) -> bool:
        """The rate has doubled within the last ten steps."""
        return len(self.rates) > 10 and self.rates[-1] > 2 * self.rates[-11] > 0

    def weights_before(self, step: int, distance: int) -> tuple[int, Floats] | None:
        """Return step and weight norms of the newest detail step at least `distance` ago, else of the oldest."""
        if not self.weight_norms:
            return None
        old = [entry for entry in self.weight_norms if entry[0] <= step - distance]
        return old[-1] if old else self.weight_norms[0]

    # -- surviving a restart -------------------------------------------------------------------------------------

    def state(self) -> dict[str, object]:
        """Return everything, tensors by name."""
        plain = {name: getattr(self, name) for name in _PLAIN}
        arrays = {
            "zero": self.zero.current,
            "longest_zero": self.zero.longest,
            "missing": self.missing.current,
            "longest_missing": self.missing.longest,
            "ever_had_gradient": self.ever_had_gradient,
            "weight_norm": self.weight_norm,
        }
        return {
            **plain,
            "all_losses": self.all_losses.state(),
            "opening": self.opening.state(),
            "attenuation": self.attenuation.state(),
            "names": list(self._names),
            "arrays": arrays,
            "weight_norms": [[step, norms] for step, norms in self.weight_norms],
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` returned."""
        for name in _PLAIN:
            setattr(self, name, state[name])
        self.all_losses.restore(state["all_losses"])
        self.opening = Opening(**state["opening"])
        self.attenuation.restore(state["attenuation"])
        arrays = state["arrays"]
        self._names = tuple(state["names"])
        self.zero = Runs(arrays["zero"], arrays["longest_zero"])
        self.missing = Runs(arrays["missing"], arrays["longest_missing"])
        self.ever_had_gradient = arrays["ever_had_gradient"]
        self.weight_norm = arrays["weight_norm"]
        self.weight_norms = [(int(step), norms) for step, norms in state["weight_norms"]]

    def _align(self, snapshot: Snapshot) -> None:
        """Bring what is kept for each tensor into the order of this step; tensors that are new begin empty."""
        if snapshot.names == self._names:
            return
        before = {name: row for row, name in enumerate(self._names)}
        rows = np.array([before.get(name, -1) for name in snapshot.names], dtype=np.int64)

        def moved(values: Floats, fill: float) -> Floats:
            return np.append(values, fill)[rows]  # -1 takes the fill

        self.zero = Runs(moved(self.zero.current, 0), moved(self.zero.longest, 0))
        self.missing = Runs(moved(self.missing.current, 0), moved(self.missing.longest, 0))
        self.ever_had_gradient = moved(self.ever_had_gradient, 0).astype(bool)
        self.weight_norm = moved(self.weight_norm, np.nan)
        self.weight_norms = [(step, moved(norms, np.nan)) for step, norms in self.weight_norms]
        self._names = snapshot.names


_PLAIN = (
    "steps",
    "first_losses",
    "losses",
    "losses_seen",
    "largest_loss",
    "norms",
    "norm_reference",
    "rates",
    "peak_rate",
    "rate_dropped",
    "overflows",
    "updates",
    "first_update",
    "update_reference",
    "largest_input",
    "inputs_seen",
    "bad_batch",
    "bad_batch_size",
    "leap",
    "leap_size",
    "rate_jump",
    "rate_gone",
    "uncleared",
)

Detector: TypeAlias = Callable[[Snapshot, History], Iterable[Evidence]]
"""Reads one Snapshot and the past, yields Evidence; nothing yielded means not looked."""

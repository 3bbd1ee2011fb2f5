"""Published rules of others, written from their documentation: each returns the first step it alarms at, or None."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from gradwatch.records import GradientState, Snapshot

Rule = Callable[[Sequence[Snapshot]], int | None]


def first(holds: Callable[[Snapshot], bool], snapshots: Sequence[Snapshot]) -> int | None:
    return next((snapshot.step for snapshot in snapshots if holds(snapshot)), None)


def live(snapshot: Snapshot) -> np.ndarray:
    return snapshot.state == GradientState.VALUE


def debugger_vanishing(snapshots: Sequence[Snapshot]) -> int | None:
    """SageMaker Debugger, VanishingGradient: mean |g| of a tensor below 1e-7 (for a normal law 0.8 of its rms)."""
    return first(lambda s: bool((0.8 * s.rms[s.state != GradientState.MISSING] < 1e-7).any()), snapshots)


def debugger_update_ratio(snapshots: Sequence[Snapshot]) -> int | None:
    """SageMaker Debugger, WeightUpdateRatio: above 10 or below 1e-8."""
    return first(lambda s: bool(((s.update_ratio > 10) | (s.update_ratio < 1e-8)).any()), snapshots)


def debugger_nan(snapshots: Sequence[Snapshot]) -> int | None:
    """SageMaker Debugger, ExplodingTensor: NaN or infinity anywhere."""
    return first(lambda s: bool(s.bad.any()), snapshots)


def debugger_loss(snapshots: Sequence[Snapshot]) -> int | None:
    """SageMaker Debugger, LossNotDecreasing: less than 0.1 % in ten steps."""
    for earlier, later in zip(snapshots, snapshots[10:], strict=False):
        if (
            earlier.loss is not None
            and later.loss is not None
            and not later.loss < earlier.loss - 0.001 * abs(earlier.loss)
        ):
            return later.step
    return None


def autotrainer(snapshots: Sequence[Snapshot]) -> int | None:
    """AUTOTRAINER (Zhang, 2021): first against last layer, shares of zeros and the loss, every twenty steps."""
    for snapshot in snapshots[::20]:
        rows = np.flatnonzero(snapshot.tensors.is_weight & live(snapshot))
        if snapshot.loss is not None and not snapshot.loss < 1000:
            return snapshot.step
        if not rows.size:
            return snapshot.step
        near, far = snapshot.norm[rows[-1]], snapshot.norm[rows[0]]
        zeros = np.nanmean(snapshot.zero_fraction[rows]) if np.isfinite(snapshot.zero_fraction[rows]).any() else 0.0
        if (far < 1e-3 * near and far < 1e-4) or far > 70 * near or zeros > 0.7:
            return snapshot.step
    return None


def deeplocalize(snapshots: Sequence[Snapshot]) -> int | None:
    """DeepLocalize (Wardat, 2021): update ratios outside 1e-4 to 1e-1, gradients below 1e-6, no fall of the loss."""
    losses = [snapshot.loss for snapshot in snapshots if snapshot.loss is not None]
    for snapshot in snapshots:
        ratio = snapshot.update_ratio[snapshot.tensors.is_weight & np.isfinite(snapshot.update_ratio)]
        mean = float(np.log10(np.maximum(ratio, 1e-30)).mean()) if ratio.size else -2.0
        tiny = 0.8 * snapshot.rms[snapshot.tensors.is_weight & live(snapshot)] < 1e-6
        if snapshot.bad.any() or not -4 <= mean <= -1 or tiny.any():
            return snapshot.step
    still = [i for i in range(40, len(losses), 10) if min(losses[i - 10 : i]) > 0.95 * min(losses[: i - 10])]
    return still[0] if still else None


def folklore(snapshots: Sequence[Snapshot]) -> int | None:
    """A global norm above 100, or a layer's below 1e-6."""
    return first(lambda s: bool((s.global_norm or 0) > 100 or (s.norm[live(s)] < 1e-6).any()), snapshots)


def six_sigma(snapshots: Sequence[Snapshot]) -> int | None:
    """OLMo's rule for skipping: loss or norm six deviations above the last 128."""
    norms: list[float] = []
    for snapshot in snapshots:
        norm = snapshot.global_norm
        if norm is None:
            continue
        window = norms[-128:]
        if len(window) >= 64 and norm > np.mean(window) + 6 * np.std(window):
            return snapshot.step
        norms.append(norm)
    return None


PEERS: Mapping[str, Rule] = {
    "SageMaker Debugger, VanishingGradient": debugger_vanishing,
    "SageMaker Debugger, WeightUpdateRatio": debugger_update_ratio,
    "SageMaker Debugger, NaN": debugger_nan,
    "SageMaker Debugger, LossNotDecreasing": debugger_loss,
    "AUTOTRAINER": autotrainer,
    "DeepLocalize": deeplocalize,
    "six deviations (OLMo)": six_sigma,
    "norm > 100 or a layer < 1e-6": folklore,
}

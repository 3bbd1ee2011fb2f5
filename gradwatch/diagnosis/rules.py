"""Which cause an alert has: rules in order, the first that fires is the first cause."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice

import numpy as np

from gradwatch.diagnosis.case import Case
from gradwatch.diagnosis.remedies import remedy
from gradwatch.history import History
from gradwatch.records import Alert, Cause, Snapshot

MAX_CAUSES = 3
SURE, LIKELY, POSSIBLE, FALLBACK = 0.9, 0.7, 0.4, 0.2
"""Confidence of a direct measurement, of a measured sign, of a weak one, and of what remains."""

LARGE_INPUT, UNSCALED_INPUT = 10.0, 5.0
"""Root mean square of a batch that was not standardised, for any net and for one with bounded activations."""
LARGE_GAIN = 2.2
"""rms(w)·√fan_in; He's initialisation for ReLU has 1.4."""
LARGE_GROWTH = 100.0
"""Output of the last hidden layer over that of the first, before any training."""
LARGE_UPDATE = 0.3
LARGE_VALUES = 1e4
"""Root mean square of activations up to which no operation of a healthy network overflows."""
LARGE_LOGITS = 6.0
"""Root mean square of attention logits beyond which a softmax is nearly one-hot; about 1 in health."""
UNSCALED_TARGETS = 10.0
SUMMED = 0.05
"""Gradient at each element of the output: a mean over the batch makes it smaller than this."""

Finding = tuple[str, float, str]
"""Cause, confidence, evidence."""


def diagnose(alert: Alert, snapshot: Snapshot, history: History) -> tuple[Cause, ...]:
    """Rank the causes of an alert at the step that opened it; each with its evidence and what to write."""
    case = Case(alert, snapshot, history)
    rules = RULES.get(alert.symptom)
    if rules is None:
        return ()
    found: dict[str, Finding] = {}
    for finding in rules(case):
        found.setdefault(finding[0], finding)
    ceiling, causes = 1.0, []
    best = max((confidence for _, confidence, _ in found.values()), default=0.0)
    worth = [finding for finding in found.values() if finding[1] > FALLBACK or best < LIKELY]
    for name, confidence, evidence in islice(worth, MAX_CAUSES):
        ceiling = min(ceiling, confidence)
        causes.append(Cause(name=name, confidence=ceiling, evidence=evidence, remedy=remedy(name, case)))
    if causes and case.probe is None:
        unread = "The forward pass was not read: this is told from gradients and weights alone."
        causes[0] = replace(causes[0], evidence=f"{causes[0].evidence} {unread}")
    return tuple(causes)


def _exploding(case: Case) -> Iterator[Finding]:
    if case.rate_jumped:
        yield "learning_rate", SURE, f"The learning rate grew at least fivefold at step {case.history.rate_jump}."
    else:
        yield from _bad_batch(case)
        if case.recurrence_grows:
            yield "recurrence", SURE, _over_time(case)
        yield from _unscaled_input(case, LARGE_INPUT)
        yield from _large_initialization(case)
        yield from _scale_of_loss(case)
    update = f"One update was {case.recent_update:.2g} times the weights, at a rate of {case.rate:.3g}."
    yield "learning_rate", LIKELY, update
    if case.opening.gain > 1.8:
        yield "initialization", POSSIBLE, _gain(case)


def _accumulation(case: Case) -> Iterator[Finding]:
    yield "accumulation", SURE, case.alert.message


def _nonfinite(case: Case) -> Iterator[Finding]:
    opening, loss = case.opening, case.snapshot.loss
    yield from _bad_batch(case)
    if case.is_float16:
        yield "precision", LIKELY, "The run computes in float16, which ends at 65,504."
    if case.recent_update > LARGE_UPDATE and case.snapshot.step > 0 and not opening.input_rms > LARGE_INPUT:
        if not case.rate_jumped:
            if case.recurrence_grows:
                yield "recurrence", SURE, _over_time(case)
            yield from _large_initialization(case)
            yield from _scale_of_loss(case)
        yield "learning_rate", LIKELY, f"The updates before were up to {case.recent_update:.2g} times the weights."
    yield from _unscaled_input(case, LARGE_INPUT)
    if case.recurrence_grows:
        yield "recurrence", SURE, _over_time(case)
    if case.snapshot.step < 3 and case.amplifying is not None:
        yield "activation", LIKELY, f"The activation in {case.amplifying} grows without bound."
    yield from _undefined(case)
    if case.snapshot.step < 3:
        yield from _large_initialization(case)
    if loss is not None and math.isinf(loss):
        yield "precision", LIKELY, "The loss is infinite although the batch is finite: log(0), or an overflow."
    if loss is not None and math.isfinite(loss):
        yield "precision", LIKELY, "The loss is finite and its gradient is not: sqrt(0), a norm of 0, or 0/0."
    yield "data", POSSIBLE, "The loss is not finite although the inputs are: look at the targets."
    yield "precision", FALLBACK, "An operation left the range of its dtype."


def _detached(case: Case) -> Iterator[Finding]:
    cuts = () if case.probe is None else case.probe.cuts
    found = f" The forward pass calls {', '.join(cuts[:3])}." if cuts else ""
    yield "graph", SURE, f"{case.alert.message}{found}"


def _nothing_arrives(_case: Case) -> Iterator[Finding]:
    yield "graph", LIKELY, "backward() reaches no parameter of this optimizer."


def _unoptimized(case: Case) -> Iterator[Finding]:
    yield "graph", SURE, case.alert.message


def _symmetry(case: Case) -> Iterator[Finding]:
    yield "initialization", SURE, case.alert.message


def _zero(case: Case) -> Iterator[Finding]:
    module, operation = case.last_operation
    everything = not case.snapshot.global_norm
    if case.is_float16:
        yield "precision", LIKELY, "In float16 every gradient below 6e-8 is zero."
    if case.opening.zero_weights:
        yield "initialization", SURE, f"{case.opening.zero_weights[0]} was initialised to zero."
    elif case.input_is_zero:
        yield "data", SURE, "Everything that the first layer is given is zero."
    if everything and operation in ("softmax", "relu", "sigmoid", "tanh") and case.inactive in (None, module):
        yield "activation", LIKELY, f"The {operation} that ends the model has no slope at these values."
    if case.largest_update > LARGE_UPDATE:
        yield from _bad_batch(case)
        yield from _unscaled_input(case, LARGE_INPUT)
        yield "learning_rate", LIKELY, f"An update of {case.largest_update:.2g} times the weights came before."
    if case.inactive is not None:
        name = "initialization" if case.alert.first_step < 10 else "learning_rate"
        yield name, LIKELY, f"No sample activates the units of {case.inactive}: their inputs lie below zero."
        yield "activation", POSSIBLE, f"A ReLU in {case.inactive} has no slope below zero."
    yield "graph", POSSIBLE, "The forward pass passes an operation without a gradient, such as clamp or where."


def _rounding(case: Case) -> Iterator[Finding]:
    yield "precision", SURE, case.alert.message
    yield "learning_rate", POSSIBLE, f"At a rate of {case.rate:.3g} the updates are that small."


def _rate_gone(case: Case) -> Iterator[Finding]:
    yield "learning_rate", SURE, case.alert.message


def _update_small(case: Case) -> Iterator[Finding]:
    faint = case.alert.kind == "vanishing"
    if case.eps_decides:
        added = f"the {case.eps:g} that {case.snapshot.optimizer_facts.name} adds as eps decides the step"
        yield "learning_rate", SURE, f"The gradient has {case.gradient_rms:.1e} per element: {added}."
    if case.clipped_away is not None:
        yield "learning_rate", SURE, f"Clipping leaves {case.clipped_away:.1e} of the gradient."
    if faint and case.decomposition is not None and case.decomposition.lost < 2 and not case.is_float16:
        small = f"The gradient is small from the loss on ({case.opening.output_gradient:.1e} at each output)"
        yield "learning_rate", LIKELY, f"{small}, and a rate of {case.rate:.3g} does not make up for it."
    if faint and case.saturated_share > 0.5:
        yield "activation", LIKELY, f"{100 * case.saturated_share:.0f} % of the activations are saturated."
    if faint and case.decomposition is not None:
        yield from _decomposed(case)
    if faint:
        yield "precision" if case.is_float16 else "initialization", POSSIBLE, "The gradient is small, not the rate."
    yield (
        "learning_rate",
        LIKELY,
        f"At a rate of {case.rate:.3g}, {case.alert.message[0].lower()}{case.alert.message[1:]}",
    )


def _saturated(case: Case) -> Iterator[Finding]:
    yield from _unscaled_input(case, UNSCALED_INPUT)
    if case.alert.first_step > 3 and case.largest_update > LARGE_UPDATE:
        yield "learning_rate", LIKELY, f"An update of {case.largest_update:.2g} times the weights came before."
    before = _before_activation(case)
    if case.opening.gain > 1.8 or before > 3:
        yield "initialization", LIKELY, f"The weights give pre-activations of rms {before:.2g}. {_gain(case)}"
    yield "activation", POSSIBLE, case.alert.message


def _profile_down(case: Case) -> Iterator[Finding]:
    later = case.alert.first_step > 3
    if case.is_float16 and np.nanmax(case.snapshot.zero_fraction, initial=0.0) > 0.5:
        yield "precision", LIKELY, "More than half of a gradient is zero: in float16 nothing below 6e-8 exists."
    if case.probe is not None and case.probe.frozen_statistics:
        name = case.probe.frozen_statistics[0]
        yield "initialization", SURE, f"The batch normalisation {name} runs in evaluation mode while the model trains."
    if later and case.largest_update > 0.2:
        yield "learning_rate", LIKELY, f"An update of {case.largest_update:.2g} times the weights came before."
    if case.has_norm_layers and case.recent_update > 0.02:
        yield (
            "learning_rate",
            LIKELY,
            f"The model normalises, and one update is {case.recent_update:.2g} of the weights.",
        )
        yield "depth", POSSIBLE, f"{case.depth} weights lie in a row."
    if case.decomposition is not None:
        yield from _decomposed(case)
    if case.opening.gain < 0.7:
        yield "initialization", POSSIBLE, _gain(case)
    if case.depth >= 8:
        yield "depth", POSSIBLE, f"{case.depth} weights lie in a row."
    yield "depth", FALLBACK, f"{case.depth} weights lie in a row."
    yield "initialization", FALLBACK, _gain(case)


def _decay(case: Case) -> Iterator[Finding]:
    yield "learning_rate", SURE, case.alert.message


def _recurrence(case: Case) -> Iterator[Finding]:
    yield "recurrence", SURE, case.alert.message
    yield "depth", POSSIBLE, "Every time step is a layer."


def _spike(case: Case) -> Iterator[Finding]:
    history, first = case.history, case.alert.first_step
    yield from _bad_batch(case)
    before = history.largest_update(first - 3, first - 1)
    if case.rate_jumped:
        yield "learning_rate", SURE, f"The learning rate grew at least fivefold at step {history.rate_jump}."
    elif history.rate_is_new:
        yield (
            "learning_rate",
            LIKELY,
            f"The learning rate, {case.rate:.3g}, is higher than ever before and still rises.",
        )
    elif history.rate_is_ramping or before > LARGE_UPDATE or 0 < 3 * history.update_reference < before:
        yield "learning_rate", LIKELY, f"The update before it was {before:.2g} times the weights, at {case.rate:.3g}."
    yield "data", POSSIBLE, "Loss and gradient left their range together, at one batch."
    yield "learning_rate", FALLBACK, f"The learning rate is {case.rate:.3g}."


# -- what several rules share ----------------------------------------------------------------------------------------


def _bad_batch(case: Case) -> Iterator[Finding]:
    history = case.history
    if not case.batch_was_bad:
        if case.loss_leapt:
            leap = f"The loss of step {history.leap} is {history.leap_size:.3g} times any before it"
            yield "data", LIKELY, f"{leap}, after an ordinary update: inputs as usual, so look at the targets."
        return
    if math.isinf(history.bad_batch_size):
        yield "data", SURE, f"The batch of step {history.bad_batch} holds a non-finite input."
    else:
        size = f"{history.bad_batch_size:.3g} times larger than every input before"
        yield "data", SURE, f"The batch of step {history.bad_batch} holds an input {size}."


def _undefined(case: Case) -> Iterator[Finding]:
    if case.leaves_the_finite is not None and case.leaves_the_finite[1] < LARGE_VALUES:
        module, before = case.leaves_the_finite
        where = f"The forward pass is not finite from {module or 'the model itself'} on"
        yield "precision", LIKELY, f"{where}, where values are no larger than {before:.2g}: 0/0, log(0), sqrt(0)."


def _unscaled_input(case: Case, ceiling: float) -> Iterator[Finding]:
    if case.opening.input_rms > ceiling:
        yield "data", LIKELY, f"The inputs have a root mean square of {case.opening.input_rms:.3g}: not standardised."


def _large_initialization(case: Case) -> Iterator[Finding]:
    opening = case.opening
    early = case.alert.first_step <= 5
    if opening.logits > LARGE_LOGITS and early:
        yield "initialization", LIKELY, f"The attention logits begin with a root mean square of {opening.logits:.2g}."
    if opening.forward_growth > LARGE_GROWTH and (opening.gain > LARGE_GAIN or early):
        growth = f"grows {opening.forward_growth:.2g} times from the first layer to the last before any training"
        yield "initialization", LIKELY, f"The signal {growth}. {_gain(case)}"
    elif opening.gain > LARGE_GAIN and early and not case.has_norm_layers:
        yield "initialization", LIKELY, _gain(case)


def _scale_of_loss(case: Case) -> Iterator[Finding]:
    gradient = case.opening.output_gradient
    if gradient > UNSCALED_TARGETS:
        yield "data", LIKELY, f"The loss has a gradient of {gradient:.3g} at each output: the targets are not scaled."
    elif gradient > SUMMED and case.opening.output_elements >= 64:
        yield (
            "learning_rate",
            LIKELY,
            f"The loss is summed, not averaged: its gradient is {gradient:.2g} at each output.",
        )


def _decomposed(case: Case) -> Iterator[Finding]:
    parts = case.decomposition
    if parts is None:
        return
    if parts.activations_dominate:
        if case.saturated_share > 0.5:
            name = "data" if case.opening.input_rms > UNSCALED_INPUT else "initialization"
            yield name, LIKELY, f"{100 * case.saturated_share:.0f} % of the outputs of the activations are saturated."
        yield "activation", SURE, f"The activations take {-parts.activations:.1f} of {parts.lost:.1f} decades."
        if parts.weights < -1:
            yield "initialization", POSSIBLE, f"The weights take {-parts.weights:.1f} decades."
    elif parts.weights < -0.05 * max(parts.layers, 1):
        a_layer = 10 ** (parts.weights / max(parts.layers, 1))
        share = f"{-parts.weights:.1f} decades over {parts.layers} layers, {a_layer:.2g} of the ideal gain each"
        yield "initialization", SURE, f"The weights take {share}."


def _over_time(case: Case) -> str:
    opening = case.opening
    where = f"{opening.recurrent_steps} time steps of {opening.recurrent_module}"
    return f"The gradient grows by {opening.recurrent_growth:.1f} decades over the {where}, before any training."


def _gain(case: Case) -> str:
    if math.isnan(case.opening.gain):
        return "The scale of the weights is not known."
    return f"The weights began at {case.opening.gain:.2g} for rms(w)·√fan_in, where 1.4 suits ReLU and 1 tanh."


def _before_activation(case: Case) -> float:
    if case.probe is None:
        return 0.0
    share = np.nan_to_num(case.probe.low) + np.nan_to_num(case.probe.high)
    return float(case.probe.input_rms[int(np.argmax(share))]) if share.size else 0.0


RULES: dict[str, Callable[[Case], Iterator[Finding]]] = {
    "nonfinite": _nonfinite,
    "accumulation": _accumulation,
    "cleared_early": _accumulation,
    "nothing_arrives": _nothing_arrives,
    "unoptimized": _unoptimized,
    "detached": _detached,
    "saturated": _saturated,
    "symmetry": _symmetry,
    "zero": _zero,
    "dead_units": _zero,
    "rounding": _rounding,
    "rate_gone": _rate_gone,
    "update_small": _update_small,
    "profile_down": _profile_down,
    "collapse": _profile_down,
    "decay": _decay,
    "recurrence_down": _recurrence,
    "recurrence_up": _recurrence,
    "update_large": _exploding,
    "growth": _exploding,
    "gradient_level": _exploding,
    "loss_up": _exploding,
    "profile_up": _exploding,
    "spike": _spike,
}

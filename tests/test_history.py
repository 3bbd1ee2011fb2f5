"""The bounded past: references, run lengths, the loss, and all of it by name."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from builders import snapshot, tensors
from hypothesis import given
from hypothesis import strategies as st

from gradwatch.history import RECENT, History
from gradwatch.records import OptimizerFacts
from gradwatch.series import Thinned


def past(steps, **changes):
    history = History()
    for step in range(steps):
        made = {name: value(step) if callable(value) else value for name, value in changes.items()}
        history.update(snapshot(step, **made))
    return history


def rated(rate):
    return OptimizerFacts(name="SGD", learning_rates=(rate,), weight_decay=(0.0,), eps=(0.0,))


@given(st.lists(st.floats(0, 1e9), max_size=2000))
def test_a_thinned_series_is_bounded_and_begins_at_the_beginning(values):
    series = Thinned(limit=64)

    for value in values:
        series.append(value)

    assert len(series.values) <= 64
    assert series.values[:1] == values[:1]
    assert set(series.values) <= set(values)


def test_a_thinned_series_knows_the_value_of_half_the_run_ago():
    series = Thinned()

    for value in range(10_000):
        series.append(float(value))

    assert series.halfway() == pytest.approx(5_000, rel=0.02)


def test_memory_does_not_grow_with_the_run():
    history = past(3000, loss=lambda step: 1.0 / (step + 1))

    assert len(history.losses) == len(history.norms) == RECENT
    assert len(history.first_losses) == 10
    assert len(history.weight_norms) <= 32
    assert len(history.all_losses.values) <= 256


@pytest.mark.parametrize(
    ("loss", "learns"),
    [
        (lambda step: 2.3 - 0.02 * step, True),
        (lambda step: 2.3 + 0.05 * (-1) ** step, False),
        (lambda step: 2.3, False),
        (lambda step: 2.3 + 0.1 * step, False),
    ],
    ids=["falling", "noise", "flat", "rising"],
)
def test_whether_the_network_learns_is_known_from_thirty_losses(loss, learns):
    assert not past(29, loss=loss).is_learning
    assert not past(29, loss=loss).is_stuck
    assert past(40, loss=loss).is_learning == learns
    assert past(40, loss=loss).is_stuck != learns


def test_without_a_loss_nothing_is_known_about_learning():
    history = past(100)

    assert not history.is_learning
    assert not history.is_stuck
    assert not history.has_no_signal


def test_a_loss_at_a_thousandth_of_its_largest_value_has_no_signal_left():
    assert past(20, loss=lambda step: 1.0 if step < 15 else 1e-4).has_no_signal
    assert not past(20, loss=1.0).has_no_signal


def test_the_reference_level_is_the_largest_running_median_and_lags_behind():
    def norm(step):
        return np.full(4, {60: 1e6}.get(step, 2.0 if step < 30 else 1.0))

    history = past(100, norm=norm)

    assert history.norm_reference == pytest.approx(4.0)


@pytest.mark.parametrize(
    ("rate", "quiet"),
    [
        (lambda step: 0.1, False),
        (lambda step: 1e-3 * (step + 1), True),
        (lambda step: 0.1 * 0.9**step, True),
        (lambda step: 0.1 if step < 10 else 1e-7, False),
        (lambda step: 0.0, True),
    ],
    ids=["constant", "warm-up", "annealed", "dropped", "zero"],
)
def test_a_schedule_is_quiet_where_small_updates_are_meant(rate, quiet):
    history = past(40, optimizer_facts=lambda step: rated(rate(step)))

    assert history.schedule_is_quiet == quiet


@pytest.mark.parametrize(
    ("changes", "leaps"),
    [
        ({}, True),
        ({"loss": lambda t: 9.0 if t == 30 else 1.0}, False),  # less than tenfold
        ({"global_norm": lambda t: 50.0 if t == 29 else 1.0}, False),  # the step before was large
        ({"optimizer_facts": lambda t: rated(0.6 if t == 29 else 0.1)}, False),  # so was its rate
        ({"optimizer_facts": lambda t: rated(0.1 * 1.2**t)}, False),  # a rate that grows
    ],
)
def test_a_loss_leaps_where_the_update_before_it_was_ordinary(changes, leaps):
    usual = {"loss": lambda t: 50.0 if t == 30 else 1.0, "global_norm": 1.0, "optimizer_facts": rated(0.1)}

    history = past(35, **(usual | changes))

    assert history.leap == (30 if leaps else -1)
    assert history.leap_size == (50.0 if leaps else 0.0)


def test_a_run_of_zeros_is_unusual_beyond_twice_the_longest_before():
    pattern = [2, 1, 1, 2, 2, 1, 1, 1, 1, 1]
    history = History()
    unusual = []
    for step, state in enumerate(pattern):
        history.update(snapshot(step, state=np.full(4, state, dtype=np.int8)))
        unusual.append(bool(history.zero.unusual()[0]))

    assert unusual == [False, True, True, False, False, False, False, False, False, True]


def test_skipped_steps_leave_no_trace_in_levels_and_weights():
    history = past(30)
    before = history.norm_reference, len(history.norms)

    history.update(snapshot(30, skipped=True, norm=np.full(4, 1e9), loss_scale=1.0, nonfinite=np.ones(4)))

    assert (history.norm_reference, len(history.norms)) == before
    assert history.overflows == 1


def test_what_is_kept_by_tensor_follows_its_name():
    history = past(3, state=np.array([1, 2, 2, 2], dtype=np.int8))
    of = tensors(names=("new.weight", *reversed(tensors().names)))

    history.update(snapshot(3, of=of, norm=np.full(5, 0.5), state=np.array([2, 2, 2, 2, 1], dtype=np.int8)))

    np.testing.assert_array_equal(history.zero.current, [0, 0, 0, 0, 4])


def test_weights_before_are_those_of_the_newest_detail_step_old_enough():
    history = past(25, weight_norm=lambda step: np.full(4, float(step)))

    assert history.weights_before(24, 10)[0] == 14
    assert history.weights_before(24, 100)[0] == 0
    assert History().weights_before(3, 1) is None


def test_a_transient_is_attenuation_that_has_shrunk_since_half_the_run():
    def norm(step):
        return np.array([10.0 ** (-6 + 0.2 * step), 1e-3, 1.0, 1.0])

    assert past(15, norm=norm).is_transient
    assert not past(15, norm=np.array([1e-6, 1e-3, 1.0, 1.0])).is_transient
    assert not History().is_transient


def test_a_restored_history_goes_on_as_if_nothing_had_happened():
    def step(index):
        generator = np.random.default_rng(index)
        return snapshot(index, norm=generator.random(4), loss=float(generator.random()), detail=index % 3 == 0)

    whole, first, second = History(), History(), History()
    for index in range(60):
        whole.update(step(index))
    for index in range(25):
        first.update(step(index))
    second.restore(first.state())
    for index in range(25, 60):
        second.update(step(index))

    assert repr(second.state()) == repr(whole.state())


def test_weight_norms_of_steps_without_detail_are_carried_on():
    history = past(5)

    history.update(replace(snapshot(5, detail=False)))

    np.testing.assert_array_equal(history.weight_norm, np.full(4, 8.0))
    assert history.profile is not None

"""Real runs: silence on healthy ones whatever is odd about them, one alert of the right kind on sick ones."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import training_runs
from builders import snapshot, tensors
from loops import watched
from training_runs import ORDINARY, SICK, TRAPS

from gradwatch.detectors import DEFAULT_DETECTORS, build
from gradwatch.detectors.dead import dead
from gradwatch.detectors.exploding import exploding
from gradwatch.detectors.nonfinite import PATIENCE, nonfinite
from gradwatch.detectors.stalled import stalled
from gradwatch.detectors.vanishing import vanishing
from gradwatch.episodes import Episodes
from gradwatch.history import History
from gradwatch.judge import Judge


def loud_alerts(build, *, with_loss=True, backend=None):
    torch.manual_seed(0)
    run = build()
    watch, _ = watched(run.models, run.optimizers, backend=backend)
    for index in range(run.steps):
        run.step(index, watch.log_loss if with_loss else lambda *_, **__: None)
    assert not any(lane.part.failed for lane in watch.lanes.values())
    watch.close()
    return [alert for alert in watch.alerts if alert.severity != "info"]


def name_of(build):
    return build.__name__


@pytest.mark.parametrize("with_loss", [True, False], ids=["loss", "no_loss"])
@pytest.mark.parametrize("build", [*TRAPS, *ORDINARY], ids=name_of)
def test_a_healthy_run_is_silent(build, with_loss):
    assert loud_alerts(build, with_loss=with_loss) == []


@pytest.mark.parametrize("build", TRAPS[:6], ids=name_of)
def test_a_healthy_run_is_silent_when_measured_in_pure_torch(build):
    assert loud_alerts(build, backend="foreach") == []


@pytest.mark.parametrize("backend", ["cpu", "foreach"])
@pytest.mark.parametrize(("build", "kind"), SICK.items(), ids=map(name_of, SICK))
def test_a_sick_run_raises_one_alert_of_the_right_kind(build, kind, backend):
    alerts = loud_alerts(build, backend=backend)

    assert [alert.kind for alert in alerts] == [kind]
    assert alerts[0].message


@pytest.mark.parametrize(("build", "kind"), SICK.items(), ids=map(name_of, SICK))
def test_without_a_loss_it_never_raises_one_of_another_kind(build, kind):
    assert {alert.kind for alert in loud_alerts(build, with_loss=False)} <= {kind}


@pytest.mark.parametrize(
    ("build", "layers"),
    [
        (training_runs.backbone_not_in_the_optimizer, {"0", "2"}),
        (training_runs.dead_units, {"0", "2", "4", "6"}),  # what lies behind the wall sees inputs of zero
    ],
)
def test_the_alert_names_the_layers(build, layers):
    (alert,) = loud_alerts(build)

    assert set(alert.layers) == layers


def overflowing(step, scale):
    return snapshot(
        step,
        skipped=True,
        loss_scale=scale,
        nonfinite=np.array([0, 0, 1.0, 1.0]),
        norm=np.array([1, 1, np.nan, np.nan]),
    )


def test_a_scaler_that_searches_its_scale_is_no_alert():
    history = History()
    for step in range(15):
        history.update(overflowing(step, 2.0 ** (16 - step)))
        evidence = list(nonfinite(overflowing(step, 2.0 ** (16 - step)), history))

        assert {item.severity for item in evidence if item.value > 0} == {"info"}


@pytest.mark.parametrize("scale", [lambda step: 0.5, lambda step: 65536.0])
def test_an_overflow_that_persists_is_one(scale):
    history = History()
    for step in range(PATIENCE):
        history.update(overflowing(step, scale(step)))
    (evidence,) = list(nonfinite(overflowing(PATIENCE, scale(PATIENCE)), history))

    assert (evidence.severity, evidence.immediate) == ("critical", True)
    assert evidence.tensors == ("block1.layer3.weight", "block1.layer2.weight")


def test_an_infinite_loss_with_finite_gradients_is_an_alert():
    (evidence,) = list(nonfinite(snapshot(loss=float("inf")), History()))

    assert evidence.immediate
    assert "The loss is inf" in evidence.message


def test_a_zero_gradient_below_the_reach_of_float32_is_vanishing_and_not_death():
    history = History()
    faded = snapshot(norm=np.array([0.0, 0.0, 1e-36, 1.0]), state=np.array([1, 1, 2, 2], dtype=np.int8))
    history.update(faded)

    (zero,) = [item for item in dead(faded, history) if item.symptom == "zero"]

    assert zero.value < 0


def test_zero_gradients_without_a_loss_count_little_in_a_run_that_never_had_one():
    history = History()
    nothing = snapshot(norm=np.zeros(4), state=np.ones(4, dtype=np.int8))
    history.update(nothing)

    (zero,) = [item for item in dead(nothing, history) if item.symptom == "zero"]

    assert zero.value == 0.15
    assert zero.severity == "critical"


def test_steps_without_any_gradient_become_an_alert_only_if_it_lasts():
    history = History()
    none = snapshot(norm=np.full(4, np.nan), state=np.zeros(4, dtype=np.int8), skipped=True, global_norm=None)
    values = []
    for _ in range(4):
        history.update(none)
        values += [item.value for item in dead(none, history) if item.symptom == "nothing_arrives"]

    assert values == [-2.0, -2.0, 1.2, 1.2]


def test_one_tensor_without_a_gradient_is_for_the_record():
    history = History()
    for _ in range(4):
        unused = snapshot(norm=np.array([1, np.nan, 1, 1]), state=np.array([2, 0, 2, 2], dtype=np.int8))
        history.update(unused)

    missing = [item for item in dead(unused, history) if item.symptom == "missing"]

    assert [item.severity for item in missing] == ["info"]
    np.testing.assert_array_equal(missing[0].value, [-2, 1.2, -2, -2])


def test_weights_that_began_at_zero_have_time_to_wake():
    def step(index, zero):
        weights = np.array([8.0] * 5 + [0.0 if zero and index == 0 else 1.0])
        return snapshot(index, of=tensors(6), norm=np.geomspace(1e-4, 1.0, 6), weight_norm=weights)

    asleep, small = ([step(index, zero) for index in range(30)] for zero in (True, False))

    assert max(values_of("profile_down", vanishing, asleep)[:15]) < 0
    assert max(values_of("profile_down", vanishing, asleep)) > 0
    assert values_of("profile_down", vanishing, small)[2] > 0


def test_losses_of_zero_are_no_scale_for_the_first_reward():
    rewards = [0.0] * 25 + [0.1, 0.0, 0.2, 0.1, 0.3, 0.2] + [0.0] * 9
    judge = Judge(name="", detectors=build((exploding,)), episodes=Episodes())

    assert [alert for index, loss in enumerate(rewards) for alert in judge.judge(snapshot(index, loss=loss))] == []


def test_a_loss_that_begins_at_zero_and_mostly_stays_there_is_measured_by_the_largest_it_had():
    rewards = [0.0] * 10 + [0.1, 0.0, 0.2, 0.1, 0.3, 0.2] + [0.0, 1e-7, 0.0] * 60 + [2e-6] * 12
    judge = Judge(name="", detectors=build((exploding,)), episodes=Episodes())

    assert [alert for index, loss in enumerate(rewards) for alert in judge.judge(snapshot(index, loss=loss))] == []


def values_of(symptom, detector, steps):
    """Judge the steps one after the other; return what the detector said of a symptom."""
    history, found = History(), []
    for each in steps:
        history.update(each)
        found += [item.value for item in detector(each, history) if item.symptom == symptom]
    return found


@pytest.mark.parametrize(
    ("first", "growth", "loss", "alarms"),
    [
        (1e-4, 1.5, None, False),  # the first layers learn, the others wake: a small gain in front of each branch
        (1e-4, 1.0, None, True),  # they do not wake
        (1e-4, 1.0, lambda t: 1 - 0.02 * t, True),  # however well the rest learns
        (1e-2, 1.0, None, False),  # the first layers get what is usual: the gradient is there
        (1e-9, 1.5, None, True),  # nothing learns
    ],
)
def test_branches_that_rest_at_first_are_waited_for(first, growth, loss, alarms):
    def step(index):
        ratios = np.array([first, *[min(1e-9 * growth**index, 1e-6)] * 5])
        made = snapshot(index, of=tensors(6), update_norm=8 * ratios, update_ratio=ratios)
        return made if loss is None else replace(made, loss=loss(index))

    said = values_of("update_small", stalled, map(step, range(16)))

    assert bool(said and max(said[-3:]) > 0) == alarms
    assert first < 1e-6 or len(said) < 16  # the first steps decide nothing where something learns


@pytest.mark.parametrize(
    ("begins", "loss", "alarms"),
    [
        (0, None, True),  # the network explodes over depth as it was built
        (0, lambda t: 1.0, True),
        (0, lambda t: 1 - 0.02 * t, False),  # and learns all the same
        (30, None, False),  # layers that training drove apart
        (30, lambda t: 1.0, True),  # and learning has ended, or never began
        (30, lambda t: 1 - 0.02 * t, False),
    ],
)
def test_a_profile_that_grows_late_has_to_be_confirmed_by_the_loss(begins, loss, alarms):
    def step(index):
        norm = np.geomspace(1e5, 1.0, 6) if index >= begins else np.ones(6)
        made = snapshot(index, of=tensors(6), norm=norm)
        return made if loss is None else replace(made, loss=loss(index))

    said = values_of("profile_up", exploding, map(step, range(40)))

    assert (said[-1] > 0) == alarms


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_the_loss_multiplied_by_a_constant_changes_no_reading(scale):
    def readings(factor):
        history, found = History(), []
        for step in range(30):
            generator = np.random.default_rng(step)
            norm = factor * generator.random(8)
            made = snapshot(step, of=tensors(8), norm=norm, loss=factor * float(generator.random()))
            history.update(made)
            for detector in DEFAULT_DETECTORS:
                found += [
                    item.value for item in detector(made, history) if item.symptom not in ("decay", "update_small")
                ]
        return found

    np.testing.assert_allclose(np.hstack(readings(scale)), np.hstack(readings(1.0)), atol=1e-9)
